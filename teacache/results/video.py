"""Frames to an mp4 and back."""

from __future__ import annotations

import contextlib
import errno
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

FPS = 8  # frames a second, those that the model was trained on
FULL_BYTES = 2**16  # Below this much free space, report a full disk as the cause.


class Video(NamedTuple):
    """frames: [frames, height, width, 3], uint8 RGB; fps: frames a second."""

    frames: np.ndarray
    fps: float


def write_video(frames: list[Image.Image], path: Path) -> None:
    """Encode frames as H.264 in yuv420p, with the encoder settings of the published sampler.

    Raises:
        OSError: where the file does not hold every frame afterwards, as on a full disk, with the
            encoder's last line; it may end as if all were well.
    """
    from diffusers.utils import export_to_video

    with silent_programs() as last_said:
        with contextlib.suppress(OSError):  # a pipe to an encoder that has ended: it tells why
            export_to_video(frames, _unmistakable(path), fps=FPS)
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
