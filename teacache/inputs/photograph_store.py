"""The photographs of many videos, outside memory."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import IO, TYPE_CHECKING, NamedTuple

from teacache.base.errors import ImageError, reason, without_credentials
from teacache.inputs.photograph import fetch, load_image, pixels_sha256

if TYPE_CHECKING:
    from PIL import Image


class Photograph(NamedTuple):
    """The size of a photograph in pixels, and the digest of its pixels."""

    width: int
    height: int
    sha256: str


class PhotographStore:
    """The photographs of a run, by their sources. Of all but the last, no pixels are in memory.

    Each URL is fetched once. The files are in a temporary file without a name, which no end of the
    process leaves behind.
    """

    def __init__(self) -> None:
        self._looked_at: dict[str, Photograph] = {}
        self._last: tuple[str, Image.Image] | None = None
        self._fetched: dict[str, tuple[int, int]] = {}  # offset and number of bytes

    def look_at(self, source: str) -> Photograph:
        """Read a photograph.

        Raises:
            ImageError: where it cannot be fetched or read, or is too large.
        """
        if source not in self._looked_at:
            image = load_image(source, self._content(source))
            self._last = source, image
            self._looked_at[source] = Photograph(image.width, image.height, pixels_sha256(image))
        return self._looked_at[source]

    def load(self, source: str) -> Image.Image:
        """The pixels of a photograph.

        Raises:
            ImageError: where they are not those of `look_at` any more.
        """
        seen = self.look_at(source)
        if self._last and self._last[0] == source:
            return self._last[1]
        image = load_image(source, self._content(source), warn=False)
        if seen != (image.width, image.height, pixels_sha256(image)):
            name = without_credentials(source)
            raise ImageError(f"--image {name} has changed since this run began: run it again")
        return image

    def _content(self, source: str) -> bytes | None:
        """The bytes at a URL; None for a file."""
        if "://" not in source:
            return None
        if source not in self._fetched:
            content = fetch(source)
            try:
                self._fetched[source] = self._file.seek(0, os.SEEK_END), len(content)
                self._file.write(content)
                self._file.flush()
            except OSError as error:  # a full disk
                where = f"{tempfile.gettempdir()}: {reason(error)}"
                raise ImageError(f"--image {without_credentials(source)}: {where}") from error
        offset, count = self._fetched[source]
        self._file.seek(offset)
        return self._file.read(count)

    @functools.cached_property
    def _file(self) -> IO[bytes]:
        return tempfile.TemporaryFile()  # until the process ends
