"""What to sample: one job for each video, and the file that lists many of them."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacache.base.errors import ArgumentError
from teacache.command import readers


@dataclass(frozen=True)
class Job:
    """One video.

    Exactly one of three says which steps are computed.

    Attributes:
        rel_l1_thresh: by the rule.
        computed_steps: so many.
        steps: these, and the first and the last.
        reuse: what the others take, one of `teacache.core.rule.REUSES`.
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

    @property
    def schedule(self) -> str | None:
        """What its schedule is called: `forecast 12`, `listed 9`; None for the published rule."""
        if self.computed_steps is not None:
            return f"{self.reuse} {self.computed_steps}"
        which = None
        if self.steps is not None:
            which = f"listed {len({0, self.num_infer_steps - 1, *self.steps})}"
        if self.reuse == "residual":
            return which
        return f"{which or f'{self.rel_l1_thresh:g}'} {self.reuse}"

    @property
    def which(self) -> str:
        """Its schedule, or the threshold that it follows: `rel_l1_thresh 0.15`."""
        return self.schedule or f"rel_l1_thresh {self.rel_l1_thresh}"

    @property
    def group(self) -> tuple[str, str, str, int, int]:
        """What it shares with the videos that it is compared with: all but the schedule."""
        return self.image, self.prompt, self.negative_prompt, self.seed, self.num_infer_steps


MOST_CHARACTERS = 10**7  # of a file, which may be a pipe
# Reads the text of one field, as the argument of the same name reads it.
FIELDS: dict[str, Callable[[str], object]] = {
    "image": readers.image,
    "prompt": readers.prompt,
    "negative_prompt": readers.text,
    "seed": readers.seed,
    "num_infer_steps": readers.positive,
    "rel_l1_thresh": readers.not_negative,
    "computed_steps": readers.positive,
}
# Those of them that say which steps are computed.
CHOICES = ("rel_l1_thresh", "computed_steps")


def read_jobs(path: Path) -> list[dict[str, Any]]:
    """The lines of a jobs file: each one's fields, as the arguments of their names read them.

    Raises:
        ArgumentError: naming the line and what is wrong with it.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise ArgumentError(f"--jobs {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--jobs {path} is not UTF-8 text") from error
    except ValueError as error:  # a path that no file can have
        raise ArgumentError(f"--jobs {path} cannot be read: {error}") from error
    if len(text) > MOST_CHARACTERS:
        raise ArgumentError(f"--jobs {path} is longer than {MOST_CHARACTERS} characters")
    rows = _csv_rows(text) if path.suffix.lower() == ".csv" else _json_rows(text)
    jobs = []
    try:
        for number, row in rows:
            jobs.append(_checked(row, f"--jobs {path}, line {number}"))
    except _BadLine as error:
        raise ArgumentError(f"--jobs {path}, {error}") from error
    if not jobs:
        raise ArgumentError(f"--jobs {path} holds no jobs")
    return jobs


class _BadLine(Exception):
    pass


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _BadLine(f"line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise _BadLine(f"line {number}: not an object")
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise _BadLine(f"line {number}: {name} must be text or a number: {value!r}")
        yield number, {name: str(value) for name, value in row.items()}


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise _BadLine(f"line {reader.line_num}: more fields than the header names")
            # An empty cell leaves the field to the command line.
            yield reader.line_num, {name: value for name, value in row.items() if value}
    except csv.Error as error:
        # The inner reader has counted the line that it failed on.
        raise _BadLine(f"line {reader.reader.line_num}: {error}") from error


def _checked(row: dict[str, str], where: str) -> dict[str, Any]:
    unknown = [name for name in row if name not in FIELDS]
    if unknown:
        raise ArgumentError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(FIELDS)}")
    values = {}
    for name, text in row.items():
        try:
            values[name] = FIELDS[name](text)
        except argparse.ArgumentTypeError as error:
            raise ArgumentError(f"{where}: {name}: {error}") from error
    return values
