"""One video's place in the output folder: its name, latents, mp4 and record.

The latents are written before they are decoded, so that no end of the process loses them, not even
SIGKILL. They are removed when video and record are complete.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from teacache.base import interruption
from teacache.base.device import is_out_of_memory
from teacache.base.errors import OutputError, TeaCacheError, reason
from teacache.base.files import with_ending, written_whole
from teacache.results.output_folder import LATENTS_ENDING, claimed_stem
from teacache.results.record import Record, Settings
from teacache.results.video import write_video


class Slot:
    """A name of its own in the output folder, and its files. Made by `claimed_slot`.

    Args:
        mp4, json_file: temporary paths of video and record.
        latents: the file of latents of an earlier run, or None.

    Attributes:
        video: the path of the mp4.
        latents_note: where the latents are, for an error message; empty before `keep`.
    """

    def __init__(self, stem: Path, mp4: Path, json_file: Path, latents: Path | None):
        self.video = with_ending(stem, ".mp4")
        self.latents_note = ""
        self._stem, self._mp4, self._json = stem, mp4, json_file
        self._latents = latents
        self._record: Record | None = None

    def keep(self, latents: torch.Tensor, record: Record) -> None:
        """Write the latents and the record so far, unless an earlier run has.

        They go to the output folder; where that is full or gone, to the system's temporary folder.
        """
        self.latents_note = "Nothing is kept"
        if self._latents is None:
            named = {"latents": latents.contiguous().cpu()}
            content = save(named, metadata={"record": json.dumps(record.as_json())})
            elsewhere = claimed_stem(Path(tempfile.gettempdir()), record.settings.prefix)
            for place in (contextlib.nullcontext(self._stem), elsewhere):
                with contextlib.suppress(OSError), place as stem:
                    with written_whole(stem, LATENTS_ENDING) as (path,):
                        path.write_bytes(content)
                    self._latents = with_ending(stem, LATENTS_ENDING)
                    break
        if self._latents:
            self.latents_note = f"The latents are kept in {self._latents}, try again with --resume"

    def write(self, frames: list[Image.Image], quality: float) -> int:
        """Encode the frames into the temporary mp4, with a quality of 0 to 10; return its bytes."""
        write_video(frames, self._mp4, quality)
        return self._mp4.stat().st_size

    def finish(self, record: Record) -> None:
        """Write the temporary record. At the end of the block both files get their names."""
        record.write(self._json)
        self._record = record

    def remove_latents(self) -> None:
        """Remove the latents, and those of earlier runs with the same settings."""
        if self._latents is None or self._record is None:
            return
        self._latents.unlink(missing_ok=True)
        for path, _ in find_latents(self._stem.parent, self._record.settings):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed_slot(folder: Path, prefix: str, latents: Path | None = None) -> Iterator[Slot]:
    """Hold a slot while the block runs, which writes video and record: both or neither.

    An error of the block also says where the latents are: an error that a user can act on becomes
    an OutputError, in one line; any other, and running out of memory, gets a note.

    Its name is `folder/{prefix}_{index:04d}`, or that of an earlier run's latents.

    Raises:
        OutputError: where the video or its record cannot be written.
    """
    with claimed_stem(folder, prefix, latents) as stem:
        slot = None
        try:
            with written_whole(stem, ".mp4", ".json") as (mp4, json_file):
                slot = Slot(stem, mp4, json_file, latents)
                yield slot
        except BaseException as error:
            note = slot.latents_note if slot else ""
            # After a signal no error is turned into another.
            usual = isinstance(error, (OSError, TeaCacheError)) and not is_out_of_memory(error)
            if note and usual and not interruption.stop_requested():
                message = f"the video cannot be written to {folder}: {reason(error)}. {note}"
                raise OutputError(message) from error
            if note:
                error.add_note(note)
            raise
        slot.remove_latents()


def find_latents(folder: Path, settings: Settings) -> Iterator[tuple[Path, Record]]:
    """The files that `Slot.keep` has written for these settings, each with the record in it.

    Tiles of the VAE and the mp4's quality may differ, since latents do not depend on them.
    """
    for where in (folder, Path(tempfile.gettempdir())):
        for path in sorted(where.glob(f"{settings.prefix}_*{LATENTS_ENDING}")):
            # Skip files that are damaged, of another version, or removed by another process.
            with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
                with safe_open(path, framework="pt") as file:
                    record = Record.from_json(json.loads(file.metadata()["record"]))
                later = {name: getattr(settings, name) for name in ("vae_tiling", "mp4_quality")}
                if settings == dataclasses.replace(record.settings, **later):
                    yield path, record
