"""What a run tells: its stages as they pass, its record, its summary."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teacache import interruption

if TYPE_CHECKING:
    from teacache.handle import TeaCacheHandle
    from teacache.policy import Schedule


def print_now(line: str) -> None:
    """Print at once, also into a pipe, where a run of minutes would otherwise stay silent.

    Where nobody reads any more, as behind `| head`, the run goes on.
    """
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


class Stages:
    """Times the stages of a run, and says a line as each one ends.

    Args:
        say: takes the line.
        shared: the stages that a run of several videos has gone through before them all: their
            seconds are in each video's.

    Attributes:
        seconds: seconds of each stage that has ended, in their order.
        under_way: the stage that is not over, or that an error has ended; of a run of several
            videos it is told to the shared stages too.
    """

    def __init__(self, say: Callable[[str], None], shared: Stages | None = None):
        self.seconds: dict[str, float] = dict(shared.seconds) if shared else {}
        self.under_way: str | None = None
        self._say, self._shared = say, shared
        self._start = time.perf_counter()
        self._already = sum(self.seconds.values())

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as the stage `name`."""
        interruption.check()
        start = time.perf_counter()
        self.under_way = name
        if self._shared:
            self._shared.under_way = name
        yield
        interruption.check()
        self.seconds[name] = time.perf_counter() - start
        self._say(f"{name:<12}{self.seconds[name]:8.1f} s")

    def with_total(self) -> dict[str, float]:
        """The seconds of each stage so far, and their `total` with what lay between them."""
        total = self._already + time.perf_counter() - self._start
        seconds = {**self.seconds, "total": total}
        return {name: round(value, 3) for name, value in seconds.items()}


@contextlib.contextmanager
def denoising_bar(
    num_infer_steps: int, handle: TeaCacheHandle, quiet: bool
) -> Iterator[Callable[[], None]]:
    """A progress bar that counts computed and reused steps; nothing where stderr is no terminal."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    with (
        tqdm(total=num_infer_steps, desc="denoising", leave=False, disable=quiet or None) as bar,
        logging_redirect_tqdm([logging.getLogger("teacache")]),  # warnings above the bar
    ):

        def on_step() -> None:
            interruption.check()
            done = handle.schedule
            counts = {"computed": len(done.computed_steps), "reused": len(done.reused_steps)}
            bar.set_postfix(counts, refresh=False)
            bar.update()

        yield on_step


def build_record(
    settings: dict[str, object],
    schedule: Schedule,
    step_seconds: list[float],
    seconds: dict[str, float],
    device_name: str,
    peak_memory_bytes: int,
) -> dict[str, object]:
    """The record of one video: its settings under their arguments' names, and what happened.

    Distances that are not finite become null, which JSON can hold; their steps are among the
    `extrapolated_steps`.

    Args:
        step_seconds: of each denoising step; their medians go on record.
    """
    return {
        **settings,
        "computed_steps": schedule.computed_steps,
        "reused_steps": schedule.reused_steps,
        "distances": [_finite(x) for x in schedule.distances],
        "rescaled": [_finite(x) for x in schedule.rescaled],
        "extrapolated_steps": schedule.extrapolated_steps,
        "why_nothing_was_reused": schedule.why_nothing_was_reused(),
        "computed_step_seconds": _median(step_seconds, schedule.computed_steps),
        "reused_step_seconds": _median(step_seconds, schedule.reused_steps),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes,
        "device_name": device_name,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that figures and bits depend on most."""
    packages = ("torch", "diffusers", "transformers")
    return {package: importlib.metadata.version(package) for package in packages}


def write_record(record: dict[str, object], path: Path) -> None:
    """Write a record as JSON, a line for each key."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in record.items()
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def summary(video: Path, record: dict[str, object]) -> str:
    """The lines that end the run of one video."""
    computed, reused = len(record["computed_steps"]), len(record["reused_steps"])
    lines = [
        f"video       {video}",
        f"steps       {computed} computed, {reused} reused of {computed + reused}",
        f"seconds     {record['seconds']['total']:.1f}",
        f"peak memory {record['peak_memory_bytes'] / 2**30:.1f} GiB ({record['device_name']})",
    ]
    psnr = record.get("quality", {}).get("psnr")
    if psnr and psnr["mean"] is not None:
        lines.insert(2, f"PSNR        {psnr['mean']:.1f} dB, worst frame {psnr['worst']:.1f}")
    if record["approximations"]:
        lines.insert(2, f"not exact   {', '.join(record['approximations'])}")
    if record["why_nothing_was_reused"]:
        lines.insert(2, f"            nothing was reused: {record['why_nothing_was_reused']}")
    return "\n".join(lines)


def _median(seconds: list[float], steps: list[int]) -> float | None:
    return round(statistics.median(seconds[step] for step in steps), 6) if steps else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
