"""Many videos on a real local Ray, of CPU workers: one killed, one job failing, Ctrl-C."""

import importlib.util
import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import skimage.data
from PIL import Image
from processes import start
from support import ROOT, below, is_alive, locked_by_another_process, main, untimed_rows

from teacache.base import interruption
from teacache.base.errors import DeviceError, ImageError, SamplingError
from teacache.cluster import __main__ as cluster
from teacache.cluster.pool import Worker
from teacache.request.arguments import parse_arguments
from teacache.request.values import Request
from teacache.results.record import read_record
from teacache.sampling import sampler

COMMON = ("--ckpts_path", "tiny", "--num_frames", 1)


@pytest.fixture
def faceless(tmp_path):
    """A picture in which no face is found: a cup of coffee."""
    Image.fromarray(skimage.data.coffee()).save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


def begin(*arguments: object) -> subprocess.Popen:
    return start(
        *arguments,
        program=("-m", "teacache.cluster"),
        env={"RAY_ADDRESS": "local"},
        start_new_session=True,
    )


def records(folder: Path) -> dict[str, tuple]:
    """What does not depend on time, of each record, by seed and threshold."""
    found = [read_record(path) for path in folder.glob("[0-9]*.json")]
    return {r.settings.prefix: (r.settings, r.computed_steps, r.quality) for r in found}


def test_one_killed_and_a_job_that_fails(capsys, tmp_path, tiny, faceless):
    """Nothing is lost, nothing doubled; videos, records and report are those of one process."""
    good = [{"seed": 1, "rel_l1_thresh": t} for t in (0.2, 0)] + [{"seed": s} for s in (2, 3, 4)]
    for name, lines in (("good", good), ("all", [*good, {"image": str(faceless)}])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    common = (*COMMON, "--num_infer_steps", 24)
    out, one = tmp_path / "out", tmp_path / "one"
    arguments = (*common, "--jobs", tmp_path / "all", "--workers", 2, "--output_path", out)
    process = begin(*arguments)
    for line in process.stdout:
        if "1_0.2_0000.mp4" in line:  # by the worker that has threshold 0 to compare with
            break
    while not (sampling := below(process.pid, ".sample")):
        assert process.poll() is None, "nobody samples"
    os.kill(sampling[0], signal.SIGKILL)
    output, error = process.communicate(timeout=200)

    assert process.returncode == 2, error
    *warnings, last = error.splitlines()
    (failed,) = [line for line in warnings if "no face was found" in line]
    assert failed.startswith(f"warning: seed 42, rel_l1_thresh 0.1: --image {faceless}")
    assert last.startswith("error: 1 of 6 videos failed")
    assert len(warnings) == len(set(warnings)), "each once"
    assert "5 of 6 videos: see --resume" in output
    assert "raylet" not in output + error

    assert main(capsys, *common, "--jobs", tmp_path / "good", "--output_path", one)[0] == 0
    made = Counter(path.name.rsplit("_", 1)[0] for path in out.glob("[0-9]*.mp4"))
    assert made == Counter(path.name.rsplit("_", 1)[0] for path in one.glob("[0-9]*.mp4"))
    for path in one.glob("[0-9]*.mp4"):
        (same,) = out.glob(f"{path.stem.rsplit('_', 1)[0]}_*.mp4")
        assert same.read_bytes() == path.read_bytes()
    assert records(out) == records(one)
    assert untimed_rows(out) == untimed_rows(one)


def test_ctrl_c_then_the_rest_by_one_process(capsys, tmp_path, tiny):
    arguments = (*COMMON, "--num_infer_steps", 60, "--seed", 1, 2, 3, "--output_path", tmp_path)
    process = begin(*arguments, "--workers", 1)
    assert process.stdout.readline().startswith("1 of 3  ")
    (worker,) = below(process.pid, "::Worker")
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    output, error = process.communicate(timeout=100)
    assert time.monotonic() - sent < 15
    assert (process.returncode, error.splitlines()[-1]) == (130, "interrupted")
    done = len(list(tmp_path.glob("[0-9]*.mp4")))
    assert f"{done} of 3 videos: see --resume" in output
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not hidden, "the worker has cleaned up"
    code, output, _ = main(capsys, *arguments, "--resume")
    assert (code, output.count("done before")) == (0, done)
    assert len(list(tmp_path.glob("[0-9]*.mp4"))) == 3
    assert not is_alive(worker)


def test_a_worker(tmp_path, monkeypatch, tiny, faceless):
    lines = [{"seed": 1}, {"image": str(faceless)}, {"seed": 2}]
    (tmp_path / "jobs").write_text("\n".join(map(json.dumps, lines)))
    arguments = (*COMMON, "--num_infer_steps", 12, "--jobs", tmp_path / "jobs")
    arguments += ("--output_path", tmp_path / "out", "--prompt", "a man " * 300, "--resume")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(interruption, "_signal_time", None)
    request = Request.of(parse_arguments([*map(str, arguments)]))
    worker = Worker(request, tmp_path, frozenset())
    first, without_face, second = request.jobs

    assert not list(worker.sample(()))
    assert Path.cwd() == tmp_path
    ((job, path, record, warnings),) = worker.sample((first,))
    assert job == first
    assert "is longer than 226 tokens" in warnings[-1]
    assert read_record(path.with_suffix(".json")) == record
    ((*again, warnings),) = worker.sample((first,))  # as after the answer of a worker is lost
    assert again == [first, path, record]
    assert not [warning for warning in warnings if "226" in warning], "each is passed on once"
    with pytest.raises(ImageError, match=r"coffee.png: no face was found"):
        list(worker.sample((without_face,)))
    with locked_by_another_process(tmp_path / "out"):
        assert not list(worker.sample((second,)))

    decode = sampler.decode
    monkeypatch.setattr(sampler, "decode", lambda *a: worker.stop() or decode(*a))
    with pytest.raises(SamplingError, match=r"^The latents are kept in "):
        list(worker.sample((second,)))
    with pytest.raises(DeviceError, match=r" lacks .*/elsewhere: all machines need it"):
        list(Worker(request, tmp_path / "elsewhere", frozenset()).sample(()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard", "0/2"), "unrecognized arguments: --shard 0/2"),
        # Ray itself would go on trying for many minutes.
        ((), "error: no Ray cluster at RAY_ADDRESS=127.0.0.1:9: Connection refused"),
    ],
)
def test_refusals(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    try:
        code = cluster.main([*map(str, (*COMMON, "--output_path", tmp_path, *arguments))])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert message in error


def test_without_ray(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cluster.main(["--ckpts_path", "tiny", "--output_path", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == "error: teacache.cluster needs the package ray: pip install ray==2.60.0\n"
