"""Readers of the command's arguments, and of the same fields of a jobs file, one value each.

Each takes the text that the user wrote, and raises ArgumentTypeError, in a few words, where it is
no value of its kind.
"""

from __future__ import annotations

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
from urllib.parse import urlsplit

from teacache.base.errors import ArgumentError
from teacache.core.rule import UNBOUNDED, Coefficients

DEGREE = 4  # of the rescaling polynomial
# What `teacache.fit` writes beside the coefficients, and the sampler does not read.
PROVENANCE = (
    *("r2", "videos", "checkpoint", "checkpoint_sha256", "scheduler"),
    *("num_infer_steps", "versions", "date"),
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
    """Any text that can be written down again: UTF-8, without control characters but white space.

    Args:
        value: may hold surrogates, which stand for bytes of the command line that are not UTF-8.
    """
    for character in value:
        category = unicodedata.category(character)
        if category == "Cs":
            raise argparse.ArgumentTypeError("holds bytes that are not UTF-8")
        if category == "Cc" and character not in "\t\n\r":
            raise argparse.ArgumentTypeError(f"holds the control character U+{ord(character):04X}")
    return value


def prompt(value: str) -> str:
    """A text that says something."""
    if not value.strip():
        raise argparse.ArgumentTypeError("is empty: say what the video shows")
    return text(value)


def name(value: str) -> str:
    """A path, or another name of the thing, that is not empty and can be written down again."""
    return text(_path(value))


def path(value: str) -> Path:
    """A path that can be written down again."""
    return Path(name(value))


def _path(value: str) -> str:
    """With the home directory for a leading `~`, which bash leaves after an `=`.

    Not the empty string: an unset shell variable is one, and Path('') is the current folder.
    """
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    return os.path.expanduser(value)


def image(value: str) -> str:
    """An image's source: http or https; of a path, that there is such a file.

    What is wrong with a URL is told with the whole of it: whoever prints it masks credentials.
    """
    source = name(value)
    if "://" in source:
        with contextlib.suppress(ValueError):
            url = urlsplit(source)
            if url.scheme in ("http", "https") and url.hostname:
                return source
        raise argparse.ArgumentTypeError(f"{source} is no http or https URL")
    if source != "astronaut":
        if os.path.isdir(source):
            raise argparse.ArgumentTypeError(f"{source} is a folder, not an image")
        if not os.path.exists(source):
            raise argparse.ArgumentTypeError(f"{source[:80]}: there is no such file")
    return source


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    number = _number(text, float, lambda x: math.isfinite(x) and x >= 0, "a number, 0 or more")
    return abs(number)  # -0.0 is 0 or more as well, and would show in the file name


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return _number(text, int, lambda n: n >= 1, "a whole number, 1 or more")


def seed(text: str) -> int:
    """A seed that torch takes: a whole number from 0 to 2^63 - 1."""
    return _number(text, int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")


def seed_or_random(text: str) -> int | str:
    """A seed, or `random`."""
    return text if text == "random" else seed(text)


def lora(text: str) -> tuple[str, float]:
    """`LORA` or `LORA:SCALE`: a file, folder or repository, and a finite number."""
    source, colon, scale = name(text).rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and source and math.isfinite(float(scale)):
            return source, float(scale)
    return text, 1.0


def _number(
    text: str, convert: Callable[[str], Number], allowed: Callable[[Number], bool], wanted: str
) -> Number:
    """A number of a kind, or the error that says what was wanted."""
    with contextlib.suppress(ValueError):
        value = convert(text)
        if allowed(value):
            return value
    shown = text if len(text) < 40 else f"{text[:30]}..."
    raise argparse.ArgumentTypeError(f"{shown!r} is not {wanted}")


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
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


def schedule(value: str) -> tuple[int, ...]:
    """The steps that a file lists, or those that a record has as computed."""
    data = _json_file(value)
    steps = data.get("computed_steps") if isinstance(data, dict) else data
    if (
        not isinstance(steps, list)
        or not steps
        or any(isinstance(step, bool) or not isinstance(step, int) for step in steps)
    ):
        raise argparse.ArgumentTypeError(
            f"{value} lists no steps, such as [0, 4, 8, 9], and is no record of a video"
        )
    return tuple(sorted(set(steps)))


def coefficients(value: str) -> Coefficients:
    """What a coefficients file holds, or the `coefficients` of a record."""
    data = _json_file(value)
    try:
        found = coefficients_of(data.get("coefficients", data) if isinstance(data, dict) else data)
        text(found.source)
    except (ArgumentError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{value}: {error}") from error
    return found


def _json_file(value: str) -> object:
    try:
        content = Path(_path(value)).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{value} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or a path that no file can have
        raise argparse.ArgumentTypeError(f"{value}: {error}") from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{value} is no JSON: {error}") from error


def coefficients_of(data: object) -> Coefficients:
    """Read what a coefficients file holds: `values`, `fitted_range` and `source`.

    Args:
        data: a JSON object. `values` (five numbers) is required; without `fitted_range`, or
            with null, every distance counts at which the polynomial is not negative. The keys
            of `PROVENANCE` are allowed, and ignored.

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
    source = data.get("source", "a coefficients file")
    if not isinstance(source, str):
        raise ArgumentError(f"source must be text, found {source!r}")
    return Coefficients(values, fitted_range, source)


def _finite_numbers(value: object, key: str, count: int) -> tuple[float, ...]:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        numbers = tuple(map(float, value if isinstance(value, list) else ()))
        if len(numbers) == count and all(map(math.isfinite, numbers)):
            return numbers
    raise ArgumentError(f"{key} must be a list of {count} finite numbers, found {value!r}")
