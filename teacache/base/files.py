"""Files that are whole or absent, and the user's cache folder."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


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


def cache_folder() -> Path:
    """This package's folder below the user's cache folder, or else in the temporary one."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # the system does not know the user, as in some containers
        return folder_without_home()
    return caches / "teacache-consisid"


@functools.cache
def folder_without_home() -> Path:
    """This user's folder in the temporary one, which is everybody's: so only where it is our own.

    Compiled code is kept in it, and would be run.
    """
    folder = Path(tempfile.gettempdir()) / f"teacache-consisid-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    if not ours or status.st_mode & 0o022:
        folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    logger.warning("this user has no home directory: what is kept for later runs is in %s", folder)
    return folder
