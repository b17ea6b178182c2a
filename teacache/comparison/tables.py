"""The tables of a sweep, for the terminal and in Markdown."""

from __future__ import annotations

import textwrap
from typing import Literal, TypedDict

from teacache.results.record import Quality, Record, Settings


class Row(TypedDict):
    """One video of a sweep, as the tables and the figure show it.

    group: number of a group of videos; the videos of one group differ only in their schedule.
    differs_in: the differences of the group from the others, in a few words.
    rel_l1_thresh: None for a video without threshold.
    schedule: its name, `listed 22`, `0.15, max_reuse 2`; None for a video by the published rule.
    latency: seconds of denoising and decoding.
    speedup: over the video of the group with threshold 0; None without such a video.
    """

    video: str
    group: int
    differs_in: str
    rel_l1_thresh: float | None
    schedule: str | None
    computed: int
    steps: int
    latency: float
    speedup: float | None
    quality: Quality


def sweep_rows(videos: list[tuple[str, Record]]) -> list[Row]:
    """One row for each video, in the order of the list.

    Args:
        videos: name and record of each.
    """
    groups = list(dict.fromkeys(record.settings.group for _, record in videos))
    baselines = {
        record.settings.group: record.latency
        for _, record in videos
        if record.settings.rel_l1_thresh == 0
    }
    differing = [len(set(column)) > 1 for column in zip(*groups, strict=True)]
    names = {record.settings.image_sha256: _image_name(record.settings) for _, record in videos}
    ambiguous = len(set(names.values())) < len(names)
    rows: list[Row] = []
    for name, record in videos:
        baseline = baselines.get(record.settings.group)
        rows.append(
            {
                "video": name,
                "group": groups.index(record.settings.group),
                "differs_in": _differences(record.settings, differing, ambiguous),
                "rel_l1_thresh": record.settings.rel_l1_thresh,
                "schedule": record.settings.schedule,
                "computed": len(record.computed_steps),
                "steps": record.settings.num_infer_steps,
                "latency": round(record.latency, 3),
                "speedup": round(baseline / record.latency, 3) if baseline else None,
                "quality": record.quality or {},
            }
        )
    return rows


def _image_name(settings: Settings) -> str:
    return settings.image.rsplit("/", 1)[-1]


def _differences(settings: Settings, differing: list[bool], ambiguous: bool) -> str:
    """The differences of a group from the others, in a few words; empty for a single group.

    Args:
        differing: for each part of `Settings.group`, whether the groups differ in it.
        ambiguous: whether two images have the same name, for instance a masked URL.
    """
    parts = (
        _image_name(settings) + (f" {settings.image_sha256[:6]}" if ambiguous else ""),
        f'"{textwrap.shorten(settings.prompt, 28, placeholder="...")}"',
        f'not "{textwrap.shorten(settings.negative_prompt, 28, placeholder="...")}"',
        f"seed {settings.seed}",
        f"{settings.num_infer_steps} steps",
    )
    return ", ".join(part for part, differs in zip(parts, differing, strict=True) if differs)


def name(row: Row) -> str:
    """The setting of a video: `threshold 0.15`, `listed 22`."""
    if row["rel_l1_thresh"] is None:
        return str(row["schedule"])
    return f"threshold {row['schedule'] or format(row['rel_l1_thresh'], 'g')}"


def title(row: Row) -> str:
    """The setting of a video, and the differences of its group."""
    return _joined(name(row), row["differs_in"])


def label(row: Row) -> str:
    """The two lines above a video, side by side with the others."""
    speedup = f"{row['speedup']:.2f}x" if row["speedup"] else ""
    steps = f"{row['computed']} of {row['steps']} steps"
    return title(row) + "\n" + _joined(steps, f"{row['latency']:.1f} s", speedup)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def terminal_table(rows: list[Row]) -> str:
    """The rows in aligned columns, without empty columns, and remarks."""
    return "\n".join([aligned(_cells(rows)), *_remarks(rows)])


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def sweep_markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table, with an explanation of the columns."""
    explanation = (
        "Seconds are those of denoising and decoding, and the speed-up is by them: other work on "
        "the machine shows in both. PSNR, SSIM and LPIPS compare each frame with the video of "
        "threshold 0, before compression. Identity is ArcFace's cosine similarity between each "
        "frame and the photograph, in those frames in which a face is found: their share follows. "
        "Each figure is the mean over the frames, then the worst frame."
    )
    return (
        "\n".join(["# Sweep", "", markdown_table(_cells(rows)), "", explanation, *_remarks(rows)])
        + "\n"
    )


def markdown_table(lines: list[list[str]]) -> str:
    """A Markdown table of lines of cells; the first line has the headings."""
    head, *body = ([cell.replace("|", "/") for cell in line] for line in lines)
    every = [head, ["---:"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def _remarks(rows: list[Row]) -> list[str]:
    """Sentences on figures that are missing, or taken from decoded frames."""
    figures = [row["quality"] for row in rows]
    missing = {reason for quality in figures if (reason := quality.get("lpips_missing"))}
    remarks = [f"No LPIPS: {reason}." for reason in sorted(missing)]
    if any(quality.get("decoded") for quality in figures):
        remarks.append(
            "Some frames were decoded from an earlier mp4: the figures include the losses of its "
            "compression."
        )
    return remarks


def _cells(rows: list[Row]) -> list[list[str]]:
    """Headings, then a line for each row. Columns with only dashes are left out."""
    thresholds_only = not any(row["schedule"] for row in rows)
    columns = {
        "rel_l1_thresh" if thresholds_only else "schedule": [
            f"{row['rel_l1_thresh']:g}" if thresholds_only else name(row) for row in rows
        ],
        "computed": [f"{row['computed']} of {row['steps']}" for row in rows],
        "seconds": [f"{row['latency']:.1f}" for row in rows],
        "speed-up": [f"{row['speedup']:.2f}x" if row["speedup"] else "-" for row in rows],
        "PSNR (worst)": [_figure(row, "psnr", ".1f") for row in rows],
        "SSIM (worst)": [_figure(row, "ssim", ".3f") for row in rows],
        "LPIPS (worst)": [_figure(row, "lpips", ".3f") for row in rows],
        "identity (worst)": [_identity(row) for row in rows],
        "which": [row["differs_in"] or "-" for row in rows],
        "video": [row["video"] for row in rows],
    }
    shown = {heading: cells for heading, cells in columns.items() if set(cells) != {"-"}}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def _figure(row: Row, name: Literal["psnr", "ssim", "lpips", "identity"], form: str) -> str:
    figures = row["quality"].get(name)
    if not figures:
        return "-"
    if figures["mean"] is None:
        return "identical" if name == "psnr" else "-"
    return f"{figures['mean']:{form}} ({figures['worst']:{form}})"


def _identity(row: Row) -> str:
    """The figure, and of how many frames it is: those with a face."""
    if "identity" not in row["quality"]:
        return "-"
    per_frame = row["quality"]["identity"]["per_frame"]
    found, frames = len(per_frame) - per_frame.count(None), len(per_frame)
    return f"{_figure(row, 'identity', '.3f')} in {found} of {frames} frames, {found / frames:.0%}"
