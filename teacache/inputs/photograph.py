"""Reads a picture from a file or a URL, upright and in RGB."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from teacache.base.errors import ImageError, reason, without_credentials

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

logger = logging.getLogger(__name__)

CONNECT_SECONDS, READ_SECONDS = 10, 30
MOST_BYTES = 50 * 10**6  # of a download
MOST_PIXELS = 100 * 10**6  # of any image; decoded, they take 300 MB
# What files that people take for photographs begin with; the first match counts.
HEAD_BYTES = 4096
HEIC, RAW, UNKNOWN = "HEIC", "a camera's RAW file", "no image that can be read"
KINDS = {
    rb".{4}ftyp(.{4}){,9}(avif|avis)": "AVIF",
    rb".{4}ftyp(.{4}){,9}(hei[cxms]|hev[cmsx]|mif1|msf1)": HEIC,
    rb".{4}ftypcrx |(II|MM).{6}CR|II(RO|RS|U\0)|MMOR|FUJIFILM|FOVb": RAW,
    rb".{4}ftyp|\x1a\x45\xdf\xa3": "a video",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "JPEG XL",
    rb"%PDF-": "PDF",
    rb"(?i)\W*<(!doctype html|html|head)": "a web page",
    rb"(?i)\W*<(.*<)?svg\b": "SVG",
}
# TIFF's tags of a RAW file, whose first picture is a thumbnail.
NEW_SUBFILE_TYPE, DNG_VERSION = 254, 50706
# The largest numbers of pictures with 8 bits and more. A floating-point one may have 1.
FULL_SCALES = (2**8 - 1, 2**10 - 1, 2**12 - 1, 2**14 - 1, 2**16 - 1)


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
    kind = UNKNOWN
    try:
        with Path(source).open("rb") if content is None else io.BytesIO(content) as file:
            kind = _kind_of(file)
            with Image.open(file) as image:
                tags = getattr(image, "tag_v2", {})
                if kind == RAW or DNG_VERSION in tags or tags.get(NEW_SUBFILE_TYPE) == 1:
                    kind = RAW
                    raise UnidentifiedImageError
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
        how = "save it as JPEG or PNG"
        if kind == HEIC and importlib.util.find_spec("pillow_heif") is None:
            how = "pip install pillow-heif==1.8.1, or convert it: heif-convert IN.heic OUT.jpg"
        raise ImageError(f"{name} is {kind}: {how}") from error
    except Exception as error:  # of a damaged file: each format raises errors of its own
        raise ImageError(f"{name} cannot be read as an image: {reason(error)}") from error


def _kind_of(file: BinaryIO) -> str:
    """What a file is by its first bytes, if it is none of Pillow's own formats.

    HEIC becomes one of them where its package is installed.
    """
    head = file.read(HEAD_BYTES)
    file.seek(0)
    matching = (kind for start, kind in KINDS.items() if re.match(start, head, re.DOTALL))
    kind = next(matching, UNKNOWN)
    if kind == HEIC:
        with contextlib.suppress(ImportError):
            import pillow_heif  # optional

            pillow_heif.register_heif_opener()
    return kind


def pixels_sha256(image: Image.Image) -> str:
    """The SHA256 of an image's pixels, for the record."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit RGB, rotated as EXIF says, transparent pixels in white."""
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":  # 16 bits a pixel, or more
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    paper = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(paper, upright.convert("RGBA")).convert("RGB")


def _eight_bits(numbers: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, or in floating point, in 8 bits.

    White is the largest number of the fewest bits that hold all of them, or 1 in floating point.

    Args:
        numbers: [height, width]. Floating-point numbers may overshoot by a tenth.

    Raises:
        ValueError: where no such white is likely, so that the picture might come out black.
    """
    import numpy as np

    least, most, mean = numbers.min(), numbers.max(), numbers.mean(dtype=np.float64)
    floating = numbers.dtype.kind == "f"
    margin = 1.1 if floating else 1.0
    whites = (1, *FULL_SCALES) if floating else FULL_SCALES
    white = next((white for white in whites if most <= white * margin), math.nan)
    dark = floating and white > 1 and (most < white / 4 or mean < white / 64)
    if dark or not least >= white * (1 - margin):
        raise ValueError(
            f"its numbers, from {least:g} to {most:g}, are of no usual scale: save it with 8 bits"
        )
    return (numbers.clip(0, white) * (255 / white)).astype(np.uint8)


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
