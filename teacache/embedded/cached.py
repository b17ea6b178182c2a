"""The embedded checkpoint in the user's cache folder. Only its build imports torch."""

import hashlib
import shutil
from pathlib import Path

from teacache.base.errors import CheckpointError, reason
from teacache.base.files import cache_folder, locked

SOURCES = (
    *("build.py", "configuration.py", "detector.py", "faces.py", "weights.py"),
    "text_encoder.py",
    "weights.safetensors",
)


def cached_tiny_checkpoint() -> Path:
    """The folder of the embedded checkpoint, which is built where it is missing.

    Its name has a digest of the code that builds it, so that another version of the package has
    another build.

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
    """Build the embedded checkpoint, unless another process has built it meanwhile.

    A temporary folder is renamed at the end, so an interrupted build leaves no incomplete folder.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if folder.is_dir():
                return
            from teacache.embedded.build import write_checkpoint  # late: imports torch

            try:
                shutil.rmtree(temporary, ignore_errors=True)  # of a killed build
                write_checkpoint(temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {reason(error)}") from error
