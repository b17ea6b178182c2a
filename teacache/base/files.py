"""Files that are whole or absent, locks, and the user's cache folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from teacache.base.errors import DeviceError


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


@contextlib.contextmanager
def locked(path: Path, wait: bool = False, always: bool = False) -> Iterator[bool]:
    """Hold the lock of a file for as long as the block runs, and remove the file.

    The system gives the lock back whatever ends the process, SIGKILL too; then the empty file stays
    until the next process that takes the lock. On a file system without locks, and in a folder that
    takes no more files, there is nothing to be held back by.

    Args:
        wait: for another process that holds the lock.
        always: also on a file system without locks, where a killed process leaves it locked.

    Yields:
        whether it is held: False where another process has it.
    """
    lock = filelock.FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=always)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    except OSError:
        yield True
        return
    try:
        yield True
    finally:
        # While it is held: a process that has opened it sees that it is gone, and tries again.
        with contextlib.suppress(OSError):  # a folder that takes no more changes
            path.unlink()
        lock.release()


def cache_folder() -> Path:
    """This package's folder below the user's cache folder.

    Raises:
        DeviceError: where the system does not know the user, as in some containers.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise DeviceError("this user has no home directory: set XDG_CACHE_HOME") from error
    return caches / "teacache-consisid"
