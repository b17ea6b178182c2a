"""Starts one process for each GPU by torch's elastic launcher, and determines the exit code."""

import atexit
import ctypes
import logging
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from typing import NoReturn

from teacache.base import interruption
from teacache.base.errors import ArgumentError, TeaCacheError

# Exit code of a rank that failed only because another rank ended.
LOST_OTHER_RANKS = 3
INTERRUPTED = 130

_launched = False  # whether `launch` has started this process


def is_one_of_several() -> bool:
    """Whether torch's launcher has started this process, by `--num_gpus` or torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_of_another_launcher() -> bool:
    """Whether this process is one of several that `launch` did not start, such as torchrun's."""
    return is_one_of_several() and not _launched


def check_variables() -> None:
    """Raise ArgumentError where the variables of a launcher are incomplete or no numbers."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torch's launcher
    found = {name: os.environ.get(name, "") for name in names}
    alone = found["WORLD_SIZE"] == "1"
    wrong = [
        f"{name} is {value!r}" if value else f"{name} is not set"
        for name, value in found.items()
        if not (value if name == "MASTER_ADDR" else value.isdecimal())
        and not (alone and name.startswith("MASTER"))
    ]
    if not wrong and int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        wrong = [f"RANK is {found['RANK']} and WORLD_SIZE {found['WORLD_SIZE']}"]
    if wrong:
        raise ArgumentError(
            f"RANK and WORLD_SIZE are set, as torchrun sets them, but {', '.join(wrong)}. "
            "To sample alone, unset RANK"
        )


def world_size() -> int:
    """Number of processes."""
    return int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Number of this process, from 0. Rank 0 runs the command."""
    return int(os.environ.get("RANK", "0"))


def launch(processes: int, main: Callable[[list[str] | None], int], argv: list[str] | None) -> int:
    """Run `main` in several processes, one for each GPU.

    If one of them fails, the others are ended, and one line names the rank and the reason.

    Returns:
        the exit code of rank 0, or 2 if another rank failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # each process prints its own errors
    # Python warns about resources of a process that was killed.
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker:UserWarning"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, _exit_with)(main, argv)
    except SignalException:
        return _explain({0: INTERRUPTED}, processes)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _explain(codes, processes)
    return 0


def run_as_rank(work: Callable[[], None], helping: bool) -> int:
    """Run `work` as one of several ranks. Returns 0; if it fails, it ends the process.

    Args:
        helping: whether this is not rank 0. Only rank 0 prints and cleans up, on Ctrl-C or SIGTERM.
            The others ignore Ctrl-C, and end at once on SIGTERM. When the launcher dies, the system
            sends SIGTERM to rank 0 and SIGKILL to the others, because a rank that waits on a GPU
            does not handle SIGTERM.
    """
    try:
        if sys.platform == "linux":
            death_signal = signal.SIGKILL if helping else signal.SIGTERM
            ctypes.CDLL(None).prctl(1, death_signal)  # 1: PR_SET_PDEATHSIG of linux/prctl.h
        if helping:
            code = _run_as_helper(work)
        else:
            code = interruption.run_command(work, "" if _launched else "interrupted")
    except RuntimeError as error:
        from torch.distributed import DistError  # not before `prepare_environment`

        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        code = LOST_OTHER_RANKS
        time.sleep(3.0)  # so that the launcher sees the other's end first
    if code:
        _end_at_once(code)
    atexit.register(_end_at_once, 0)  # after torch's launcher has reported the end
    return 0


def _run_as_helper(work: Callable[[], None]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("teacache").setLevel(logging.ERROR)  # rank 0 prints the warnings
    try:
        work()
    except TeaCacheError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _end_at_once(code: int) -> NoReturn:
    """End without Python's finalisation, in which a thread of torch may abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(codes: dict[int, int], processes: int) -> int:
    """Print which rank failed, unless it has printed an error itself; return the exit code.

    codes: exit codes of the ranks that failed; negative for a signal.
    """
    consequences = (LOST_OTHER_RANKS, -signal.SIGTERM, INTERRUPTED)
    causes = {rank: code for rank, code in codes.items() if code not in consequences} or codes
    rank, code = min(causes.items())
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr, flush=True)
    if code > 0 and code != LOST_OTHER_RANKS:
        return code
    reason = "lost the others" if code > 0 else f"was ended by {signal.Signals(-code).name}"
    print(f"error: rank {rank} of {processes} {reason}", file=sys.stderr, flush=True)
    return 2


def _exit_with(main: Callable[[list[str] | None], int], argv: list[str] | None) -> None:
    global _launched
    _launched = True
    try:
        code = main(argv)
    except Exception:
        traceback.print_exc()  # torch would write it to a file
        code = 1
    sys.exit(code)
