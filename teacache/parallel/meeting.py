"""Waiting for the other ranks, where torch would wait for them in C++ and hear no signal."""

import contextlib
import datetime
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist

from teacache.base import interruption
from teacache.base.errors import DeviceError, reason
from teacache.parallel.launch import INTERRUPTED, is_of_another_launcher, rank, world_size


def meet() -> dist.Store:
    """The store of all ranks, once all of them are there.

    Ctrl-C and SIGTERM end a rank that waits. Later only rank 0 is interrupted, and ends the others.

    Raises:
        DeviceError: where rank 0 cannot open MASTER_PORT, or something else answers there.
    """
    store: dist.Store | None = None
    explain_at = time.monotonic() + 10.0
    with _ending_by_signals() if rank() > 0 else contextlib.nullcontext():
        while True:
            interruption.check()
            store = store or _reach()
            ranks = [f"rank {other}" for other in range(world_size())]
            missing = [other for other in ranks if not store.check([other])] if store else ranks[:1]
            if store and not missing:
                return store
            if time.monotonic() > explain_at and (rank() == 0 or is_of_another_launcher()):
                print(
                    f"rank {rank()} of {world_size()} waits for {', '.join(missing)}: RANK, "
                    "WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set, as torchrun sets them. To "
                    "sample alone, unset RANK",
                    file=sys.stderr,
                    flush=True,
                )
                explain_at = float("inf")
            time.sleep(0.05)


def _reach() -> dist.Store | None:
    """Rank 0's store, or None where it does not answer yet."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torch's launcher has one
    opens = rank() == 0 and not agents
    try:
        if not opens:  # torch would write an error of its own for each try
            socket.create_connection((host, port), timeout=1.0).close()
        answer = datetime.timedelta(seconds=20)  # by then what answers shows to be a store
        store = dist.TCPStore(host, port, is_master=opens, timeout=answer, wait_for_workers=False)
    except dist.DistError as error:
        raise DeviceError(f"MASTER_ADDR {host}, MASTER_PORT {port}: {reason(error)}") from error
    except OSError:
        return None
    store.set_timeout(dist.default_pg_timeout)
    shared = dist.PrefixStore("teacache", store)
    shared.set(f"rank {rank()}", "")
    return shared


@contextlib.contextmanager
def _ending_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end this process within the block."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: os._exit(INTERRUPTED)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
