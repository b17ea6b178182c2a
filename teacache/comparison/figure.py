"""The figure of a sweep: each schedule as a row of cells, beside it what the threshold costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from teacache.comparison.tables import Row
from teacache.results.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPUTED, REUSED, EDGE = "#1f5fa8", "#ffffff", "#9aa7b5"
PIXELS_WIDE, DPI = 1200, 100


def draw_sweep(rows: list[Row], records: list[Record], path: Path) -> None:
    """Draw the figure as a PNG of 1200 pixels width.

    Args:
        rows: the sweep's rows, see `teacache.comparison.tables.sweep_rows`.
        records: of the same videos in the same order.
    """
    # Not pyplot: it would choose a window system, and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = max(3.6, 1.4 + 0.32 * len(rows))
    figure = Figure(figsize=(PIXELS_WIDE / DPI, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    cells, latency, psnr = figure.subplots(1, 3, width_ratios=[5, 2, 2])
    _draw_schedules(cells, rows, records)
    _draw_curve(latency, rows, "latency", [row["latency"] for row in rows], "seconds a video")
    latency.set_ylim(bottom=0)
    _draw_curve(psnr, rows, "likeness to the baseline", list(map(_psnr, rows)), "PSNR, dB")
    figure.savefig(path)


def _draw_schedules(axes: Axes, rows: list[Row], records: list[Record]) -> None:
    from matplotlib.patches import Patch, Rectangle

    names = []
    for y, (row, record) in enumerate(zip(rows, records, strict=True)):
        computed = set(record.computed_steps)
        for step in range(row["steps"]):
            colour = COMPUTED if step in computed else REUSED
            axes.add_patch(
                Rectangle(
                    (step, y + 0.12), 1, 0.76, facecolor=colour, edgecolor=EDGE, linewidth=0.6
                )
            )
        which = f", {row['differs_in']}" if row["differs_in"] else ""
        names.append(f"{row['rel_l1_thresh']:g}{which}: {row['computed']}")
    steps = max(row["steps"] for row in rows)
    axes.set_xlim(0, steps)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("denoising step")
    axes.set_title("threshold: computed steps", loc="left", fontsize=10)
    axes.spines[:].set_visible(False)
    axes.legend(
        handles=[
            Patch(facecolor=COMPUTED, edgecolor=EDGE, label="computed"),
            Patch(facecolor=REUSED, edgecolor=EDGE, label="reused"),
        ],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
        fontsize=9,
    )


def _draw_curve(
    axes: Axes, rows: list[Row], title: str, values: list[float | None], unit: str
) -> None:
    """One value for each threshold; the videos that share all else are joined."""
    for group in dict.fromkeys(row["group"] for row in rows):
        name = next(row["differs_in"] for row in rows if row["group"] == group)
        points = sorted(
            (row["rel_l1_thresh"], value)
            for row, value in zip(rows, values, strict=True)
            if row["group"] == group and value is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("rel_l1_thresh")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(left=0 if len(rows) > 1 else None)
    if not axes.lines:
        axes.text(0.5, 0.5, "no differences to show", ha="center", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
    elif len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _psnr(row: Row) -> float | None:
    return row["quality"].get("psnr", {}).get("mean")
