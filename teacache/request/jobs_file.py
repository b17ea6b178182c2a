"""The file of `--jobs`, which lists many videos."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from teacache.base.errors import ArgumentError
from teacache.request import readers

# The fields of a jobs file. Each has the reader of the argument of that name.
FIELDS: dict[str, Callable[[str], object]] = {
    "image": readers.image,
    "prompt": readers.prompt,
    "negative_prompt": readers.text,
    "seed": readers.seed,
    "num_infer_steps": readers.positive,
    "rel_l1_thresh": readers.not_negative,
    "computed_steps": readers.positive,
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
