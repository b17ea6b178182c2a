"""One video's place in the output folder: its name, latents, mp4 and record.

Latents are written ahead of decoding, so that they outlive whatever ends the process, a SIGKILL or
the out-of-memory killer too; they are removed once video and record are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from teacache.base import interruption
from teacache.base.device import is_out_of_memory
from teacache.base.errors import OutputError, TeaCacheError, reason
from teacache.base.files import with_ending, written_whole
from teacache.results.output_folder import LATENTS_ENDING, claimed_stem
from teacache.results.record import Record, Settings
from teacache.results.video import write_video

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Slot:
    """A name that nobody else has, and what comes to lie under it. Made by `claimed_slot`.

    Args:
        stem: the name, without an ending.
        mp4, json_file: where video and record are written until they get that name.
        latents: a file that an earlier run has kept.

    Attributes:
        video: the path of the mp4.
        fate_of_latents: what to say of the latents where there is no video; empty before any.
    """

    def __init__(self, stem: Path, mp4: Path, json_file: Path, latents: Path | None):
        self.video = with_ending(stem, ".mp4")
        self.fate_of_latents = ""
        self._stem, self._mp4, self._json = stem, mp4, json_file
        self._latents = latents
        self._record: Record | None = None

    def keep(self, latents: torch.Tensor, record: Record) -> None:
        """Write the latents where they outlive this process, with the record so far.

        That is in the output folder, or where it is full or gone, in the system's temporary one.
        """
        self.fate_of_latents = "Nothing is kept"
        if self._latents is None:
            named = {"latents": latents.contiguous().cpu()}
            content = save(named, metadata={"record": json.dumps(record.as_json())})
            with contextlib.suppress(OSError):
                self._latents = _written(self._stem, content)
        if self._latents is None:
            prefix, _ = self._stem.name.rsplit("_", 1)
            elsewhere = claimed_stem(Path(tempfile.gettempdir()), prefix)
            with contextlib.suppress(OSError), elsewhere as stem:
                self._latents = _written(stem, content)
        if self._latents:
            self.fate_of_latents = (
                f"The latents are kept in {self._latents}, try again with --resume"
            )

    def write(self, frames: list[Image.Image]) -> None:
        """Encode the frames, for `finish` to give the video its name."""
        write_video(frames, self._mp4)

    def finish(self, record: Record) -> None:
        """Write the record. At the end of the block both files get their names, or neither."""
        record.write(self._json)
        self._record = record

    def remove_latents(self) -> None:
        """They are a video now, and so are those of the same video that an earlier try has left."""
        if self._latents is None or self._record is None:
            return
        self._latents.unlink(missing_ok=True)
        for path, _ in find_latents(self._stem.parent, self._record.settings):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed_slot(folder: Path, prefix: str, latents: Path | None = None) -> Iterator[Slot]:
    """Hold a slot for as long as the block runs, which writes its video and record.

    What ends the block early says where the latents are: what a user can act on, in the one line of
    an OutputError; anything else, and running out of memory, in a note.

    Args:
        prefix: of the name, `folder/{prefix}_{index:04d}`.
        latents: a file of the video's latents that an earlier run has kept; its name is taken.

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
            fate = slot.fate_of_latents if slot else ""
            # An interruption stays one, whatever a library has made of it.
            foreseen = (
                isinstance(error, (OSError, TeaCacheError)) and not interruption.stop_requested()
            )
            if fate and foreseen and not is_out_of_memory(error):
                message = f"the video cannot be written to {folder}: {reason(error)}. {fate}"
                raise OutputError(message) from error
            if fate:
                error.add_note(fate)
            raise
        slot.remove_latents()


def find_latents(folder: Path, settings: Settings) -> Iterator[tuple[Path, Record]]:
    """The files of latents that `Slot.keep` has written of a video, each with the record in it.

    Whether they are decoded in tiles makes no difference to them.
    """
    for where in (folder, Path(tempfile.gettempdir())):
        for path in sorted(where.glob(f"{settings.prefix}_*{LATENTS_ENDING}")):
            # Of an earlier version, cut short, or removed by another process meanwhile.
            with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):
                with safe_open(path, framework="pt") as file:
                    record = Record.from_json(json.loads(file.metadata()["record"]))
                found = dataclasses.replace(record.settings, vae_tiling=settings.vae_tiling)
                if found == settings:
                    yield path, record


def _written(stem: Path, content: bytes) -> Path:
    with written_whole(stem, LATENTS_ENDING) as (path,):
        path.write_bytes(content)
    return with_ending(stem, LATENTS_ENDING)
