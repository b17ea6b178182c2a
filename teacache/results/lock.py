"""Locks that processes share which share an output folder, on one machine or on several."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from teacache.base import files


def locked(folder: Path, name: str) -> contextlib.AbstractContextManager[bool]:
    """Hold the lock of a name in a folder, see `teacache.base.files.locked`; never wait for it."""
    return files.locked(lock_file(folder, name))


def lock_file(folder: Path, name: str) -> Path:
    """The file that is locked, hidden, whatever characters the name has."""
    return folder / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
