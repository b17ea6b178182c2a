"""What is said when a model cannot be made of a checkpoint's files."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

from teacache.device import is_out_of_memory
from teacache.errors import CheckpointError, TeaCacheError

MOST_SAID = 200  # characters of what a library says: some list every weight


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what a library raises in the block, which reads models from `folder`, into one line.

    Each raises errors of its own kinds for files that are damaged or do not go together. Running
    out of memory, a missing package and a GPU that fails are none of the files' faults.

    Raises:
        CheckpointError: naming the folder.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (TeaCacheError, ImportError)) or is_out_of_memory(error):
            raise
        if "CUDA" in str(error):  # the GPU's fault or ours
            raise
        told = textwrap.shorten(f"{type(error).__name__}: {error}", MOST_SAID, placeholder=" ...")
        raise CheckpointError(f"{folder} cannot be read: {told}") from error


def check_whole(folder: Path, missing_keys: list[str] | set[str]) -> None:
    """Raise CheckpointError where a model has weights that its files did not hold.

    The libraries fill them with random numbers and go on.
    """
    if missing_keys:
        raise CheckpointError(
            f"{folder} lacks {len(missing_keys)} of the model's weights: {min(missing_keys)}"
        )
