"""The output folder: made, writable, with room for what a run writes; and the names in it."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from teacache.base.errors import OutputError, reason
from teacache.base.files import locked, with_ending

LATENTS_ENDING = ".latents.safetensors"
ENDINGS = (".mp4", ".json", ".md", ".png", LATENTS_ENDING)  # of all that a name may stand for


def prepare_folder(folder: Path) -> None:
    """Make the output folder where there is none, and make sure that it can be written to.

    Raises:
        OutputError: where it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputError(f"--output_path {folder} is a file, not a folder") from None
    except (OSError, ValueError) as error:  # a ValueError: a name that no folder can have
        raise OutputError(f"--output_path {folder} cannot be made: {reason(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--output_path {folder} cannot be written to")


def check_space(folder: Path, frame_pixels: int, num_frames: int, videos: int) -> None:
    """Raise OutputError where the folder's disk has no room for what a run writes.

    A tenth of the frames' bytes is more than their mp4 takes; the files around it, latents, record,
    figure and side-by-side video, take less than another such video.

    Args:
        frame_pixels: width x height of a frame.
    """
    video = frame_pixels * 3 * num_frames // 10 + 2**20
    needed, free = video * (videos + 1), shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"--output_path {folder} has {free / 2**20:.0f} MiB free, and the run may write "
            f"{needed / 2**20:.0f} MiB"
        )


@contextlib.contextmanager
def claimed_stem(folder: Path, prefix: str, latents: Path | None = None) -> Iterator[Path]:
    """Hold `folder/{prefix}_{index:04d}`, without an ending, for as long as the block runs.

    The index is the first that no file has and no other process holds. A process looks for files
    once it holds a name: whoever held it before has either left its files by then or given it up.

    Args:
        latents: a file that an earlier run has kept; where it lies in the folder, its name is taken
            before the others.
    """
    stems: Iterator[Path] = (folder / f"{prefix}_{index:04d}" for index in itertools.count())
    if latents is not None and latents.parent == folder:
        stems = itertools.chain([folder / latents.name.removesuffix(LATENTS_ENDING)], stems)
    for stem in stems:
        with locked(folder / f".{stem.name}.lock", always=True) as ours:
            files = {with_ending(stem, ending) for ending in ENDINGS} - {latents}
            if ours and not any(path.exists() for path in files):
                yield stem
                return
