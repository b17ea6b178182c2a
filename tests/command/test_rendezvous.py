"""A launcher's environment without its ranks: who waits says so, and ends when asked to."""

from __future__ import annotations

import signal
import socket
import time

import pytest
from processes import SAMPLE, ended, start
from ranks import free_port

TINY = ("--ckpts_path", "tiny", "--device", "cpu", "--num_infer_steps", 2)


def launched(rank: int, port: int, **changed: str | None) -> dict[str, str | None]:
    """The variables of one rank of two."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return {**variables, "MASTER_PORT": str(port), **changed}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_rank_that_waits_says_for_whom_and_can_be_ended(tmp_path, rank, number):
    process = start(*TINY, "--output_path", tmp_path, env=launched(rank, free_port()))
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
        ({"MASTER_ADDR": None}, "but MASTER_ADDR is not set"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "MASTER_ADDR is not set, MASTER_PORT is not"),
        ({"WORLD_SIZE": "two"}, "but WORLD_SIZE is 'two'"),
        ({"RANK": "-1"}, "but RANK is '-1'"),
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
        run = ended(*TINY, "--output_path", tmp_path, env=variables)
    assert run.returncode == 2
    assert run.stderr.startswith("error: MASTER_ADDR 127.0.0.1, MASTER_PORT ")
    assert run.stderr.count("\n") == 1


def test_one_rank_of_one_needs_no_address(tmp_path):
    """As a notebook or a pod of one leaves it."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": None, "MASTER_PORT": None}
    run = ended(*TINY, "--output_path", tmp_path, "--quiet", env=variables)
    assert (run.returncode, run.stdout) == (0, f"{tmp_path}/42_0.1_0000.mp4\n"), run.stderr


def test_two_ranks_that_somebody_starts_by_hand(tmp_path):
    """The second one comes later than the first has begun to wait."""
    port = free_port()
    first = start(*TINY, "--output_path", tmp_path, "--quiet", env=launched(0, port))
    assert "waits for rank 1" in first.stderr.readline()
    second = start(*TINY, "--output_path", tmp_path, "--quiet", env=launched(1, port))
    output, error = first.communicate(timeout=200)
    assert (first.returncode, output) == (0, f"{tmp_path}/42_0.1_0000.mp4\n"), error
    assert second.communicate(timeout=60)[0] == ""
    assert second.returncode == 0
