"""The tables of a sweep: in the terminal, and as Markdown in the published table's form."""

from __future__ import annotations

import textwrap
from typing import Literal, TypedDict

from teacache.results.record import Quality, Record, Settings

# Published for TeaCache on ConsisID: 50 steps, 49 frames of 720x480, one H100.
PUBLISHED_SECONDS = {0.0: 110, 0.1: 70, 0.15: 53, 0.2: 41}


class Row(TypedDict):
    """One video of a sweep, as the tables and the figure show it.

    rel_l1_thresh: None where the steps were listed; schedule: `listed 22` there, else None. group:
    a number that the videos share that differ in their schedule alone; differs_in: in a few words,
    what tells that group from the others. latency: seconds of denoising and decoding; speedup: that
    of the video without reuse over its own, None where its group has none.
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
    unaided = {
        record.settings.group: record.latency
        for _, record in videos
        if record.settings.rel_l1_thresh == 0
    }
    several = [len(set(column)) > 1 for column in zip(*groups, strict=True)]
    names = {r.settings.image_sha256: _image_name(r.settings) for _, r in videos}
    alike = len(set(names.values())) < len(names)
    rows: list[Row] = []
    for name, record in videos:
        baseline = unaided.get(record.settings.group)
        rows.append(
            {
                "video": name,
                "group": groups.index(record.settings.group),
                "differs_in": _differences(record.settings, several, alike),
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


def _differences(settings: Settings, several: list[bool], alike: bool) -> str:
    """What tells a video's group from the others; empty where it is alone.

    Args:
        several: of each part of a group, whether the groups differ in it.
        alike: whether two images have one name, as where what tells them apart is masked.
    """
    parts = (
        _image_name(settings) + (f" {settings.image_sha256[:6]}" if alike else ""),
        f'"{textwrap.shorten(settings.prompt, 28, placeholder="...")}"',
        f'not "{textwrap.shorten(settings.negative_prompt, 28, placeholder="...")}"',
        f"seed {settings.seed}",
        f"{settings.num_infer_steps} steps",
    )
    return ", ".join(part for part, differs in zip(parts, several, strict=True) if differs)


def name(row: Row) -> str:
    """Which schedule a video follows: `threshold 0.15`, `listed 22`."""
    return row["schedule"] or f"threshold {row['rel_l1_thresh']:g}"


def label(row: Row) -> str:
    """What a video is labelled with, side by side with the others."""
    faster = f", {row['speedup']:.2f}x" if row["speedup"] else ""
    which = f", {row['differs_in']}" if row["differs_in"] else ""
    return (
        f"{name(row)}{which}\n"
        f"{row['computed']} of {row['steps']} steps, {row['latency']:.1f} s{faster}"
    )


def terminal_table(rows: list[Row]) -> str:
    """The rows in aligned columns; a column that has nothing to show is left out, and why."""
    return "\n".join([aligned(_cells(rows)), *_absences(rows)])


def aligned(lines: list[list[str]]) -> str:
    """Lines of cells as text, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def sweep_markdown(rows: list[Row], record: Record) -> str:
    """The sweep as Markdown: the published table with this run's seconds, then every figure.

    Args:
        record: of any video of the sweep, for what they share.
    """
    own = {row["rel_l1_thresh"] for row in rows if row["rel_l1_thresh"] is not None}
    thresholds = sorted({*PUBLISHED_SECONDS, *own})
    heads = ["ConsisID" if x == 0 else f"TeaCache ({x:g})" for x in thresholds]
    settings = record.settings
    where = f"{record.device_name}, {settings.width}x{settings.height}"
    lines = [
        "# Sweep",
        "",
        _markdown_line(["seconds a video", *heads]),
        _markdown_line([":---", *[":---:"] * len(heads)]),
        _markdown_line(
            [
                "published: H100, 720x480, 49 frames, 50 steps",
                *(_published(threshold) for threshold in thresholds),
            ]
        ),
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        mine = {row["rel_l1_thresh"]: row for row in rows if row["group"] == group}
        any_row = next(iter(mine.values()))
        name = f"this run: {where}, {settings.num_frames} frames, {any_row['steps']} steps"
        which = f", {any_row['differs_in']}" if any_row["differs_in"] else ""
        lines.append(_markdown_line([name + which, *(_own(mine.get(x)) for x in thresholds)]))
    lines += ["", markdown_table(_cells(rows))]
    return "\n".join([*lines, "", *_remarks(rows)]) + "\n"


def markdown_table(lines: list[list[str]]) -> str:
    """Lines of cells, the first of them headings, as Markdown."""
    head, *body = lines
    rule = _markdown_line(["---:"] * len(head))
    return "\n".join([_markdown_line(head), rule, *map(_markdown_line, body)])


def _remarks(rows: list[Row]) -> list[str]:
    return [
        "Seconds are those of denoising and decoding. PSNR, SSIM and LPIPS compare with the video "
        "of threshold 0, frame by frame before compression; identity is "
        "ArcFace's cosine similarity to the face in the photograph. Each is the mean over the "
        "frames, and the worst.",
        *_absences(rows),
    ]


def _absences(rows: list[Row]) -> list[str]:
    """What the figures lack, a sentence each."""
    found = [row["quality"] for row in rows]
    missing = {reason for quality in found if (reason := quality.get("lpips_missing"))}
    absences = [f"No LPIPS: {reason}." for reason in sorted(missing)]
    identities = [quality["identity"] for quality in found if "identity" in quality]
    if identities and all(identity["mean"] is None for identity in identities):
        absences.append("No identity: the detector finds no face in any frame.")
    if any(quality.get("decoded") for quality in found):
        absences.append(
            "Compared with frames that were decoded from an earlier mp4: its losses are in the "
            "figures."
        )
    return absences


def _cells(rows: list[Row]) -> list[list[str]]:
    """Headings, then a line for each row, without the columns that have nothing but dashes."""
    columns = {
        **_which(rows),
        "computed": [f"{row['computed']} of {row['steps']}" for row in rows],
        "seconds": [f"{row['latency']:.1f}" for row in rows],
        "speed-up": [f"{row['speedup']:.2f}x" if row["speedup"] else "-" for row in rows],
        "PSNR (worst)": [_figure(row, "psnr", ".1f") for row in rows],
        "SSIM (worst)": [_figure(row, "ssim", ".3f") for row in rows],
        "LPIPS (worst)": [_figure(row, "lpips", ".3f") for row in rows],
        "identity (worst)": [_figure(row, "identity", ".3f") for row in rows],
        "no face in": [_faceless(row) for row in rows],
        "which": [row["differs_in"] or "-" for row in rows],
        "video": [str(row["video"]) for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return [list(shown), *map(list, zip(*shown.values(), strict=True))]


def _which(rows: list[Row]) -> dict[str, list[str]]:
    """The first column: thresholds alone, or names where there are other schedules too."""
    if any(row["schedule"] for row in rows):
        return {"schedule": [name(row) for row in rows]}
    return {"rel_l1_thresh": [f"{row['rel_l1_thresh']:g}" for row in rows]}


def _figure(row: Row, name: Literal["psnr", "ssim", "lpips", "identity"], form: str) -> str:
    figures = row["quality"].get(name)
    if not figures:
        return "-"
    if figures["mean"] is None:
        return "identical" if name == "psnr" else "-"
    return f"{figures['mean']:{form}} ({figures['worst']:{form}})"


def _faceless(row: Row) -> str:
    identity = row["quality"].get("identity")
    if not identity:
        return "-"
    return f"{identity['frames_without_face']} of {len(identity['per_frame'])}"


def _published(threshold: float) -> str:
    seconds = PUBLISHED_SECONDS.get(threshold)
    return f"~{seconds} ({PUBLISHED_SECONDS[0.0] / seconds:.1f}x)" if seconds else ""


def _own(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['latency']:.1f}" + (f" ({row['speedup']:.1f}x)" if row["speedup"] else "")


def _markdown_line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
