"""What a run prints: its stages as they pass, a bar while it denoises, lines for the user."""

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

# Of a run, in their order. What to do where memory runs out in one, `teacache.command.memory` says.
Stage = Literal[
    "checkpoint",
    "torch",
    "image",
    "download",
    "schedule",
    "diffusers",
    "identity",
    "text",
    "loading",
    "compiling",
    "encoding",
    "denoising",
    "decoding",
    "writing",
    "quality",
]


def print_now(line: str) -> None:
    """Print at once, also into a pipe, where a run of minutes would otherwise stay silent.

    Where nobody reads any more, as behind `| head`, the run goes on.
    """
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


class Console:
    """Standard output, and what is under way.

    Args:
        quiet: print nothing but the videos' paths.

    Attributes:
        under_way: the stage that is not over, or that an error has ended.
    """

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.under_way: Stage | None = None

    def say(self, line: str) -> None:
        """A line for the user; nothing where it is quiet."""
        if not self.quiet:
            print_now(line)

    def done(self, video: Path, summary: str) -> None:
        """A finished video: its path alone where it is quiet, else the summary."""
        print_now(str(video) if self.quiet else summary)

    @contextlib.contextmanager
    def bar(
        self, steps: int, counts: Callable[[], dict[str, int]] = dict, what: str = "denoising"
    ) -> Iterator[Callable[[], None]]:
        """A progress bar over denoising steps; nothing where standard error is no terminal.

        Args:
            counts: what it shows beside, after each step.
            what: the steps are of.

        Yields:
            the function to call after each step.
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
    """Times the stages of a run, or of one of its videos, and says a line as each one ends.

    Args:
        shared: the stages that a run of several videos has gone through before them all: their
            seconds are in each video's.

    Attributes:
        seconds: of each stage that has ended, in their order.
    """

    def __init__(self, console: Console, shared: Stages | None = None):
        self.seconds: dict[str, float] = dict(shared.seconds) if shared else {}
        self._console = console
        self._start = time.perf_counter()
        self._before = sum(self.seconds.values())

    @contextlib.contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time the block as a stage."""
        interruption.check()
        start = time.perf_counter()
        self._console.under_way = name
        yield
        interruption.check()
        self.seconds[name] = time.perf_counter() - start
        self._console.say(f"{name:<12}{self.seconds[name]:8.1f} s")

    def include(self, seconds: dict[str, float]) -> None:
        """Count what an earlier run has taken for the same video, as `with_total` returned it."""
        earlier = dict(seconds)
        self._before += earlier.pop("total")
        self.seconds = {**earlier, **self.seconds}

    def with_total(self) -> dict[str, float]:
        """The seconds of each stage so far, and their `total` with what lay between them."""
        total = self._before + time.perf_counter() - self._start
        seconds = {**self.seconds, "total": total}
        return {name: round(value, 3) for name, value in seconds.items()}
