"""Atomic file writes, locks, and the user's cache folder."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from teacache.base.errors import DeviceError


@contextlib.contextmanager
def written_whole(stem: Path, *endings: str) -> Iterator[list[Path]]:
    """Write several files atomically: all get their names at the end of the block, or none.

    The contents are flushed to disk before the first file is renamed. If anything fails, no new
    file is left. A file that existed before, such as a record that is updated, stays.

    Yields:
        a hidden path for each ending, to write to. It is renamed to `stem` + ending.
    """
    hidden = [stem.with_name(f".{stem.name}.part{ending}") for ending in endings]
    renamed = []
    try:
        yield hidden
        for path in hidden:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path, ending in zip(hidden, endings, strict=True):
            if not with_ending(stem, ending).exists():
                renamed.append(with_ending(stem, ending))
            path.rename(with_ending(stem, ending))
    except BaseException:
        for path in renamed:
            path.unlink(missing_ok=True)
        raise
    finally:
        for path in hidden:
            path.unlink(missing_ok=True)


def with_ending(stem: Path, ending: str) -> Path:
    """`stem` + `ending`. `with_suffix` would cut .15_0000 off the name 42_0.15_0000."""
    return stem.with_name(stem.name + ending)


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file has the few lines that git clones without git-lfs, in place of its content."""
    with contextlib.suppress(OSError):  # none that can be read
        if path.is_file() and path.stat().st_size <= 1024:  # git-lfs takes no larger file for one
            with path.open("rb") as file:
                return file.read(24) == b"version https://git-lfs."
    return False


@contextlib.contextmanager
def locked(path: Path, wait: bool = False, always: bool = False) -> Iterator[bool]:
    """Hold a lock file while the block runs, then remove the file.

    The system releases the lock when the process ends, even by SIGKILL. Then the empty file stays
    until the next process takes the lock. Without locks in the file system, or without permission
    to create the file, the lock counts as held.

    Args:
        wait: wait for another process that holds the lock.
        always: lock also on a file system without locks. There a killed process leaves the lock.

    Yields:
        whether the lock is held: False if another process holds it.
    """
    import filelock  # late, so that a missing package is one line

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
        # Before the release: a process that has opened the file sees that it is gone, and retries.
        with contextlib.suppress(OSError):  # the folder is read-only by now
            path.unlink()
        lock.release()


def cache_folder() -> Path:
    """This package's folder below the user's cache folder.

    Raises:
        DeviceError: if the user has no home directory, as in some containers.
    """
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise DeviceError("this user has no home directory: set XDG_CACHE_HOME") from error
    return caches / "teacache-consisid"


def fingerprint(files: list[Path], times: bool = True) -> str:
    """A digest of the files' names, sizes, times of change and first megabytes.

    To read all of 20 GB would take as long as to load them. Without the times of change, a copy has
    the same digest.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        changed = status.st_mtime_ns if times else ""
        digest.update(f"{path.name} {status.st_size} {changed} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
    return digest.hexdigest()
