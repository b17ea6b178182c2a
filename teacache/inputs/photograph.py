"""Reads a picture from a file or a URL, upright and in RGB."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.errors import ImageError, reason, without_credentials

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

CONNECT_SECONDS, READ_SECONDS = 10, 30
MOST_BYTES = 50 * 10**6  # of a download
MOST_PIXELS = 100 * 10**6  # of any image; decoded, they take 300 MB


def load_image(source: str, content: bytes | None = None, warn: bool = True) -> Image.Image:
    """The image at a URL or a path, upright and in RGB; `astronaut` is scikit-image's photograph.

    Of an animation the first frame is read. Transparent pixels become white.

    Args:
        content: of the URL, if it is fetched already.
        warn: whether to warn about an animation.

    Raises:
        ImageError: where it cannot be fetched or read, or is too large.
    """
    # Late, for a fast `--help` and fast argument errors.
    from PIL import Image, UnidentifiedImageError

    if source == "astronaut":
        import skimage.data

        return Image.fromarray(skimage.data.astronaut())
    name = f"--image {without_credentials(source)}"
    if content is None and "://" in source:
        content = fetch(source)
    file = Path(source) if content is None else io.BytesIO(content)
    try:
        with Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:  # known from the header
                raise Image.DecompressionBombError
            if warn and (frames := getattr(image, "n_frames", 1)) > 1:
                logger.warning("%s has %d frames: the first is taken", name, frames)
            return upright_rgb(image)
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name} has more than {MOST_PIXELS // 10**6} million pixels: make it smaller"
        ) from None
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is no image that can be read: save it as JPEG or PNG, not as HEIC"
        ) from error
    except Exception as error:  # of a damaged file: each format raises errors of its own
        raise ImageError(f"{name} cannot be read as an image: {reason(error)}") from error


def pixels_sha256(image: Image.Image) -> str:
    """The SHA256 of an image's pixels, for the record."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, rotated as EXIF says, transparent pixels in white."""
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


def fetch(url: str) -> bytes:
    """The content of a URL. Connecting and each read have their own time limits.

    Raises:
        ImageError: where it cannot be fetched, is too large, or is a page of text.
    """
    import requests

    name = f"--image {without_credentials(url)}"
    body = bytearray()
    try:
        with requests.get(url, timeout=(CONNECT_SECONDS, READ_SECONDS), stream=True) as answer:
            if not answer.ok:
                raise ImageError(f"{name}: the server answers {answer.status_code} {answer.reason}")
            if answer.headers.get("Content-Type", "").startswith("text/"):
                raise ImageError(
                    f"{name} is a page of text, not an image: use the URL of the file itself"
                )
            for piece in answer.iter_content(2**16):
                body += piece
                if len(body) > MOST_BYTES:
                    raise ImageError(f"{name} is larger than {MOST_BYTES // 10**6} MB")
    except requests.RequestException as error:
        # The message may hold the whole URL with its credentials, so the kind of error is shown.
        raise ImageError(f"{name} cannot be fetched: {_kind(error)}") from error
    except (OSError, ValueError) as error:  # a missing CA bundle; a redirection to an invalid URL
        raise ImageError(f"{name} cannot be fetched: {error}") from error
    return bytes(body)


def _kind(error: Exception) -> str:
    """The kind of an error in words, `connection error`, and the system's message."""
    if "SOCKS support" in str(error):
        return "a SOCKS proxy needs pysocks: pip install pysocks"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=SSL)", " ", type(error).__name__).lower()
    reason = re.search(r"\[Errno -?\d+\] ([\w ]+)", str(error))
    return f"{words} ({reason[1].lower()})" if reason else words
