"""The jobs of a run, one for each video, and the file that lists many of them."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from teacache.base.errors import ArgumentError
from teacache.command import readers
from teacache.core.rule import PUBLISHED, Limits


@dataclass(frozen=True)
class Job:
    """One video. Exactly one of three attributes determines the computed steps.

    Attributes:
        rel_l1_thresh: threshold of the published rule.
        computed_steps: number of computed steps.
        steps: indices of computed steps, to which the first and the last are added.
        reuse: how the other steps are reused, one of `teacache.core.rule.REUSES`.
        limits: on reuse, also for `computed_steps`; `steps` have none.
    """

    image: str
    prompt: str
    negative_prompt: str
    seed: int
    num_infer_steps: int
    rel_l1_thresh: float | None = None
    computed_steps: int | None = None
    steps: tuple[int, ...] | None = None
    reuse: str = "residual"
    limits: Limits = PUBLISHED

    @property
    def schedule(self) -> str | None:
        """Its schedule's name: `forecast 12`, `0.15, max_reuse 2`; None for the published rule."""
        how = "" if self.reuse == "residual" else f" {self.reuse}"
        if self.computed_steps is not None:
            name = f"{self.reuse} {self.computed_steps}"
        elif self.steps is not None:
            name = f"listed {len({0, self.num_infer_steps - 1, *self.steps})}{how}"
        elif how or self.limits != PUBLISHED:
            name = f"{self.rel_l1_thresh:g}{how}"
        else:
            return None
        published = vars(PUBLISHED)
        changed = ((n, value) for n, value in vars(self.limits).items() if value != published[n])
        return ", ".join([name, *(f"{n} {value}" for n, value in changed)])

    @property
    def which(self) -> str:
        """Name of its schedule, or its threshold: `rel_l1_thresh 0.15`."""
        named = self.schedule or str(self.rel_l1_thresh)
        return named if self.rel_l1_thresh is None else f"rel_l1_thresh {named}"

    @property
    def group(self) -> tuple[str, str, str, int, int]:
        """Equal for videos that are compared with each other: all but the schedule."""
        return self.image, self.prompt, self.negative_prompt, self.seed, self.num_infer_steps


# The fields of a jobs file. Each has the reader of the argument of that name.
FIELDS: dict[str, Callable[[str], object]] = {
    "image": readers.image,
    "prompt": readers.prompt,
    "negative_prompt": readers.text,
    "seed": readers.seed,
    "num_infer_steps": readers.positive,
    "rel_l1_thresh": readers.not_negative,
    "computed_steps": readers.positive,
    "reuse": readers.reuse,
    **dict.fromkeys(vars(PUBLISHED), readers.positive),
}
# The fields that determine the computed steps.
CHOICES = ("rel_l1_thresh", "computed_steps")


def read_jobs(path: Path) -> list[dict[str, Any]]:
    """The fields of each line of a jobs file, converted like the arguments of the same names.

    Raises:
        ArgumentError: naming the line and what is wrong with it.
    """
    rows = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            jobs = [_convert(row) for row in rows(file, f"--jobs {path}, line") if row[1]]
    except OSError as error:
        raise ArgumentError(f"--jobs {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--jobs {path} is not UTF-8 text") from error
    if not jobs:
        raise ArgumentError(f"--jobs {path} holds no jobs")
    return jobs


Line = tuple[str, dict[str, str]]  # file and line for an error message, and the fields as text


def _json_rows(file: TextIO, where: str) -> Iterator[Line]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArgumentError(f"{where} {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ArgumentError(f"{where} {number}: not an object")
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ArgumentError(f"{where} {number}: {name} must be text or a number: {value!r}")
        yield f"{where} {number}", {name: str(value) for name, value in row.items()}


def _csv_rows(file: TextIO, where: str) -> Iterator[Line]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row:
                raise ArgumentError(f"{where} {reader.line_num}: more fields than the header names")
            # For an empty cell the command line counts, but not for whom and what a row shows.
            filled = {name: cell for name, cell in row.items() if (cell or "").strip()}
            empty = [name for name in ("image", "prompt") if name in row and name not in filled]
            if filled and empty:
                raise ArgumentError(f"{where} {reader.line_num}: {empty[0]} is empty")
            yield f"{where} {reader.line_num}", filled
    except csv.Error as error:
        # Only the inner reader has counted the line with the error.
        raise ArgumentError(f"{where} {reader.reader.line_num}: {error}") from error


def _convert(row: Line) -> dict[str, Any]:
    where, texts = row
    values = {}
    for name, text in texts.items():
        if name not in FIELDS:
            raise ArgumentError(f"{where}: unknown field {name!r}; known: {', '.join(FIELDS)}")
        try:
            values[name] = FIELDS[name](text)
        except argparse.ArgumentTypeError as error:
            raise ArgumentError(f"{where}: {name}: {error}") from error
    return values
