"""What a newcomer and a hostile user tried, and what they get now: a video, or one line."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from teacache import video


def noise_frames(count: int, width: int = 64, height: int = 48) -> list[Image.Image]:
    numbers = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Image.fromarray(frame) for frame in numbers]


@pytest.mark.parametrize("folder", ["2026-11-24T10:33", "file:x", "./a:b", "imageio:x", "~", "-y"])
def test_folders_that_ffmpeg_or_imageio_could_take_for_something_else(
    tmp_path, monkeypatch, folder
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path.joinpath(folder).relative_to(tmp_path) / "video.mp4"
    path.parent.mkdir()
    video.write_video(noise_frames(5), path, fps=8)
    assert video.count_frames(path) == 5
    assert video.read_video(path).frames.shape == (5, 48, 64, 3)
    assert [p.name for p in tmp_path.iterdir()] == [path.parent.name]
