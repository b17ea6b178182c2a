"""The other ranks of a video, started by a process that no launcher has started: a Ray worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile

from teacache.base.errors import DeviceError

PARENT = "TEACACHE_PARENT"  # the process that a helper ends with, in its environment
PATIENCE = 5.0  # seconds, in which a process that another one has lost has ended


class LostHelperError(DeviceError):
    """A rank has ended, and with it what all ranks do together: the process is of no more use."""


class Helpers:
    """Ranks 1 and up of this process, which becomes rank 0 of `ranks`. They end when it does.

    Args:
        device: as `--device` has it; of several GPUs that are visible here each takes its own.
    """

    def __init__(self, ranks: int, device: str):
        self._ranks = ranks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in group.items()}, RANK="0")
        self._said = [
            tempfile.TemporaryFile()  # noqa: SIM115 - until this process ends
            for _ in range(1, ranks)
        ]
        command = [sys.executable, "-m", "teacache", "--device", device, "--quiet"]
        self._processes = []
        for rank, said in enumerate(self._said, start=1):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
            process = subprocess.Popen(
                command,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
            self._processes.append(process)

    def lost(self) -> LostHelperError | None:
        """Which rank has ended and why, in one line; None where all go on."""
        for rank, (process, said) in enumerate(zip(self._processes, self._said, strict=True), 1):
            try:
                code = process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            why = lines[-1].removeprefix("error: ") if lines else f"ended with code {code}"
            if code < 0:
                why = f"was ended by {signal.Signals(-code).name}"
            name = f"rank {rank} of {self._ranks}"
            return LostHelperError(why if why.startswith(name) else f"{name} {why}")
        return None


def end_with_parent() -> None:
    """Let Linux end this process, where it is a helper, with the one that has started it."""
    parent = os.environ.get(PARENT)
    if parent is None or sys.platform != "linux":
        return
    from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if os.getppid() != int(parent):  # it had ended before
        os.kill(os.getpid(), signal.SIGKILL)
