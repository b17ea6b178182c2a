"""Locks that processes share which share an output folder, on one machine or on several."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

FILE = ".lock"
HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[bool]:
    """Hold the lock of a name for as long as the block runs. A process can hold one at a time.

    A lock is a byte of a hidden file. The system gives it back whatever ends the process, SIGKILL
    too, and so do network file systems with POSIX locks, as NFS has them. On a file system without
    any, and in a folder that takes no more files, there is nothing to be held back by.

    Yields:
        whether it is held: False where another process has it.
    """
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    held = True
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = stack.enter_context((folder / FILE).open("ab"))
            held = _is_ours(file, place)
        yield held  # closing the file gives the lock back


def _is_ours(file: IO[bytes], place: int) -> bool:
    """Lock a byte, or see that another process has."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        return error.errno not in HELD_BY_ANOTHER
    return True
