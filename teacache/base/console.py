"""What a run prints: the stages with their seconds, a progress bar, lines for the user."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from teacache.base import interruption

# The stages of a run, in order. `teacache.run.memory` advises flags by the stage.
Stage = Literal[
    "checkpoint", "torch", "image", "download", "schedule", "diffusers", "identity", "text",
    "loading", "compiling", "encoding", "denoising", "decoding", "writing", "quality",
]  # fmt: skip


def print_now(line: str) -> None:
    """Print and flush: a pipe would otherwise show nothing for minutes.

    If nobody reads the pipe any more, as behind `| head`, the run continues without output.
    """
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


class Console:
    """Standard output, and the current stage, or that in which an error was raised.

    Args:
        quiet: print only the paths of the videos.
    """

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.stage: Stage | None = None

    def say(self, line: str) -> None:
        """Print a line for the user, unless quiet."""
        if not self.quiet:
            print_now(line)

    def done(self, video: Path, summary: str) -> None:
        """Report a finished video: only its path if quiet, else the summary."""
        print_now(str(video) if self.quiet else summary)

    @contextlib.contextmanager
    def bar(
        self, steps: int, counts: Callable[[], dict[str, int]] = dict, what: str = "denoising"
    ) -> Iterator[Callable[[], None]]:
        """A progress bar over denoising steps, if standard error is a terminal.

        Yields:
            the function to call after each step. It shows the numbers that `counts` returns.
        """
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        with (
            tqdm(total=steps, desc=what, leave=False, disable=self.quiet or None) as bar,
            logging_redirect_tqdm([logging.getLogger("teacache")]),  # warnings above the bar
        ):

            def on_step() -> None:
                interruption.check()
                bar.set_postfix(counts(), refresh=False)
                bar.update()

            yield on_step


class Stages:
    """Measures the `seconds` of each stage, in order, and prints a line at the end of each.

    Args:
        shared: the stages that several videos of a run share. Their seconds are included.
    """

    def __init__(self, console: Console, shared: Stages | None = None):
        self.seconds: dict[str, float] = dict(shared.seconds) if shared else {}
        self.console = console
        self._start = time.perf_counter()
        self._before = sum(self.seconds.values())

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Run the block as a stage."""
        interruption.check()
        start = time.perf_counter()
        self.console.stage = name
        yield
        interruption.check()
        self.seconds[name] = time.perf_counter() - start
        self.console.say(f"{name:<12}{self.seconds[name]:8.1f} s")

    def include(self, seconds: dict[str, float]) -> None:
        """Add the seconds of an earlier run for the same video, as `with_total` returns them."""
        earlier = dict(seconds)
        self._before += earlier.pop("total")
        self.seconds = {**earlier, **self.seconds}

    def with_total(self) -> dict[str, float]:
        """The seconds of each stage so far, and the `total`, which includes the time between."""
        total = self._before + time.perf_counter() - self._start
        seconds = {**self.seconds, "total": total}
        return {name: round(value, 3) for name, value in seconds.items()}
