"""One process for each GPU by torch's elastic launcher, and one exit code for all of them."""

from __future__ import annotations

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

# Of a process that ends because another one has: not the one to speak of.
LOST_THE_OTHERS = 3
PATIENCE = 3.0  # seconds, in which whoever has started it sees the other's end first
INTERRUPTED = 130
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torch's launcher
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h

_launched = False  # whether `launch` has started this process, and says how all of them end


def is_one_of_several() -> bool:
    """Whether torch's launcher has started this process, by `--num_gpus` or as torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_of_another_launcher() -> bool:
    """Whether this process is one of several that `launch` has not started, as torchrun's are."""
    return is_one_of_several() and not _launched


def check_variables() -> None:
    """Raise ArgumentError where the variables of a launcher are incomplete or no numbers."""
    found = {name: os.environ.get(name, "") for name in VARIABLES}
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
    """How many processes the launcher has started."""
    return int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Which of them this is; the first is the command."""
    return int(os.environ.get("RANK", "0"))


def launch(processes: int, main: Callable[[list[str] | None], int], argv: list[str] | None) -> int:
    """Run `main` in as many processes, one for each GPU; the first one is the command.

    Where one of them ends badly, the others are ended too, and one line says which and why.

    Returns:
        the command's exit code, or 2 where another process failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # each process says itself what is wrong
    # Of what a process has left that was ended, Python clears up and warns.
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
    """Run `work` as one of several ranks. Returns 0; where it fails it ends the process.

    Args:
        helping: whether this is not the first, which alone speaks and cleans up. The others may be
            ended at any moment: by SIGTERM at once, and not by Ctrl-C, of which the first is told.
            All end with the process that has started them: the first by SIGTERM, the others by
            SIGKILL, as a rank that waits for another on a GPU hears nothing else.
    """
    try:
        _end_with_parent(signal.SIGKILL if helping else signal.SIGTERM)
        if helping:
            code = _work_as_helper(work)
        else:
            code = interruption.run_command(work, "" if _launched else "interrupted")
    except RuntimeError as error:
        if not has_lost_the_others(error):
            raise
        code = LOST_THE_OTHERS
        time.sleep(PATIENCE)
    if code:
        _end_at_once(code)
    atexit.register(_end_at_once, 0)  # after torch's launcher has heard of the end
    return 0


def _end_at_once(code: int) -> NoReturn:
    """End without Python's finalisation, in which a thread that leaves torch's C++ code aborts."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _work_as_helper(work: Callable[[], None]) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("teacache").setLevel(logging.ERROR)  # the first rank warns
    try:
        work()
    except TeaCacheError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _end_with_parent(number: signal.Signals) -> None:
    """Have the system end this process when the one that has started it is gone, as it may be."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, number)


def has_lost_the_others(error: RuntimeError) -> bool:
    """Whether another rank has ended in the middle of something that all do together."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


def _explain(codes: dict[int, int], processes: int) -> int:
    """Say which process failed where it could not do so itself; return the exit code of all.

    Args:
        codes: the exit codes of those that failed, by rank; of a signal negative.
    """
    rank, code = cause_of(codes)
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr, flush=True)
    if code > 0 and code != LOST_THE_OTHERS:
        return code
    print(f"error: rank {rank} of {processes} {why_ended(code)}", file=sys.stderr, flush=True)
    return 2


def cause_of(codes: dict[int, int]) -> tuple[int, int]:
    """The rank that ended first, as far as exit codes tell, and its own."""
    consequences = (LOST_THE_OTHERS, -signal.SIGTERM, INTERRUPTED)
    causes = {rank: code for rank, code in codes.items() if code not in consequences} or codes
    return min(causes.items())


def why_ended(code: int) -> str:
    """What became of a rank that could not say so itself."""
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return "lost the others" if code == LOST_THE_OTHERS else f"ended with exit code {code}"


def _exit_with(main: Callable[[list[str] | None], int], argv: list[str] | None) -> None:
    global _launched
    _launched = True
    try:
        code = main(argv)
    except Exception:
        traceback.print_exc()  # else torch keeps it in a file
        code = 1
    sys.exit(code)
