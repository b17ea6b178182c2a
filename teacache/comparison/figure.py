"""The figure of a sweep: the schedules, and curves of latency and PSNR."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.comparison.tables import Row, name, title
from teacache.results.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPUTED, REUSED, EDGE = "#1f5fa8", "#ffffff", "#9aa7b5"


def draw_sweep(rows: list[Row], records: list[Record], path: Path) -> None:
    """Draw the figure as a PNG, 1200 pixels wide, of rows and records of the same videos."""
    # Not pyplot, which would choose a window system and keep every figure in memory.
    from matplotlib.figure import Figure

    height = max(3.6, 1.4 + 0.32 * len(rows))
    figure = Figure(figsize=(12, height), dpi=100, layout="constrained")
    cells, latency, psnr = figure.subplots(1, 3, width_ratios=[5, 2, 2])
    _draw_schedules(cells, rows, records)
    seconds = [row["latency"] for row in rows]
    _draw_curve(latency, rows, [row["computed"] for row in rows], seconds)
    latency.set(xlabel="computed steps", ylabel="seconds a video")
    latency.set_title("latency", loc="left", fontsize=10)
    latency.set_ylim(bottom=0)
    decibels = [row["quality"].get("psnr", {}).get("mean") for row in rows]
    _draw_curve(psnr, rows, seconds, decibels)
    psnr.set(xlabel="seconds a video", ylabel="PSNR, dB")
    psnr.set_title("nearness to threshold 0", loc="left", fontsize=10)
    figure.savefig(path)


def _draw_schedules(axes: Axes, rows: list[Row], records: list[Record]) -> None:
    from matplotlib.patches import Patch, Rectangle

    names = []
    for y, (row, record) in enumerate(zip(rows, records, strict=True)):
        computed = set(record.computed_steps)
        for step in range(row["steps"]):
            colour = COMPUTED if step in computed else REUSED
            axes.add_patch(Rectangle((step, y + 0.12), 1, 0.76, fc=colour, ec=EDGE, lw=0.6))
        # The name of a schedule without a threshold has it.
        number = "" if row["rel_l1_thresh"] is None else f": {row['computed']}"
        names.append(title(row) + number)
    steps = max(row["steps"] for row in rows)
    axes.set(xlim=(0, steps), ylim=(len(rows), 0), xlabel="denoising step")
    axes.set_yticks([y + 0.5 for y in range(len(rows))], names)
    axes.tick_params(axis="y", length=0)
    axes.set_title("computed steps", loc="left", fontsize=10)
    axes.spines[:].set_visible(False)
    axes.legend(
        handles=[
            Patch(facecolor=colour, edgecolor=EDGE, label=label)
            for colour, label in ((COMPUTED, "computed"), (REUSED, "reused"))
        ],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        fontsize=9,
    )


def _draw_curve(axes: Axes, rows: list[Row], x: Sequence[float], y: Sequence[float | None]) -> None:
    """A point for each video. A line joins the videos of one group and one kind of schedule."""
    lines: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for row, across, up in zip(rows, x, y, strict=True):
        kind = re.sub(r"[ ,]*\b\d[\d.]*", "", name(row), count=1).strip(" ,")
        if up is not None:
            lines.setdefault((row["group"], kind), []).append((across, up))
    kinds = {kind for _, kind in lines}
    differences = {row["group"]: row["differs_in"] for row in rows}
    for (group, kind), points in lines.items():
        parts = [kind if len(kinds) > 1 else "", differences[group]]
        label = ", ".join(filter(None, parts))
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label, markersize=4)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    if not axes.lines:
        axes.text(0.5, 0.5, "no differences to show", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
    elif len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
