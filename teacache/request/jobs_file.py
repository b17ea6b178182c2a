"""The file of `--jobs`, which lists many videos."""

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from teacache.base.errors import ArgumentError
from teacache.core.rule import PUBLISHED
from teacache.request import readers

# The fields of a jobs file. Each has the reader of the argument of that name.
FIELDS: dict[str, Callable[[str], object]] = {
    "image": readers.image,
    "prompt": readers.prompt,
    "negative_prompt": readers.negative_prompt,
    "seed": readers.seed,
    "num_infer_steps": readers.positive,
    "rel_l1_thresh": readers.not_negative,
    "computed_steps": readers.positive,
    "reuse": readers.reuse,
    **dict.fromkeys(vars(PUBLISHED), readers.positive),
}
# The fields that determine the computed steps.
CHOICES = ("rel_l1_thresh", "computed_steps")
MOST_LINES = 5  # with errors, in one message


def read_jobs(path: Path) -> list[dict[str, Any]]:
    """The fields of each line of a jobs file, converted like the arguments of the same names.

    An image is looked up beside the file first, then from the current folder.

    Raises:
        ArgumentError: naming the lines and what is wrong with them.
    """
    rows = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
    jobs, wrong = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in rows(file):
                try:
                    if job := _convert(row, path.parent):
                        jobs.append(job)
                except argparse.ArgumentTypeError as error:
                    wrong.append(f"line {number}: {error}")
    except OSError as error:
        raise ArgumentError(f"--jobs {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--jobs {path} is not UTF-8 text") from error
    if len(wrong) > MOST_LINES:
        wrong[MOST_LINES:] = [f"and {len(wrong) - MOST_LINES} more lines"]
    if wrong:
        raise ArgumentError(f"--jobs {path}, {'; '.join(wrong)}")
    if not jobs:
        raise ArgumentError(f"--jobs {path} holds no jobs")
    return jobs


# The number of a line, and its fields as text; or what is wrong with it.
Row = tuple[int, dict[str, str] | str]


def _json_rows(file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            yield number, "a JSON array: write one object a line, without brackets"
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"no JSON: {error}"
            continue
        if not isinstance(row, dict):
            yield number, "not an object"
            continue
        wrong = [name for name, value in row.items() if type(value) not in (str, int, float)]
        fields = {name: str(value) for name, value in row.items()}
        yield number, f"{wrong[0]} must be text or a number" if wrong else fields


def _csv_rows(file: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row:
                yield reader.line_num, "more fields than the header names"
                continue
            # For an empty cell the command line counts, but not for whom and what a row shows.
            filled = {name: cell for name, cell in row.items() if (cell or "").strip()}
            empty = [name for name in ("image", "prompt") if name in row and name not in filled]
            if filled and empty:
                yield reader.line_num, f"{empty[0]} is empty"
            else:
                yield reader.line_num, filled
    except csv.Error as error:
        # Only the inner reader has counted the line with the error.
        yield reader.reader.line_num, str(error)


def _convert(row: dict[str, str] | str, folder: Path) -> dict[str, Any]:
    """The values of a row. Raises ArgumentTypeError for a row with an error."""
    if isinstance(row, str):
        raise argparse.ArgumentTypeError(row)
    values: dict[str, Any] = {}
    for name, text in row.items():
        if name not in FIELDS:
            hint = "; fields are separated by commas" if ";" in name else ""
            known = ", ".join(FIELDS)
            raise argparse.ArgumentTypeError(f"unknown field {name!r}; known: {known}{hint}")
        if name == "image" and text and (folder / text).is_file():
            text = str(folder / text)
        try:
            values[name] = FIELDS[name](text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from error
    return values
