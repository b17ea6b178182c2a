"""Locks between processes with the same output folder, on one machine or on several."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from teacache.base import files


def locked(folder: Path, name: str) -> contextlib.AbstractContextManager[bool]:
    """Hold the lock of a name without waiting, see `teacache.base.files.locked`."""
    return files.locked(lock_file(folder, name))


def lock_file(folder: Path, name: str) -> Path:
    """The hidden file of the lock. The name may have any characters."""
    return folder / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
