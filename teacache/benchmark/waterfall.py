"""The picture of the floors: what is left of a video's seconds after each acceleration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from teacache.benchmark.floor import Row, Settings

WIDE, HIGH, DPI = 8.0, 3.6, 100  # inches
LEFT, SAVED, FOUND = "#33658a", "#c9d6df", "#c1440e"


class Bar(NamedTuple):
    """Seconds of denoising a video: by arithmetic, and by a measured step where there is one."""

    name: str
    floor: float
    measured: float | None = None


def draw(
    rows: list[Row], measured: dict[Settings, float], computed: int, steps: int, path: Path
) -> None:
    """Draw it as a PNG.

    Args:
        measured: seconds of a computed step.
        computed, steps: as `Row.video` has them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE, HIGH), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = bars_of(rows, measured, computed, steps)
    before = bars[0].floor
    for place, bar in enumerate(bars):
        axes.bar(place, bar.floor, color=LEFT)
        axes.bar(place, before - bar.floor, bottom=bar.floor, color=SAVED)
        axes.text(place, bar.floor / 2, f"{bar.floor:.0f}", color="white", ha="center", va="center")
        if bar.measured:
            axes.hlines(bar.measured, place - 0.4, place + 0.4, color=FOUND)
        before = bar.floor
    axes.set_xticks(range(len(bars)), [bar.name for bar in bars])
    axes.set_ylabel("seconds, at least")
    axes.set_title(f"Denoising on an H100, computed; {steps} steps, 49 frames of 720x480")
    if any(bar.measured for bar in bars):
        axes.plot([], [], color=FOUND, label="measured")
        axes.legend()
    figure.savefig(path)


def bars_of(
    rows: list[Row], measured: dict[Settings, float], computed: int, steps: int
) -> list[Bar]:
    """The plain pipeline's video, and what is left of it; reuse by itself before all else."""
    plain, *ours = rows
    reuse = plain._replace(reused=ours[0].reused)
    bars = [
        Bar(f"plain,\n{steps} steps", plain.video(steps, steps)),
        Bar(f"{computed} of them\ncomputed", reuse.video(computed, steps)),
        Bar("TeaCache's\nforward", ours[0].video(computed, steps)),
        *(Bar(row.name.replace("`", ""), row.video(computed, steps)) for row in ours[1:]),
    ]
    found = [
        row._replace(computed=measured[row.settings]).video(computed, steps)
        if row.settings in measured
        else None
        for row in (plain, reuse, *ours)
    ]
    return [bar._replace(measured=seconds) for bar, seconds in zip(bars, found, strict=True)]
