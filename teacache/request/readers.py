"""Conversion of one argument's text to its value, also for the fields of a jobs file.

Each function raises ArgumentTypeError with a short message if the text is not valid.
"""

import argparse
import contextlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from teacache.base.errors import ArgumentError
from teacache.base.files import is_lfs_pointer
from teacache.core.rule import REUSES, UNBOUNDED, Coefficients

DEGREE = 4  # of the rescaling polynomial
# Keys that `teacache.fit` writes beside the coefficients. The sampler ignores them.
PROVENANCE = (
    "r2 videos checkpoint checkpoint_sha256 scheduler num_infer_steps versions date".split()
)
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Shard:
    """One of `count` parts, counted from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def text(value: str) -> str:
    """Text that can be written as UTF-8, without control characters except white space.

    Surrogates stand for bytes of the command line that are not UTF-8.
    """
    for character in value:
        category = unicodedata.category(character)
        if category == "Cs":
            raise argparse.ArgumentTypeError("holds bytes that are not UTF-8")
        if category == "Cc" and character not in "\t\n\r":
            raise argparse.ArgumentTypeError(f"holds the control character U+{ord(character):04X}")
    return value


def prompt(value: str) -> str:
    """Text that is not blank, and not the name of a file."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty: say what the video shows")
    return negative_prompt(value)


def negative_prompt(value: str) -> str:
    """Text that is not the name of a file."""
    if os.path.isfile(value):
        raise argparse.ArgumentTypeError(f'{value} is a file: use its text, "$(cat {value})"')
    return text(value)


def name(value: str) -> str:
    """A path or another name, not empty. A leading `~` is the home directory.

    bash does not expand the `~` after an `=`. An unset shell variable gives the empty string, and
    Path("") would be the current folder.
    """
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    return text(os.path.expanduser(value))


def path(value: str) -> Path:
    """A path; see `name`."""
    return Path(name(value))


def folder(value: str) -> Path:
    """A path that does not look like a video's."""
    result = path(value)
    if result.suffix.lower() in (".mp4", ".mov", ".mkv", ".webm", ".gif") and not result.is_dir():
        raise argparse.ArgumentTypeError(f"{value} is the name of a video: name its folder")
    return result


def image(value: str) -> str:
    """An http or https URL, the path of a file that exists, or `astronaut`.

    The message holds the whole URL: whoever prints it masks credentials.
    """
    source = name(value)
    if "://" in source:
        if not re.match(r"https?://[^/?#]", source):
            raise argparse.ArgumentTypeError(f"{source} is no http or https URL")
    elif source != "astronaut":
        if os.path.isdir(source):
            raise argparse.ArgumentTypeError(f"{source} is a folder, not an image")
        if not os.path.exists(source):
            raise argparse.ArgumentTypeError(f"{source[:80]}: there is no such file")
        if is_lfs_pointer(Path(source)):
            raise argparse.ArgumentTypeError(f"{source} is a pointer: run `git lfs pull`")
    return source


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    number = _number(text, float, lambda x: math.isfinite(x) and x >= 0, "a number, 0 or more")
    return abs(number)  # -0.0 would appear in the file name


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return _number(text, int, lambda n: n >= 1, "a whole number, 1 or more")


def quality(text: str) -> float:
    """The quality of an mp4: a number from 0 to 10."""
    return _number(text, float, lambda x: 0 <= x <= 10, "a number from 0 to 10")


def seed(text: str) -> int:
    """A seed for torch: a whole number from 0 to 2^63 - 1."""
    return _number(text, int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")


def seed_or_random(text: str) -> int | str:
    """A seed, or `random`."""
    return text if text == "random" else seed(text)


def reuse(text: str) -> str:
    """One of `teacache.core.rule.REUSES`."""
    if text not in REUSES:
        raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(REUSES)}")
    return text


def lora(text: str) -> tuple[str, float]:
    """`LORA` or `LORA:SCALE`, as the source (file, folder or repository) and a finite scale."""
    source, colon, scale = name(text).rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and source and math.isfinite(float(scale)):
            return source, float(scale)
    return text, 1.0


def _number(
    text: str, convert: Callable[[str], Number], valid: Callable[[Number], bool], kind: str
) -> Number:
    """The number in a text. `kind` describes valid numbers in the error message."""
    with contextlib.suppress(ValueError):
        value = convert(text)
        if valid(value):
            return value
    shown = text if len(text) < 40 else f"{text[:30]}..."
    raise argparse.ArgumentTypeError(f"{shown!r} is not {kind}")


def shard(text: str) -> Shard:
    """`I/N`: part I of N, counted from 0."""
    numbers = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not numbers or int(numbers[2]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 0/8 to 7/8")
    index, count = int(numbers[1]), int(numbers[2])
    if index >= count:
        raise argparse.ArgumentTypeError(f"{text}: shards are numbered from 0 to {count - 1}")
    return Shard(index, count)


def device(text: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


def schedule(value: str) -> tuple[int, ...]:
    """The steps in a file: a JSON list, or the `computed_steps` of a record."""
    data = _json_file(value)
    steps = data.get("computed_steps") if isinstance(data, dict) else data
    if not (isinstance(steps, list) and steps and all(type(step) is int for step in steps)):
        raise argparse.ArgumentTypeError(
            f"{value} lists no steps, such as [0, 4, 8, 9], and is no record of a video"
        )
    return tuple(sorted(set(steps)))


def coefficients(value: str) -> Coefficients:
    """The coefficients in a file: `coefficients_of`, or the `coefficients` of a record."""
    data = _json_file(value)
    try:
        return coefficients_of(data.get("coefficients", data) if isinstance(data, dict) else data)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(f"{value}: {error}") from error


def _json_file(value: str) -> object:
    file = path(value)
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{value} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{value} is no JSON: {error}") from error


def coefficients_of(data: object) -> Coefficients:
    """Convert the content of a coefficients file: `values`, `fitted_range` and `source`.

    `values` (five numbers) is required. Without `fitted_range`, or with null, the range is
    unbounded. The keys of `PROVENANCE` are ignored.

    Raises:
        ArgumentError: naming the key that is wrong.
    """
    if not isinstance(data, dict):
        raise ArgumentError('the file must hold an object such as {"values": [a, b, c, d, e]}')
    unknown = sorted(set(data) - {"values", "fitted_range", "source", *PROVENANCE})
    if unknown:
        raise ArgumentError(f"unknown key {unknown[0]!r}; known: values, fitted_range, source")
    values = _finite_numbers(data.get("values"), "values", DEGREE + 1)
    fitted_range = UNBOUNDED
    if data.get("fitted_range") is not None:
        low, high = _finite_numbers(data["fitted_range"], "fitted_range", 2)
        if not 0 <= low < high:
            raise ArgumentError("fitted_range must be two rising distances, 0 or more")
        fitted_range = (low, high)
    return Coefficients(values, fitted_range, str(data.get("source", "a coefficients file")))


def _finite_numbers(value: object, key: str, count: int) -> tuple[float, ...]:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        numbers = tuple(map(float, value if isinstance(value, list) else ()))
        if len(numbers) == count and all(map(math.isfinite, numbers)):
            return numbers
    raise ArgumentError(f"{key} must be a list of {count} finite numbers, found {value!r}")
