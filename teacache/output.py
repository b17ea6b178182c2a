"""Names that two runs never share, and files that are either whole or absent."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.errors import OutputError

if TYPE_CHECKING:
    from teacache.size import VideoSize

LATENTS_ENDING = ".latents.safetensors"
ENDINGS = (".mp4", ".json", ".md", ".png", LATENTS_ENDING)


def prepare_folder(folder: Path) -> None:
    """Make the output folder where there is none, and make sure that it can be written to.

    Raises:
        OutputError: where it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputError(f"--output_path {folder} is a file, not a folder") from None
    except OSError as error:
        raise OutputError(f"--output_path {folder} cannot be made: {error.strerror}") from error
    except ValueError as error:  # a name that no folder can have
        raise OutputError(f"--output_path {folder} cannot be made: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--output_path {folder} cannot be written to")


def check_space(folder: Path, size: VideoSize, videos: int) -> None:
    """Raise OutputError where the folder's disk has no room for what a run writes.

    A tenth of the frames' pixels is more than their mp4 takes; the files around it, record, figure
    and side-by-side video, take less than another such video.
    """
    video = size.width * size.height * 3 * size.num_frames // 10 + 2**20
    needed, free = video * (videos + 1), shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"--output_path {folder} has {free / 2**20:.0f} MiB free, and the run may write "
            f"{needed / 2**20:.0f} MiB"
        )


@contextlib.contextmanager
def claimed_stem(folder: Path, prefix: str) -> Iterator[Path]:
    """Hold `folder/{prefix}_{index:04d}`, without an ending, for as long as the block runs.

    The index is the first that no file has and no other process holds. A process holds it by a
    hidden file that only one of them can create, and looks for finished files afterwards: whoever
    held it before has either left its files by then or given it up.
    """
    for index in itertools.count():
        stem = folder / f"{prefix}_{index:04d}"
        claim = folder / f".{stem.name}.claim"
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            continue
        try:
            if not any(_with_ending(stem, ending).exists() for ending in ENDINGS):
                yield stem
                return
        finally:
            claim.unlink()


@contextlib.contextmanager
def written_whole(stem: Path, *endings: str) -> Iterator[list[Path]]:
    """Hidden paths to write to, each of which becomes `stem` + its ending once the block succeeds.

    All contents reach the disk before the first name does. Where anything fails, none is left.
    """
    beside = [stem.with_name(f".{stem.name}.part{ending}") for ending in endings]
    named = []
    try:
        yield beside
        for path in beside:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        for path, ending in zip(beside, endings, strict=True):
            # Replaced files, as a record's with more in it, are not taken away again.
            if not _with_ending(stem, ending).exists():
                named.append(_with_ending(stem, ending))
            path.rename(_with_ending(stem, ending))
    except BaseException:
        for path in named:
            path.unlink(missing_ok=True)
        raise
    finally:
        for path in beside:
            path.unlink(missing_ok=True)


def _with_ending(stem: Path, ending: str) -> Path:
    # Not with_suffix: in 42_0.15_0000 the suffix would be .15_0000.
    return stem.with_name(stem.name + ending)
