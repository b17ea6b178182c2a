"""A picture from a file or a server, whatever its kind, upright and in RGB; or why not."""

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
MOST_BYTES = 50 * 10**6  # of an image that is fetched
MOST_PIXELS = 100 * 10**6  # of any image; decoded, they take 300 MB


def load_image(source: str) -> Image.Image:
    """The image at a URL or a path, upright and in RGB; `astronaut` is scikit-image's photograph.

    Of an animation it is the first frame; what is transparent becomes white.

    Raises:
        ImageError: where it cannot be fetched or read, or is too large to be a photograph.
    """
    # Inside: `--help` and arguments that are refused need neither.
    from PIL import Image, UnidentifiedImageError

    if source == "astronaut":
        import skimage.data

        return Image.fromarray(skimage.data.astronaut())
    name = f"--image {without_credentials(source)}"
    # Of a file that is too large the header is enough.
    file = io.BytesIO(_fetch(source, name)) if "://" in source else Path(source)
    try:
        with Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            if (frames := getattr(image, "n_frames", 1)) > 1:
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
    except Exception as error:  # of a broken file: it depends on the format and on the place
        raise ImageError(f"{name} cannot be read as an image: {reason(error)}") from error


def pixels_sha256(image: Image.Image) -> str:
    """Digest of an image's pixels, which are on record."""
    return hashlib.sha256(image.tobytes()).hexdigest()


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
    """What is at a URL: connecting and each read have a limit of their own.

    Args:
        name: of the image, in an error.
    """
    import requests

    body = bytearray()
    try:
        with requests.get(url, timeout=(CONNECT_SECONDS, READ_SECONDS), stream=True) as answer:
            if not answer.ok:
                raise ImageError(f"{name}: the server answers {answer.status_code} {answer.reason}")
            if answer.headers.get("Content-Type", "").startswith("text/"):
                raise ImageError(f"{name} is a page of text, not an image: name the file itself")
            for piece in answer.iter_content(2**16):
                body += piece
                if len(body) > MOST_BYTES:
                    raise ImageError(f"{name} is larger than {MOST_BYTES // 10**6} MB")
    except requests.RequestException as error:
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
