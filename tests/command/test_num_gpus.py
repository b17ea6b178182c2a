"""One video on several processes, through the command: what comes of it, and how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support import ROOT

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
    assert ended("--guidance_scale", 1, "--output_path", folder).returncode == 0
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


def test_both_ways_to_share_a_sweep_and_going_on_with_it(tmp_path):
    asked = ("--num_gpus", 4, "--rel_l1_thresh", 0, 0.3, "--output_path", tmp_path)
    run = ended(*asked)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "42_0.3_0000.json").read_text())
    assert record["division"] == "4 GPUs: guidance x2, tokens x2"
    assert record["quality"]["psnr"]["mean"] > 10
    again = ended(*asked, "--resume")  # for which no rank has anything to do
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 2


def test_what_does_not_divide_is_refused_before_anything_is_loaded(tmp_path, capsys):
    refused = {
        ("--num_gpus", "3"): "520 tokens and 6 heads do not divide among so many; 2 and 4 would do",
        ("--num_gpus", "8"): "do not divide among so many; 4 would do",
    }
    for asked, expected in refused.items():
        run = ended(*asked, "--output_path", tmp_path)
        assert run.returncode == 2
        assert expected in run.stderr
        assert run.stderr.count("\n") == 1
        assert "identity" not in run.stdout
    with pytest.raises(SystemExit):
        main(["--latents", str(ROOT / "README.md"), "--num_gpus", "2"])
    assert "--num_gpus: not allowed with argument --latents" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["killed helper", "SIGTERM", "Ctrl-C"])
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
    time.sleep(2)
    ranks = _ranks(run.pid)
    assert len(ranks) == 2
    if how == "killed helper":
        os.kill(max(ranks), signal.SIGKILL)
    elif how == "SIGTERM":
        run.terminate()
    else:
        os.killpg(run.pid, signal.SIGINT)
    asked_at = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - asked_at < 15
    killed = how == "killed helper"
    assert run.returncode == (2 if killed else 130)
    expected = "error: rank 1 of 2 was ended by SIGKILL" if killed else "interrupted"
    assert expected in said.splitlines()
    assert len(said.splitlines()) == 1, said
    assert not [pid for pid in ranks if os.path.exists(f"/proc/{pid}")], "no orphan"
    assert list(tmp_path.iterdir()) == []


def _ranks(parent: int) -> list[int]:
    """The processes that the launcher has started, without the one that tracks resources."""
    children = psutil.Process(parent).children()
    return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]


NO_MEMORY = """
import os

import torch

attend = torch.nn.functional.scaled_dot_product_attention


def no_memory(*args, **kwargs):
    if os.environ.get("RANK") == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")
    return attend(*args, **kwargs)


torch.nn.functional.scaled_dot_product_attention = no_memory
"""


def test_a_rank_that_runs_out_of_memory_ends_all(tmp_path):
    """In the middle of a step, in which the other rank waits for it."""
    (tmp_path / "sitecustomize.py").write_text(NO_MEMORY)
    out = tmp_path / "out"
    begun = time.monotonic()
    run = subprocess.run(
        command("--num_gpus", 2, "--output_path", out),
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr == (
        "error: rank 1 of 2: out of memory while denoising (asked for 2.50 GiB). "
        "No further flag takes less\n"
    )
    assert time.monotonic() - begun < 60, "of which beginning takes most"
    assert list(out.iterdir()) == []
