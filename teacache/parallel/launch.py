"""One process for each GPU by torch's elastic launcher, and one exit code for all of them."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
import uuid
from collections.abc import Callable

# Of a process that ends because another one has: not the one to speak of.
LOST_THE_OTHERS = 3


def launch(processes: int, main: Callable[[list[str] | None], int], argv: list[str] | None) -> int:
    """Run `main` in as many processes, each of which sees one GPU; the first one is the command.

    Where one of them ends badly, the others are ended too, and one line says which and why.

    Returns:
        the command's exit code, or 2 where another process failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # each process says itself what is wrong
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.2,
        virtual_local_rank=True,
    )
    try:
        elastic_launch(config, _exit_with)(main, argv)
    except SignalException:
        return 130
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _explain(codes, processes)
    return 0


def _explain(codes: dict[int, int], processes: int) -> int:
    """Say which process failed where it could not do so itself; return the exit code of all.

    Args:
        codes: the exit codes of those that failed, by rank; of a signal negative.
    """
    consequences = (LOST_THE_OTHERS, -signal.SIGTERM)
    causes = {rank: code for rank, code in codes.items() if code not in consequences} or codes
    rank, code = min(causes.items())
    if code > 0:
        return code if code != LOST_THE_OTHERS else 2
    name = signal.Signals(-code).name
    print(f"error: rank {rank} of {processes} was ended by {name}", file=sys.stderr, flush=True)
    return 2


def _exit_with(main: Callable[[list[str] | None], int], argv: list[str] | None) -> None:
    try:
        code = main(argv)
    except Exception:
        traceback.print_exc()  # else torch keeps it in a file
        code = 1
    sys.exit(code)
