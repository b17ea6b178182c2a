"""Frames to an mp4, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class Video(NamedTuple):
    """frames: [frames, height, width, 3], uint8 RGB; fps: frames a second."""

    frames: np.ndarray
    fps: float


def write_video(frames: list[Image.Image], path: Path, fps: int) -> None:
    """Encode frames as H.264 in yuv420p, with the encoder settings of the published sampler."""
    from diffusers.utils import export_to_video

    export_to_video(frames, str(path), fps=fps)


def read_video(path: Path) -> Video:
    """Decode an mp4."""
    import imageio
    import numpy as np

    with imageio.get_reader(path, "ffmpeg") as reader:
        return Video(np.stack(list(reader.iter_data())), reader.get_meta_data()["fps"])
