"""Frames to an mp4 and back, and several videos side by side."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.base.errors import OutputError
from teacache.base.quiet import silent_programs

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

FULL_BYTES = 2**16  # Below this much free space, report a full disk as the cause.
# Pixels: of a whole grid at most, unless its cells would become too small to see anything in.
GRID_WIDTH = 1920
CELL_WIDTH = (320, 160)  # a small video is enlarged to the first; none shrinks below the second


class Video(NamedTuple):
    """frames: [frames, height, width, 3], uint8 RGB; fps: frames a second."""

    frames: np.ndarray
    fps: float


def write_video(frames: list[Image.Image], path: Path, fps: int) -> None:
    """Encode frames as H.264 in yuv420p, with the encoder settings of the published sampler.

    Raises:
        OSError: where the file does not hold every frame afterwards, as on a full disk, with what
            the last line of the encoder; it may end as if all were well.
    """
    from diffusers.utils import export_to_video

    with silent_programs() as last_said:
        with contextlib.suppress(OSError):  # a pipe to an encoder that has ended: it tells why
            export_to_video(frames, _unmistakable(path), fps=fps)
        written = count_frames(path)
        if written != len(frames):
            # ffmpeg names the part of it that speaks: [out#0/mp4 @ 0x55d0c8a1] ...
            complaint = (
                re.sub(r"^(\[[^]]*\] *)+", "", last_said()).rstrip(".") or "it does not say why"
            )
            if shutil.disk_usage(path.parent).free < FULL_BYTES:
                complaint = os.strerror(errno.ENOSPC)  # ffmpeg's last line need not mention it
            raise OSError(f"the encoder wrote {written} of {len(frames)} frames: {complaint}")


def count_frames(path: Path) -> int:
    """How many frames a video holds; 0 where it cannot be read as one."""
    from imageio_ffmpeg import count_frames_and_secs

    try:
        return count_frames_and_secs(_unmistakable(path))[0]
    except (OSError, RuntimeError):
        return 0


def _unmistakable(path: Path) -> str:
    """The path in a form that is taken for nothing else.

    Of a relative one ffmpeg takes for a protocol what stands before a colon, as in a time stamp,
    and imageio for a home directory a folder that is named `~`.
    """
    return str(path.absolute())


def check_encoder() -> None:
    """Raise OutputError where there is no ffmpeg to write a video with."""
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_version()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise OutputError(
            "ffmpeg, which imageio-ffmpeg brings, does not run here: install that anew, or set "
            f"IMAGEIO_FFMPEG_EXE to another ({type(error).__name__})"
        ) from error


def read_video(path: Path) -> Video:
    """Decode an mp4."""
    import imageio
    import numpy as np

    with imageio.get_reader(_unmistakable(path), "ffmpeg") as reader:
        return Video(np.stack(list(reader.iter_data())), reader.get_meta_data()["fps"])


def probe(path: Path) -> tuple[int, int, int]:
    """A video's width, height and number of frames, of which none is kept in memory.

    Raises:
        OSError, RuntimeError: where it cannot be read as a video.
    """
    from imageio_ffmpeg import count_frames_and_secs, read_frames

    name = _unmistakable(path)
    with contextlib.closing(read_frames(name)) as reader:
        width, height = next(reader)["size"]
    return width, height, count_frames_and_secs(name)[0]


def write_grid(videos: list[np.ndarray], labels: list[str], path: Path, fps: int) -> None:
    """Write videos side by side, each below its label.

    Args:
        videos: each [frames, height, width, 3], uint8, all of one size; where one is shorter its
            last frame stays.
        labels: one for each, of one or more lines.
    """
    import numpy as np

    columns = math.ceil(math.sqrt(len(videos)))
    lines = math.ceil(len(videos) / columns)
    _, height, width, _ = videos[0].shape
    cell_width = _even(min(max(width, CELL_WIDTH[0]), max(GRID_WIDTH // columns, CELL_WIDTH[1])))
    cell_height = _even(cell_width * height / width)
    captions = [_caption(label, cell_width) for label in labels]
    caption_height = max(len(caption) for caption in captions)

    frames = []
    for n in range(max(map(len, videos))):
        page = np.zeros((lines * (caption_height + cell_height), columns * cell_width, 3), np.uint8)
        for i, (video, caption) in enumerate(zip(videos, captions, strict=True)):
            left, top = i % columns * cell_width, i // columns * (caption_height + cell_height)
            page[top : top + len(caption), left : left + cell_width] = caption
            top += caption_height
            cell = _resized(video[min(n, len(video) - 1)], cell_width, cell_height)
            page[top : top + cell_height, left : left + cell_width] = cell
        frames.append(page)
    write_video([_as_image(page) for page in frames], path, fps)


def _caption(label: str, width: int) -> np.ndarray:
    """White text on black, [height, width, 3], as high as its lines need."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=16)
    longest = max(font.getlength(line) for line in label.splitlines())
    if longest > width - 12:
        font = ImageFont.load_default(size=16 * (width - 12) / longest)
    picture = Image.new("RGB", (width, 48))
    ImageDraw.Draw(picture).multiline_text((6, 4), label, font=font, spacing=4)
    return np.array(picture)


def _resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    import numpy as np
    from PIL import Image

    return np.array(_as_image(frame).resize((width, height), Image.Resampling.LANCZOS))


def _as_image(frame: np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(frame)


def _even(pixels: float) -> int:
    # The encoder works in squares of 16 pixels, and would stretch anything else to them.
    return max(16, round(pixels / 16) * 16)
