"""Files that are whole or absent, names that two processes never share, the cache folder."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def claimed_stem(folder: Path, prefix: str, endings: tuple[str, ...]) -> Iterator[Path]:
    """Hold `folder/{prefix}_{index:04d}`, without an ending, for as long as the block runs.

    The index is the first that no file has and no other process holds. A process holds it by a
    hidden file that only one of them can create, and looks for finished files afterwards: whoever
    held it before has either left its files by then or given it up.

    Args:
        endings: of the files that a name may have.
    """
    for index in itertools.count():
        stem = folder / f"{prefix}_{index:04d}"
        claim = folder / f".{stem.name}.claim"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        try:
            if not any(with_ending(stem, ending).exists() for ending in endings):
                yield stem
                return
        finally:
            claim.unlink()


@contextlib.contextmanager
def written_whole(stem: Path, *endings: str) -> Iterator[list[Path]]:
    """Hidden paths to write to, each of which becomes `stem` + its ending once the block succeeds.

    All contents reach the disk before the first name does. Where anything fails, none is left; a
    file that was there before, as a record that gets more in it, stays.
    """
    beside = [stem.with_name(f".{stem.name}.part{ending}") for ending in endings]
    named = []
    try:
        yield beside
        for path in beside:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path, ending in zip(beside, endings, strict=True):
            if not with_ending(stem, ending).exists():
                named.append(with_ending(stem, ending))
            path.rename(with_ending(stem, ending))
    except BaseException:
        for path in named:
            path.unlink(missing_ok=True)
        raise
    finally:
        for path in beside:
            path.unlink(missing_ok=True)


def with_ending(stem: Path, ending: str) -> Path:
    """`stem` + `ending`: not with_suffix, to which the suffix of 42_0.15_0000 is .15_0000."""
    return stem.with_name(stem.name + ending)
