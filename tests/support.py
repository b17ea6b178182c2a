"""What tests of every kind use: constants, the command within this process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from teacache.checkpoint.size import VideoSize

CPU = torch.device("cpu")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROOT = Path(__file__).parent.parent
SIZE = VideoSize(width=144, height=96, num_frames=13)
PROMPT = "a smiling astronaut stands by the sea"


@contextlib.contextmanager
def handlers_given_back() -> Iterator[dict]:
    """The signals' handlers as before the block: an interrupted command ignores them to its end."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield handlers
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def main(capsys, *arguments: object) -> tuple[int, str, str]:
    """The command within this process: (exit code, standard output, standard error)."""
    from teacache.command.main import main as command

    with handlers_given_back():
        try:
            code = command([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return code, *capsys.readouterr()
