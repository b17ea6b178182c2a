"""The embedded checkpoint in the user's cache folder. It is found without importing torch."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from teacache.base.errors import CheckpointError, reason
from teacache.base.files import cache_folder, locked

SOURCES = (
    *("build.py", "configuration.py", "detector.py", "faces.py", "text.py", "weights.py"),
    "weights.safetensors",
)


def cached_tiny_checkpoint() -> Path:
    """The embedded checkpoint in the user's cache folder, built there if it is not yet.

    The folder's name carries a digest of the code that builds it, so that a newer version of the
    package never samples from an older build.

    Raises:
        CheckpointError: where it cannot be written.
    """
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    folder = cache_folder() / f"tiny-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        build_tiny_checkpoint(folder)
    return folder


def build_tiny_checkpoint(folder: Path) -> None:
    """Build the embedded checkpoint in `folder`, if no other process does so first.

    It is written to a folder beside and renamed: an interrupted build leaves no half checkpoint.

    Raises:
        CheckpointError: where it cannot be written.
    """
    beside = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if folder.is_dir():
                return
            from teacache.embedded.build import write_checkpoint  # torch, for the first run alone

            try:
                shutil.rmtree(beside, ignore_errors=True)  # of a build that was killed
                write_checkpoint(beside)
                beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {reason(error)}") from error
