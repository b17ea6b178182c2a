"""Writes and reads mp4 files."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.base.errors import OutputError, reason
from teacache.base.quiet import silent_programs

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

FPS = 8  # frames a second, as in the training of the model
QUALITY = 5.0  # of 0 to 10, as published: x264's crf 25
# ffmpeg converts sRGB to YUV by the matrix of BT.601 in limited range. The published mp4 does not
# say so, and some players take that of BT.709. Written into the stream, it changes no pixel;
# ffmpeg's own options would have the frames converted by what they name.
COLOURS = (
    "h264_metadata=matrix_coefficients=6:video_full_range_flag=0"
    ":colour_primaries=1:transfer_characteristics=13"
)


class DecodedVideo(NamedTuple):
    """frames: [frames, height, width, 3], uint8 RGB; fps: frames a second."""

    frames: np.ndarray
    fps: float


def write_video(frames: list[Image.Image], path: Path, quality: float = QUALITY) -> None:
    """Encode frames as H.264 in yuv420p, with the encoder settings of the published sampler.

    Players can begin before they have the whole file, and know its colours.

    Args:
        quality: 0 to 10, as of diffusers' `export_to_video`.

    Raises:
        OSError: where the file lacks frames, for instance on a full disk; with the encoder's last
            line. The encoder itself may report success.
    """
    import imageio
    import numpy as np

    options = ["-movflags", "+faststart", "-bsf:v", COLOURS]
    if quality < 1:  # imageio refuses it; by its own formula
        options += ["-crf", str(int((1 - quality / 10) * 51))]
    with silent_programs() as last_line:
        writer = imageio.get_writer(
            _absolute(path),
            fps=FPS,
            quality=None if quality < 1 else quality,
            output_params=options,
        )
        with (
            contextlib.suppress(OSError),  # a broken pipe: the encoder's output says more
            contextlib.closing(writer),  # itself it would let the encoder go on after an error
        ):
            for frame in frames:
                writer.append_data(np.array(frame))
        written = count_frames(path)
        if written != len(frames):
            # Without ffmpeg's prefix: [out#0/mp4 @ 0x55d0c8a1] ...
            cause = re.sub(r"^(\[[^]]*\] *)+", "", last_line()).rstrip(".") or "no message"
            if shutil.disk_usage(path.parent).free < 2**16:
                cause = os.strerror(errno.ENOSPC)  # ffmpeg's last line may not mention it
            raise OSError(f"the encoder wrote {written} of {len(frames)} frames: {cause}")


def count_frames(path: Path) -> int:
    """The number of frames of a video; 0 where it cannot be read."""
    from imageio_ffmpeg import count_frames_and_secs

    try:
        return count_frames_and_secs(_absolute(path))[0]
    except (OSError, RuntimeError):
        return 0


def _absolute(path: Path) -> str:
    # Of a relative path ffmpeg would read `a:b` as a protocol, and imageio `~` as the home folder.
    return str(path.absolute())


def check_encoder() -> None:
    """Raise OutputError where ffmpeg does not run."""
    import imageio_ffmpeg

    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
        told = subprocess.check_output(command, stderr=subprocess.DEVNULL)
        if not told.startswith(b"ffmpeg version"):
            raise RuntimeError("it is no ffmpeg")
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        own = os.environ.get("IMAGEIO_FFMPEG_EXE")
        which = f"IMAGEIO_FFMPEG_EXE={own}" if own else "the ffmpeg that imageio-ffmpeg brings"
        raise OutputError(
            f"{which} does not run here ({reason(error)}): set IMAGEIO_FFMPEG_EXE to an ffmpeg, or "
            "unset it and reinstall imageio-ffmpeg"
        ) from error


def read_video(path: Path) -> DecodedVideo:
    """Decode an mp4."""
    import imageio
    import numpy as np

    with imageio.get_reader(_absolute(path), "ffmpeg") as reader:
        return DecodedVideo(np.stack(list(reader.iter_data())), reader.get_meta_data()["fps"])
