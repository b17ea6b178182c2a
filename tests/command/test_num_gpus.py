"""One video on several processes, through the command: what comes of it, and how it ends."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from support import ROOT

from teacache.base.errors import DeviceError
from teacache.command.machine import check_number
from teacache.command.main import main

SAMPLE = (sys.executable, "teacache_sample_video.py", "--ckpts_path", "tiny", "--device", "cpu")
SAMPLE += ("--rel_l1_thresh", "0.2", "--num_infer_steps", "10")


def command(*arguments, start=SAMPLE):
    return [*start, *map(str, arguments)]


def ended(*arguments, start=SAMPLE):
    return subprocess.run(
        command(*arguments, start=start), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert main([*SAMPLE[2:], "--guidance_scale", "1", "--output_path", str(folder)]) == 0
    return folder / "42_0.2_0000.mp4"


@pytest.mark.parametrize("start", [(), ("-m", "torch.distributed.run", "--nproc_per_node", "2")])
def test_shared_tokens_give_the_same_bytes(tmp_path, alone, start):
    begin = (sys.executable, *start, *SAMPLE[1:])
    asked = () if start else ("--num_gpus", 2)
    run = ended("--guidance_scale", 1, "--output_path", tmp_path, *asked, start=begin)
    assert run.returncode == 0, run.stderr
    video = tmp_path / alone.name
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (video, alone)]
    assert digests[0] == digests[1]
    record, other = (json.loads(p.with_suffix(".json").read_text()) for p in (video, alone))
    assert (record["num_gpus"], record["division"]) == (2, "2 GPUs: tokens x2")
    assert (other["num_gpus"], other["division"]) == (1, None)
    assert record["computed_steps"] == other["computed_steps"]
    assert "on 2 GPUs: tokens x2" in run.stdout
    if not start:  # once more, for which no rank has anything to do
        again = ended("--guidance_scale", 1, "--output_path", tmp_path, *asked, "--resume")
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("done before") == 1


def test_both_ways_to_share_a_sweep(tmp_path):
    asked = ("--num_gpus", 4, "--rel_l1_thresh", 0, 0.3, "--output_path", tmp_path)
    run = ended(*asked)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "42_0.3_0000.json").read_text())
    assert record["division"] == "4 GPUs: guidance x2, tokens x2"
    assert record["quality"]["psnr"]["mean"] > 10


@pytest.mark.parametrize(
    ("num_gpus", "expected"),
    [
        (3, "520 tokens and 6 heads do not divide among so many; 2 and 4 would do"),
        (8, "520 tokens and 6 heads do not divide among so many; 4 would do"),
    ],
)
def test_what_does_not_divide_is_refused_before_any_rank_begins(
    capsys, tmp_path, monkeypatch, num_gpus, expected
):
    monkeypatch.chdir(ROOT)
    monkeypatch.delattr("torch.distributed.launcher.api.elastic_launch")
    out = tmp_path / "out"
    assert main([*SAMPLE[2:], "--num_gpus", str(num_gpus), "--output_path", str(out)]) == 2
    output, error = capsys.readouterr()
    assert (output, error) == ("", f"error: --num_gpus {num_gpus}: {expected}\n")
    assert not out.exists()


def test_bad_input_that_the_first_rank_finds_ends_all(tmp_path):
    run = ended("--num_gpus", 2, "--image", "README.md", "--output_path", tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("error: --image README.md is no image")
    assert run.stderr.count("\n") == 1
    assert "identity" not in run.stdout


@pytest.mark.parametrize("how", ["killed helper", "killed launcher", "SIGTERM", "Ctrl-C"])
def test_endings(tmp_path, how):
    asked = ("--num_gpus", 2, "--num_infer_steps", 500, "--rel_l1_thresh", 0)
    asked += ("--output_path", tmp_path)
    run = subprocess.Popen(
        command(*asked),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while "encoding" not in (line := run.stdout.readline()):  # then it denoises, for half a minute
        assert line, run.stderr.read()
    time.sleep(1)
    ranks = _ranks(run.pid)
    assert len(ranks) == 2
    chosen = {psutil.Process(pid).environ().get("PYTORCH_ALLOC_CONF") for pid in ranks}
    assert chosen == {"expandable_segments:True"}, "before torch is imported"
    if how == "killed helper":
        os.kill(max(ranks), signal.SIGKILL)
    elif how == "killed launcher":
        run.kill()
    elif how == "SIGTERM":
        run.terminate()
    else:
        os.killpg(run.pid, signal.SIGINT)
    asked_at = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - asked_at < 15
    expected = {
        "killed helper": (2, "error: rank 1 of 2 was ended by SIGKILL\n"),
        "killed launcher": (-signal.SIGKILL, ""),
        "SIGTERM": (130, "interrupted\n"),
        "Ctrl-C": (130, "interrupted\n"),
    }
    assert (run.returncode, said) == expected[how]
    assert not [pid for pid in ranks if _is_alive(pid)], "no orphan"
    assert list(tmp_path.iterdir()) == []


def _is_alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and that init has not asked about does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _ranks(parent: int) -> list[int]:
    """The processes that the launcher has started, without the one that tracks resources."""
    children = psutil.Process(parent).children()
    return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.parametrize("short_of", [0, 1])
def test_a_rank_that_runs_out_of_memory_ends_all(tmp_path, short_of):
    """In the middle of a step, in which the other rank waits for it."""
    out = tmp_path / "out"
    begin = (sys.executable, ROOT / "tests" / "failing_rank.py", *SAMPLE[2:])
    begun = time.monotonic()
    run = subprocess.run(
        command("--num_gpus", 2, "--output_path", out, start=begin),
        cwd=ROOT, env={**os.environ, "SHORT_OF_MEMORY": str(short_of)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == (
        f"error: rank {short_of} of 2: out of memory while denoising (asked for 2.50 GiB). Try, in "
        "this order: --num_gpus 1 --offload blocks, --num_gpus 1 --offload sequential\n"
    )
    assert time.monotonic() - begun < 60, "of which beginning takes most"
    assert list(out.iterdir()) == []


ASK = """
import os, sys
from teacache.command.main import main
from teacache.parallel import launch
launch._end_at_once = sys.exit
try:
    main(["--ckpts_path", "tiny", "--device", "cuda:99"])
finally:
    print(os.environ["PYTORCH_ALLOC_CONF"])
"""


def test_a_rank_that_torchrun_starts_chooses_the_allocator_too():
    variables = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    variables |= {"RANK": "1", "WORLD_SIZE": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", ASK], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "expandable_segments:True\n")
    assert ended.stderr.startswith("error: --device cuda:99: torch finds ")


@pytest.mark.parametrize(
    ("variables", "count", "refused"),
    [
        ({}, 1, True),
        ({"RANK": "0", "WORLD_SIZE": "4"}, 1, False),  # of which each sees its own
        ({"RANK": "0", "WORLD_SIZE": "4"}, 2, True),
        ({}, 4, False),
    ],
)
def test_more_gpus_than_there_are(monkeypatch, variables, count, refused):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    expected = f"^--num_gpus 4: torch finds {count} CUDA GPUs here$"
    with pytest.raises(DeviceError, match=expected) if refused else contextlib.nullcontext():
        check_number(4, torch.device("cuda"))
