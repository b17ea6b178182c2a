"""One video's place in the output folder: its name, latents, mp4 and record.

Latents are written ahead of decoding, so that they outlive whatever ends the process, a SIGKILL or
the out-of-memory killer too; they are removed once video and record are there.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base import interruption
from teacache.base.device import is_out_of_memory
from teacache.base.errors import ArgumentError, OutputError, TeaCacheError, reason
from teacache.base.files import with_ending, written_whole
from teacache.results.output_folder import LATENTS_ENDING, claimed_stem
from teacache.results.record import Record
from teacache.results.video import add_comment, write_gif, write_video

if TYPE_CHECKING:
    import torch
    from PIL import Image


class Slot:
    """A name that nobody else has, and what comes to lie under it. Made by `claimed_slot`.

    Args:
        stem: the name, without an ending.
        mp4, json_file: where video and record are written until they get that name.

    Attributes:
        video: the path of the mp4.
        fate_of_latents: what to say of the latents where there is no video; empty before any.
    """

    def __init__(self, stem: Path, mp4: Path, json_file: Path, fate_of_latents: str):
        self.video = with_ending(stem, ".mp4")
        self.fate_of_latents = fate_of_latents
        self._stem, self._mp4, self._json = stem, mp4, json_file
        self._latents: Path | None = None
        self._record: Record | None = None

    def keep(self, latents: torch.Tensor, record: Record) -> None:
        """Write the latents where they outlive this process, with the record so far.

        That is in the output folder, or where it is full or gone, in the system's temporary one.
        """
        from safetensors.torch import save

        named = {"latents": latents.contiguous().cpu()}
        content = save(named, metadata={"record": json.dumps(record.as_json())})
        self.fate_of_latents = "Nothing is kept"
        with contextlib.suppress(OSError):
            self._latents = _written(self._stem, content)
        if self._latents is None:
            prefix, _ = self._stem.name.rsplit("_", 1)
            elsewhere = claimed_stem(Path(tempfile.gettempdir()), prefix)
            with contextlib.suppress(OSError), elsewhere as stem:
                self._latents = _written(stem, content)
        if self._latents:
            self.fate_of_latents = f"The latents are kept, try again with --latents {self._latents}"

    def write(self, frames: list[Image.Image], fps: int, gif: bool = False) -> None:
        """Encode the frames, for `finish` to give the video its name; with a GIF beside it."""
        write_video(frames, self._mp4, fps)
        if gif:
            write_gif(self._mp4, self._stem)

    def finish(self, record: Record) -> None:
        """Write the record, and its settings into the video itself.

        At the end of the block both files get their names, or neither.
        """
        add_comment(self._mp4, json.dumps(record.settings.as_comment(), ensure_ascii=False))
        record.write(self._json)
        self._record = record

    def remove_latents(self) -> None:
        """They are a video now, and so are those of the same video that an earlier try has left."""
        if self._latents is None or self._record is None:
            return
        self._latents.unlink(missing_ok=True)
        settings = self._record.settings
        for path in self._stem.parent.glob(f"{settings.prefix}_*{LATENTS_ENDING}"):
            with contextlib.suppress(ArgumentError):  # of an earlier version, or cut short
                if read_latents(path)[1].settings == settings:
                    path.unlink(missing_ok=True)


@contextlib.contextmanager
def claimed_slot(folder: Path, prefix: str, fate_of_latents: str = "") -> Iterator[Slot]:
    """Hold a slot for as long as the block runs, which writes its video and record.

    What ends the block early says where the latents are: what a user can act on, in the one line of
    an OutputError; anything else, and running out of memory, in a note.

    Args:
        prefix: of the name, `folder/{prefix}_{index:04d}`.
        fate_of_latents: what to say of latents that `keep` has not written.

    Raises:
        OutputError: where the video or its record cannot be written.
    """
    with claimed_stem(folder, prefix) as stem:
        slot = None
        try:
            with written_whole(stem, ".mp4", ".json") as (mp4, json_file):
                slot = Slot(stem, mp4, json_file, fate_of_latents)
                yield slot
        except BaseException as error:
            fate = slot.fate_of_latents if slot else fate_of_latents
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


def read_latents(path: Path) -> tuple[torch.Tensor, Record]:
    """What a slot has kept: latents, and the record of their sampling.

    Raises:
        ArgumentError: where the file is missing, or another.
    """
    from safetensors import SafetensorError, safe_open

    wrong = f"--latents {path} holds no latents of this command's"
    try:
        with safe_open(path, framework="pt") as file:
            latents, data = file.get_tensor("latents"), json.loads(file.metadata()["record"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArgumentError(wrong) from error
    try:
        record = Record.from_json(data)
    except ValueError as error:
        raise ArgumentError(f"{wrong}: {error}") from error
    if latents.ndim != 5 or len(latents) != 1:
        raise ArgumentError(f"{wrong}: of shape {list(latents.shape)}")
    return latents, record


def _written(stem: Path, content: bytes) -> Path:
    with written_whole(stem, LATENTS_ENDING) as (path,):
        path.write_bytes(content)
    return with_ending(stem, LATENTS_ENDING)
