"""A picture from a file or a server, whatever its kind, upright and in RGB; or why not."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import select
import stat
import struct
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.errors import ImageError, reason, without_credentials

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

# What Pillow raises for a broken file depends on the format and on where it is broken.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, RuntimeError),
    *(TypeError, LookupError, OverflowError),
)

CONNECT_SECONDS, READ_SECONDS, FETCH_SECONDS = 10, 30, 60
MOST_BYTES = 50 * 10**6  # of an image that is fetched, or comes through a pipe
MOST_PIXELS = 100 * 10**6  # of any image; decoded, they take 300 MB
MOST_ELONGATED = 20  # Panoramas are less. Detectors scale a picture down, and a strip to nothing.


def load_image(source: str) -> Image.Image:
    """The image at a URL or a path, upright and in RGB; `astronaut` is scikit-image's photograph.

    Of an animation it is the first frame; what is transparent becomes white.

    Raises:
        ImageError: where it cannot be fetched or read, or is too large to be a photograph.
    """
    from PIL import Image, UnidentifiedImageError

    if source == "astronaut":
        import skimage.data

        return Image.fromarray(skimage.data.astronaut())
    name = f"--image {without_credentials(source)}"
    try:
        file = _open(source, name)
        with Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            if max(image.size) > MOST_ELONGATED * min(image.size):
                raise ImageError(
                    f"{name} is {image.width}x{image.height}, a strip: take a photograph"
                )
            if (frames := getattr(image, "n_frames", 1)) > 1:
                logger.warning("%s has %d frames: the first is taken", name, frames)
            return upright_rgb(image)
    except MemoryError as error:
        raise ImageError(f"{name} takes more memory than there is: make it smaller") from error
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name} has more than {MOST_PIXELS // 10**6} million pixels: make it smaller"
        ) from None
    except UnidentifiedImageError as error:
        size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
        what = "is empty" if size == 0 else "is no image that can be read"
        raise ImageError(f"{name} {what}") from error
    except _BROKEN as error:
        raise ImageError(f"{name} cannot be read as an image: {reason(error)}") from error


def pixels_sha256(image: Image.Image) -> str:
    """Digest of an image's pixels, which are on record."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def _open(source: str, name: str) -> Path | io.BytesIO:
    """A file by its path, since of a picture too large the header is enough; else all there is.

    Args:
        name: of the image, in an error.
    """
    if "://" in source:
        return io.BytesIO(_fetch(source, name))
    path = Path(source)
    return path if stat.S_ISREG(path.stat().st_mode) else io.BytesIO(_read_pipe(path, name))


def _read_pipe(path: Path, name: str) -> bytes:
    """What somebody writes to a FIFO, or to the pipe of a process substitution, to its end."""
    content = bytearray()
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else it waits for a writer
    with open(descriptor, "rb", buffering=0) as pipe:
        while len(content) <= MOST_BYTES:
            if not select.select([pipe], [], [], READ_SECONDS)[0]:
                raise ImageError(f"{name}: nothing to read from it for {READ_SECONDS} s")
            piece = pipe.read(2**16)
            if piece == b"":
                return bytes(content)
            content += piece or b""  # None: somebody else was quicker
    raise ImageError(f"{name} is larger than {MOST_BYTES // 10**6} MB")


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture as it is to be seen: turned as EXIF says, 8 bits, transparency on white."""
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":  # 16 bits a pixel, or more
        numbers = np.asarray(upright, np.float64)
        largest = 65535 if numbers.max(initial=0) > 255 else 255
        upright = Image.fromarray((numbers.clip(0, largest) * (255 / largest)).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    paper = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(paper, upright.convert("RGBA")).convert("RGB")


def _fetch(url: str, name: str) -> bytes:
    """What is at a URL: connecting and each read have a limit of their own, and so has the whole.

    Args:
        name: of the image, in an error.
    """
    import requests
    import urllib3

    body = bytearray()
    last = time.monotonic() + FETCH_SECONDS
    try:
        with requests.get(url, timeout=(CONNECT_SECONDS, READ_SECONDS), stream=True) as answer:
            if not answer.ok:
                raise ImageError(f"{name}: the server answers {answer.status_code} {answer.reason}")
            if answer.headers.get("Content-Type", "").startswith("text/"):
                raise ImageError(f"{name} is a page of text, not an image: name the file itself")
            if int(answer.headers.get("Content-Length", 0)) > MOST_BYTES:
                raise ImageError(f"{name} is larger than {MOST_BYTES // 10**6} MB")
            # As it comes: to wait for a block of some size is to wait as long as the server likes.
            while piece := answer.raw.read1(2**16, decode_content=True):
                body += piece
                if time.monotonic() > last:
                    raise ImageError(f"{name} does not arrive within {FETCH_SECONDS} s")
                if len(body) > MOST_BYTES:
                    raise ImageError(f"{name} is larger than {MOST_BYTES // 10**6} MB")
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise ImageError(
            f"{name}: no answer from the server within {CONNECT_SECONDS} s to connect "
            f"and {READ_SECONDS} s to read"
        ) from error
    except requests.TooManyRedirects as error:
        raise ImageError(f"{name}: the server redirects again and again") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        # What requests says may hold the whole URL; the kind of error is what can be acted on.
        raise ImageError(f"{name} cannot be fetched: {_kind(error)}") from error
    except (OSError, ValueError) as error:  # a missing CA bundle; a redirection to no URL
        raise ImageError(f"{name} cannot be fetched: {error}") from error
    return bytes(body)


def _kind(error: Exception) -> str:
    """`ConnectionError` as "connection error", and what the system says of it."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=SSL)", " ", type(error).__name__).lower()
    reason = re.search(r"\[Errno -?\d+\] ([\w ]+)", str(error))
    return f"{words} ({reason[1].lower()})" if reason else words
