"""Many videos on a real local Ray, of CPU workers: one killed, one job failing, Ctrl-C."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import skimage.data
from PIL import Image
from support import ROOT, locked_by_another_process, main

from teacache.base import interruption
from teacache.base.errors import DeviceError, ImageError, SamplingError
from teacache.cluster import __main__ as cluster
from teacache.cluster.worker import Worker
from teacache.command.arguments import parse_arguments
from teacache.command.order import Order
from teacache.results.record import read_record
from teacache.sampling import sampler

COMMON = ("--ckpts_path", "tiny", "--num_frames", 1)
MARK = "TEACACHE_TEST_CLUSTER"  # what the environment of a test's processes has in it


@pytest.fixture
def faceless(tmp_path):
    """A picture in which no face is found: a cup of coffee."""
    Image.fromarray(skimage.data.coffee()).save(tmp_path / "coffee.png")
    return tmp_path / "coffee.png"


def start(mark: Path, *arguments: object) -> subprocess.Popen:
    environment = {**os.environ, MARK: str(mark), "RAY_ADDRESS": "local"}
    return subprocess.Popen(
        [sys.executable, "-m", "teacache.cluster", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # `communicate` knows nothing of what has been read and is not taken yet
        start_new_session=True,
    )


def processes(mark: Path) -> dict[int, str]:
    """The command lines of the processes that have the mark, by their ids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().decode()
    return found


def read_until(process: subprocess.Popen, pattern: str) -> str:
    read = ""
    while line := process.stdout.readline().decode():
        read += line
        if re.search(pattern, line):
            return read
    raise AssertionError(f"{pattern} never came in {read}: {process.stderr.read().decode()}")


def ended(process: subprocess.Popen) -> tuple[str, str]:
    """What is left to read of standard output, and standard error, at the end."""
    output, error = process.communicate(timeout=200)
    return output.decode(), error.decode()


def figures(folder: Path) -> dict[str, tuple]:
    """What does not depend on time, of each record, by seed and threshold."""
    records = [read_record(path) for path in folder.glob("[0-9]*.json")]
    return {r.settings.prefix: (r.settings, r.computed_steps, r.quality) for r in records}


def rows(folder: Path) -> list[dict]:
    (report,) = folder.glob("sweep_*.json")
    found = json.loads(report.read_text())["rows"]
    return [{k: v for k, v in row.items() if k not in ("latency", "speedup")} for row in found]


def test_one_killed_and_a_job_that_fails(capsys, tmp_path, tiny, faceless):
    """Nothing is lost, nothing doubled; videos, records and report are those of one process."""
    good = [{"seed": 1, "rel_l1_thresh": 0}, {"seed": 1, "rel_l1_thresh": 0.2}]
    good += [{"seed": seed} for seed in (2, 3)]
    for name, lines in (("good", good), ("all", [*good[:3], {"image": str(faceless)}, *good[3:]])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, lines)))
    common = (*COMMON, "--num_infer_steps", 40)
    out, one = tmp_path / "out", tmp_path / "one"
    arguments = (*common, "--jobs", tmp_path / "all", "--workers", 2, "--output_path", out)
    process = start(tmp_path, *arguments)
    output = read_until(process, r"1_0\.2_0000\.mp4")
    sampling(tmp_path).kill()
    rest, error = ended(process)
    output += rest

    assert process.returncode == 2, error  # as one process ends that meets the picture
    warnings = error.splitlines()
    name = f"video 4 of 5 (image {faceless}, seed 42, rel_l1_thresh 0.1) failed: "
    assert [line.rpartition(". ")[2] for line in warnings if name in line] == [
        *("It is tried once more", "It is given up")
    ]
    assert sum("has lost its worker" in line for line in warnings) == 1
    assert warnings[-1].startswith("error: 1 of 5 videos could not be made, the first: ")
    assert "no face was found" in warnings[-1]
    # The killed one may have been about to say that it is done.
    assert len(re.findall(r"(?m)^\d of 5  |^done before ", output)) == 4
    assert re.search(r" s, about \d+ s left\n", output)
    assert "4 of 5 videos: see --resume" in output
    assert "raylet" not in output + error

    assert main(capsys, *common, "--jobs", tmp_path / "good", "--output_path", one)[0] == 0
    made = Counter(path.name.rsplit("_", 1)[0] for path in out.glob("[0-9]*.mp4"))
    assert made == Counter(path.name.rsplit("_", 1)[0] for path in one.glob("[0-9]*.mp4"))
    for path in one.glob("[0-9]*.mp4"):
        (same,) = out.glob(f"{path.stem.rsplit('_', 1)[0]}_*.mp4")
        assert same.read_bytes() == path.read_bytes()
    assert figures(out) == figures(one)
    assert [{**row, "video": ""} for row in rows(out)] == [
        {**row, "video": ""} for row in rows(one)
    ]


def sampling(mark: Path) -> psutil.Process:
    """A worker that is at a video, as soon as there is one."""
    until = time.monotonic() + 100
    while not (found := [pid for pid, name in processes(mark).items() if ".sample" in name]):
        assert time.monotonic() < until, "nobody samples"
        time.sleep(0.05)
    return psutil.Process(found[0])


def rank_of(worker: psutil.Process, mark: Path) -> psutil.Process:
    """The rank that a worker starts, among other processes, before its first video."""
    until, found = time.monotonic() + 100, []
    while not found:
        assert time.monotonic() < until, "the worker starts no rank"
        names = processes(mark)
        found = [each for each in worker.children() if "\0teacache\0" in names.get(each.pid, "")]
        time.sleep(0.05)
    return found[0]


def test_two_ranks_a_video_one_worker_killed_and_one_of_its_ranks(capsys, tmp_path, tiny):
    """Nothing is lost, nothing doubled; every rank ends with its worker."""
    common = ("--ckpts_path", "tiny", "--num_infer_steps", 24, "--guidance_scale", 1)
    common += ("--seed", 1, 2)
    out, one = tmp_path / "out", tmp_path / "one"
    asked = ("--gpus_per_video", 2, "--workers", 1, "--output_path", out)
    process = start(tmp_path, *common, *asked)
    worker = sampling(tmp_path)
    helper = rank_of(worker, tmp_path)
    worker.kill()
    psutil.wait_procs([helper], timeout=15)
    assert not helper.is_running(), "a rank ends with its worker"
    rank_of(sampling(tmp_path), tmp_path).kill()  # of the worker that is started instead
    output, error = ended(process)

    assert process.returncode == 0, error
    assert error.count("has lost its worker") == 1
    (failed,) = [line for line in error.splitlines() if " failed: " in line]
    assert failed.endswith("failed: rank 1 of 2 was ended by SIGKILL. It is tried once more")
    assert [int(n) for n in re.findall(r"(?m)^(\d) of 2  ", output)] == [1, 2]
    assert not [name for name in processes(tmp_path).values() if "teacache" in name]

    assert main(capsys, *common, "--output_path", one)[0] == 0
    names = sorted(path.name for path in one.glob("[0-9]*"))
    assert [re.sub(r"_\d{4}", "_0000", path.name) for path in sorted(out.glob("[0-9]*"))] == names
    for path in one.glob("[0-9]*.mp4"):
        (same,) = out.glob(f"{path.stem.rsplit('_', 1)[0]}_*.mp4")
        assert same.read_bytes() == path.read_bytes(), "shared tokens change no bit"
        ours, theirs = (read_record(p.with_suffix(".json")) for p in (same, path))
        assert ours.settings.division == "2 GPUs: tokens x2"
        settings = dataclasses.replace(ours.settings, num_gpus=1, division=None)
        assert settings == theirs.settings
        assert (ours.computed_steps, ours.quality) == (theirs.computed_steps, theirs.quality)


def test_ctrl_c_then_the_rest_by_one_process(capsys, tmp_path, tiny):
    arguments = (*COMMON, "--num_infer_steps", 60, "--seed", 1, 2, 3, "--output_path", tmp_path)
    process = start(tmp_path, *arguments, "--workers", 1)
    read_until(process, r"1 of 3  ")
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    output, error = ended(process)
    assert time.monotonic() - sent < 15
    assert process.returncode == 130
    assert error.splitlines()[-1] == "interrupted"
    done = len(list(tmp_path.glob("[0-9]*.mp4")))
    assert f"{done} of 3 videos: see --resume" in output
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not hidden, "every worker has cleaned up"
    code, output, _ = main(capsys, *arguments, "--resume")
    assert code == 0
    assert output.count("done before") == done
    assert len(list(tmp_path.glob("[0-9]*.mp4"))) == 3
    assert not [name for name in processes(tmp_path).values() if "Worker" in name]


@pytest.fixture
def worker(tmp_path, monkeypatch, tiny, faceless):
    """A worker of three jobs in this process: two videos, and a picture without a face between."""
    lines = [{"seed": 1}, {"image": str(faceless)}, {"seed": 2}]
    (tmp_path / "jobs").write_text("\n".join(map(json.dumps, lines)))
    arguments = (*COMMON, "--num_infer_steps", 12, "--jobs", tmp_path / "jobs")
    arguments += ("--output_path", tmp_path / "out", "--prompt", "a man " * 300)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(interruption, "_asked", None)
    return Worker(Order.of(parse_arguments([*map(str, arguments)])), tmp_path, frozenset())


def test_a_worker(worker, tmp_path, monkeypatch):
    _, warnings = worker.start()
    assert ["learned positional" in warning for warning in warnings] == [True]
    assert Path.cwd() == tmp_path
    _, warnings = worker.condition([0, 1])
    assert ["is longer than 226 tokens" in warning for warning in warnings] == [True]
    first, _ = worker.sample(0)
    assert not first.earlier
    assert first.record.quality["identity"]
    assert read_record(first.path.with_suffix(".json")) == first.record
    with pytest.raises(ImageError, match=r"coffee.png: no face was found"):
        worker.sample(1)
    again, _ = worker.sample(0)  # as after the answer of a worker is lost
    assert (again.path, again.earlier) == (first.path, True)

    order, worker.order = worker.order, dataclasses.replace(worker.order, resume=True)
    with (
        locked_by_another_process(tmp_path / "out"),
        pytest.raises(SamplingError, match="another process samples it"),
    ):
        worker.sample(2)
    worker.order = order

    decode = sampler.decode
    monkeypatch.setattr(sampler, "decode", lambda *a: worker.stop() or decode(*a))
    with pytest.raises(SamplingError, match=r"^interrupted. The latents are kept in "):
        worker.sample(2)  # for which nothing was got ready


def test_a_worker_without_the_shared_folder(worker, tmp_path):
    worker.folder = tmp_path / "elsewhere"
    with pytest.raises(DeviceError, match=r"there is no .*/elsewhere on .*: all machines need"):
        worker.start()


def command(capsys, *arguments: object) -> tuple[int, str]:
    try:
        code = cluster.main([*map(str, arguments)])
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def test_without_ray(capsys, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else find(name)
    )
    assert command(capsys, "--ckpts_path", "tiny", "--output_path", tmp_path) == (
        2,
        "error: teacache.cluster needs the package ray: pip install ray==2.60.0\n",
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--device", "cuda:1"), "argument --device: which GPU is cuda:N is for Ray to choose"),
        (("--workers", 0), "argument --workers: '0' is not a whole number, 1 or more"),
        (("--shard", "0/2"), "unrecognized arguments: --shard 0/2"),
        (("--plan",), "unrecognized arguments: --plan"),
        (("--jobs", "nowhere.csv"), "--jobs nowhere.csv cannot be read"),
    ],
)
def test_refusals(capsys, arguments, told):
    code, error = command(capsys, *arguments)
    assert code == 2
    assert told in error
    assert error.count("\n") == 1


def test_nobody_at_the_address(capsys, tmp_path, monkeypatch):
    """Ray itself would go on trying for many minutes."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, error = command(capsys, "--ckpts_path", "tiny", "--output_path", tmp_path)
    assert (code, error) == (
        2,
        "error: no Ray cluster at RAY_ADDRESS=127.0.0.1:9: Connection refused\n",
    )


def test_a_video_has_its_gpus_on_one_machine():
    assert cluster._videos_at_a_time([8, 3, 0], 1) == 11
    assert cluster._videos_at_a_time([8, 3, 0], 2) == 5
    with pytest.raises(DeviceError, match=r"--gpus_per_video 4: .*; the most are 3"):
        cluster._videos_at_a_time([2, 3], 4)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (99.5, "100 s"), (100, "2 min"), (5940, "99 min"), (11_100, "3 h 5 min")],
)
def test_time_in_words(seconds, words):
    from teacache.cluster.dispatch import in_words

    assert in_words(seconds) == words
