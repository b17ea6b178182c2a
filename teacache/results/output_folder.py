"""The output folder: its checks before a run, and the names of its files."""

import contextlib
import hashlib
import itertools
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from teacache.base.errors import OutputError, reason
from teacache.base.files import locked, with_ending
from teacache.results.video import QUALITY

LATENTS_ENDING = ".latents.safetensors"
ENDINGS = (".mp4", ".json", ".md", ".png", LATENTS_ENDING)  # of all files that a name may have


@contextlib.contextmanager
def prepared_folder(folder: Path) -> Iterator[None]:
    """Create the output folder where it is missing. If the block leaves it empty, remove it again.

    Raises:
        OutputError: where it cannot be created or written to.
    """
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise OutputError(f"--output_path {folder} is a file, not a folder") from None
    except (OSError, ValueError) as error:  # ValueError: an invalid name
        raise OutputError(f"--output_path {folder} cannot be made: {reason(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"--output_path {folder} cannot be written to")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def check_space(
    folder: Path, size: tuple[int, int, int], videos: int, quality: float = QUALITY
) -> None:
    """Raise OutputError where the disk has too little free space for a run.

    An mp4 takes less than a tenth of its frames' bytes; above the published quality less than six
    tenths, as 4:2:0 colour has half of the bytes. All other files together (latents, record,
    figure, side-by-side video) take less than one more video. size: see `VideoSize`.
    """
    tenths = 1 if quality <= QUALITY else 6
    video = math.prod(size) * 3 * tenths // 10 + 2**20
    needed, free = video * (videos + 1), shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"--output_path {folder} has {free / 2**20:.0f} MiB free, and the run may write "
            f"{needed / 2**20:.0f} MiB"
        )


@contextlib.contextmanager
def claimed_stem(folder: Path, prefix: str, latents: Path | None = None) -> Iterator[Path]:
    """Hold a free name, `folder/{prefix}_{index:04d}` without an ending, while the block runs.

    The index is the lowest without files and without a process that holds the name. A process
    looks for files only while it holds the name. The name of an earlier run's latents, if they are
    in the folder, comes first.
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


def locked_name(folder: Path, name: str) -> contextlib.AbstractContextManager[bool]:
    """Hold the lock of a name in the folder without waiting, see `teacache.base.files.locked`."""
    return locked(lock_file(folder, name))


def lock_file(folder: Path, name: str) -> Path:
    """The hidden file of the lock. The name may have any characters."""
    return folder / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.lock"
