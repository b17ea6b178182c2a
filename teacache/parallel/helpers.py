"""The other ranks of a process that no launcher has started: it starts them, and is the first.

A process that is given job after job, as a worker of `teacache.cluster` is, cannot be started
together with its ranks. So it does what torch's launcher would have done: it serves the store by
which ranks find each other, and starts the command as every rank but the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, TypeVar

from torch.distributed import TCPStore

from teacache.base.errors import DeviceError
from teacache.parallel.launch import (
    LOST_THE_OTHERS,
    PATIENCE,
    STARTED_BY,
    cause_of,
    has_lost_the_others,
    why_ended,
)

T = TypeVar("T")

LOOK_EVERY = 0.5  # seconds
HOST = "127.0.0.1"


class Helpers:
    """Every rank but the first, which is this process from now on.

    They end with this process, whatever ends it: see `teacache.parallel.launch.run_as_rank`.

    Args:
        world_size: ranks in all.
        argv: the command's arguments; of its ranks but the first it reads `--device` alone.
    """

    def __init__(self, world_size: int, argv: list[str]):
        self.world_size = world_size
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        self._errors: dict[int, IO[bytes]] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        os.environ |= self._environment(0)
        for rank in range(1, world_size):
            self._errors[rank] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the rank
            self._processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "teacache", *argv],
                env={**os.environ, **self._environment(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors[rank],
            )
        # One thread, so that what a library keeps of its thread stays.
        self._thread = ThreadPoolExecutor(1)

    def watch(self, work: Callable[[], T]) -> T:
        """Do `work` with the other ranks, for as long as all of them are there.

        In a thread, of which nothing more is heard where another rank has ended: on a GPU it may
        wait for that rank for ever.

        Raises:
            DeviceError: naming the rank that has ended, and why.
        """
        future = self._thread.submit(work)
        while not wait([future], timeout=LOOK_EVERY).done:
            self._check()
        try:
            return future.result()
        except RuntimeError as error:
            if not has_lost_the_others(error):
                raise
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:  # the other's end may be seen a little later
                self._check()
                time.sleep(LOOK_EVERY / 10)
            raise DeviceError(f"rank 0 of {self.world_size} lost the others: {error}") from error

    def _check(self) -> None:
        """Raise DeviceError where a rank has ended: none does before this process."""
        codes = {rank: process.poll() for rank, process in self._processes.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if not ended:
            return
        rank, code = cause_of(ended)
        said = self._last_line(rank)
        name = f"rank {rank} of {self.world_size}"
        if code < 0 or code == LOST_THE_OTHERS or not said:
            raise DeviceError(f"{name} {why_ended(code)}")
        raise DeviceError(said if said.startswith(name) else f"{name}: {said}")

    def _last_line(self, rank: int) -> str:
        """Of what a rank has said of its end."""
        self._errors[rank].seek(0)
        lines = self._errors[rank].read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else ""

    def _environment(self, rank: int) -> dict[str, str]:
        """What torch's launcher tells a rank; and where this package is, and who has started it."""
        package = str(Path(__file__).parents[2])
        return {
            STARTED_BY: str(os.getpid()),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": str(True),  # no rank serves the store itself
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        }
