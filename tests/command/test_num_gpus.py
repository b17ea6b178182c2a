"""One video on several processes, through the command: what comes of it, and how it ends."""

import contextlib
import json
import os
import signal
import socket
import time

import psutil
import pytest
import torch
from processes import SAMPLE, ended, start
from ranks import free_port
from support import below, is_alive, refused

from teacache.base.errors import DeviceError
from teacache.preflight.machine import check_number

SMALL = ("--ckpts_path", "tiny", "--device", "cpu", "--num_infer_steps", 10)
SMALL += ("--rel_l1_thresh", 0.2)
SHORT = (*SMALL[:4], "--num_infer_steps", 2)
FORKED = ("tests/forked_ranks.py",)  # three quarters of a rank's CPU time are its imports
TOKENS = (*SMALL, "--guidance_scale", 1)  # which is all there is to share without guidance


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert ended(*TOKENS, "--seed", 1, 2, "--output_path", folder).returncode == 0
    return folder


def check_equal(folder, alone, name):
    """The same bytes as of one process; the record says how they came about."""
    video, other = folder / f"{name}.mp4", alone / f"{name}.mp4"
    assert video.read_bytes() == other.read_bytes()
    record, other = (json.loads(p.with_suffix(".json").read_text()) for p in (video, other))
    assert (record["num_gpus"], record["ranks"]) == (2, "2 ranks: tokens x2")
    assert (other["num_gpus"], other["ranks"]) == (1, None)
    assert record["computed_steps"] == other["computed_steps"]


def test_shared_tokens_give_the_same_bytes(tmp_path, alone):
    """Two videos; once more, for which no rank has anything to do."""
    asked = (*TOKENS, "--num_gpus", 2, "--seed", 1, 2, "--output_path", tmp_path)
    run = ended(*asked)
    assert run.returncode == 0, run.stderr
    for name in ("1_0.2_0000", "2_0.2_0000"):
        check_equal(tmp_path, alone, name)
    again = ended(*asked, "--resume", program=FORKED)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 2


def test_torchrun_gives_the_same_bytes(tmp_path, alone):
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "teacache_sample_video.py")
    asked = (*TOKENS, "--seed", 1, "--output_path", tmp_path)
    run = ended(*torchrun[2:], *asked, program=torchrun[:2])
    assert run.returncode == 0, run.stderr
    assert "on 2 ranks: tokens x2" in run.stdout
    check_equal(tmp_path, alone, "1_0.2_0000")


def test_what_does_not_divide_is_refused_before_any_rank_begins(capsys, tmp_path, monkeypatch):
    monkeypatch.delattr("torch.distributed.launcher.api.elastic_launch")
    out = tmp_path / "out"
    error = refused(capsys, "--ckpts_path", "tiny", "--num_gpus", 8, "--output_path", out)
    told = "520 tokens and 6 heads cannot be divided among 8 GPUs: use 4"
    assert error == f"error: --num_gpus 8: {told}"
    assert not out.exists()


def test_bad_input_that_the_first_rank_finds_ends_all(tmp_path):
    asked = (*SMALL, "--num_gpus", 2, "--image", "README.md", "--output_path", tmp_path)
    run = ended(*asked, program=FORKED)
    assert run.returncode == 2
    assert run.stderr.startswith("error: --image README.md is no image")
    assert run.stderr.count("\n") == 1
    assert "identity" not in run.stdout


@pytest.mark.parametrize(
    ("to", "number", "code", "said"),
    [
        ("a rank", signal.SIGKILL, 2, "error: rank 1 of 2 was ended by SIGKILL\n"),
        ("the launcher", signal.SIGKILL, -signal.SIGKILL, ""),
        ("the launcher", signal.SIGTERM, 130, "interrupted\n"),
        ("all", signal.SIGINT, 130, "interrupted\n"),  # a terminal's Ctrl-C
    ],
)
def test_endings(tmp_path, to, number, code, said):
    asked = (*SMALL, "--num_gpus", 2, "--num_infer_steps", 500, "--rel_l1_thresh", 0)
    begun_anew = to == "all" or (to, number) == ("the launcher", signal.SIGKILL)
    program = SAMPLE if begun_anew else FORKED
    run = start(*asked, "--output_path", tmp_path, program=program, start_new_session=True)
    while "encoding" not in (line := run.stdout.readline()):  # then it denoises, for half a minute
        assert line, run.stderr.read()
    time.sleep(1)
    # A fork of the server, or, where a test has changed its environment, of `forked_ranks.py`.
    ranks = below(run.pid, "spawn_main" if begun_anew else "fork")
    assert len(ranks) == 2
    if begun_anew:
        chosen = {psutil.Process(pid).environ().get("PYTORCH_ALLOC_CONF") for pid in ranks}
        assert chosen == {"expandable_segments:True"}, "before torch is imported"
    send = os.killpg if to == "all" else os.kill
    send(max(ranks) if to == "a rank" else run.pid, number)
    asked_at = time.monotonic()
    _, error = run.communicate(timeout=60)
    assert time.monotonic() - asked_at < 25, "torch kills after 30"
    assert (run.returncode, error) == (code, said)
    assert not [pid for pid in ranks if is_alive(pid)], "no orphan"
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_runs_out_of_memory_ends_all(tmp_path):
    """In the middle of a step, in which the other rank waits for it."""
    run = ended(
        *(*SMALL, "--num_gpus", 2, "--output_path", tmp_path),
        program=FORKED,
        env={"SHORT_OF_MEMORY": "1"},
    )
    assert run.returncode == 2
    assert run.stderr == (
        "error: rank 1 of 2: out of memory while denoising (asked for 2.50 GiB). Try, in "
        "this order: --num_gpus 1 --offload blocks, --num_gpus 1 --offload sequential\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_torchrun_starts_chooses_the_allocator_too():
    """Before torch is imported: it ends for want of the GPU that it is asked for."""
    program = "import atexit, os, runpy, sys; from teacache.parallel import launch\n"
    program += "launch._end_at_once = sys.exit\n"
    program += "atexit.register(lambda: print(os.environ['PYTORCH_ALLOC_CONF']))\n"
    program += "runpy.run_path('teacache_sample_video.py', run_name='__main__')"
    variables = {"RANK": "1", "WORLD_SIZE": "2", "PYTORCH_ALLOC_CONF": None}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    run = ended(
        "--ckpts_path", "tiny", "--device", "cuda:99", program=("-c", program), env=variables
    )
    assert (run.returncode, run.stdout) == (2, "expandable_segments:True\n")
    assert run.stderr.startswith("error: --device cuda:99: torch finds ")


@pytest.mark.parametrize(("torchrun", "count"), [(False, 1), (False, 4), (True, 1), (True, 2)])
def test_more_gpus_than_there_are(monkeypatch, torchrun, count):
    """Each rank of torchrun's sees its own."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "4"}.items() if torchrun else ():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    expected = f"^--num_gpus 4: torch finds {count} CUDA GPUs here$"
    enough = count == (1 if torchrun else 4)
    with contextlib.nullcontext() if enough else pytest.raises(DeviceError, match=expected):
        check_number(4, torch.device("cuda"))


def launched(rank: int, port: int, **changed: str | None) -> dict[str, str | None]:
    """The variables of one rank of two."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return {**variables, "MASTER_PORT": str(port), **changed}


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_rank_that_waits_says_for_whom_and_can_be_ended(tmp_path, rank, number):
    process = start(*SHORT, "--output_path", tmp_path, env=launched(rank, free_port()))
    line = process.stderr.readline()
    assert line.startswith(f"rank {rank} of 2 waits for rank {1 - rank}: RANK, WORLD_SIZE, ")
    assert line.endswith("To sample alone, unset RANK\n")
    begun = time.monotonic()
    process.send_signal(number)
    assert process.wait(20) == 130
    assert time.monotonic() - begun < 10
    assert process.stderr.read() == ("interrupted\n" if rank == 0 else "")


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "MASTER_ADDR is not set, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "but WORLD_SIZE is 'two'"),
        ({"RANK": "2"}, "but RANK is 2 and WORLD_SIZE 2"),
        ({"MASTER_PORT": "http"}, "but MASTER_PORT is 'http'"),
    ],
)
@pytest.mark.parametrize("program", [SAMPLE, ("-m", "teacache.benchmark")])
def test_variables_that_make_no_sense_are_one_line(tmp_path, program, changed, complaint):
    words = ("--device", "cpu", "--output_path", tmp_path / "out")
    run = ended(*words, program=program, env=launched(0, 1, **changed), timeout=60)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert complaint in run.stderr
    assert run.stderr.endswith("To sample alone, unset RANK\n")


def test_a_port_that_another_program_has(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        variables = launched(0, server.getsockname()[1])
        run = ended(*SHORT, "--output_path", tmp_path, env=variables)
    assert run.returncode == 2
    assert run.stderr.startswith("error: MASTER_ADDR 127.0.0.1, MASTER_PORT ")
    assert run.stderr.count("\n") == 1


def test_one_rank_of_one_needs_no_address(tmp_path):
    """As a notebook or a pod of one leaves it."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": None, "MASTER_PORT": None}
    run = ended(*SHORT, "--output_path", tmp_path, "--quiet", env=variables)
    assert (run.returncode, run.stdout) == (0, f"{tmp_path}/42_0.1_0000.mp4\n"), run.stderr


def test_two_ranks_that_somebody_starts_by_hand(tmp_path):
    """The second one comes later than the first has begun to wait."""
    port = free_port()
    first = start(*SHORT, "--output_path", tmp_path, "--quiet", env=launched(0, port))
    assert "waits for rank 1" in first.stderr.readline()
    second = start(*SHORT, "--output_path", tmp_path, "--quiet", env=launched(1, port))
    output, error = first.communicate(timeout=200)
    assert (first.returncode, output) == (0, f"{tmp_path}/42_0.1_0000.mp4\n"), error
    assert second.communicate(timeout=60)[0] == ""
    assert second.returncode == 0
