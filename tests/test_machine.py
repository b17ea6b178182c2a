"""What the machine, and the files on it, may lack: told in one line, or done without."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from teacache import video


def noise_frames(count: int, width: int, height: int) -> list[Image.Image]:
    numbers = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
    return [Image.fromarray(frame) for frame in numbers]


def test_the_size_of_a_video_is_known_before_its_frames_are(tmp_path):
    path = tmp_path / "12:30 video.mp4"
    video.write_video(noise_frames(5, width=64, height=48), path, fps=8)
    assert video.probe(path) == (64, 48, 5)
    frames = video.read_video(path).frames
    assert video.probe(path) == (frames.shape[2], frames.shape[1], frames.shape[0])


@pytest.mark.parametrize("content", [None, b"", b"no video at all" * 100])
def test_what_is_no_video_has_no_size(tmp_path, content):
    path = tmp_path / "video.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((OSError, RuntimeError)):
        video.probe(path)


def test_a_file_of_sound_alone_has_no_size(tmp_path):
    import subprocess

    import imageio_ffmpeg

    path = tmp_path / "sound.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"]
    subprocess.run([*command, *"-f lavfi -i sine=duration=1".split(), path], check=True)
    with pytest.raises((OSError, RuntimeError)):
        video.probe(path)
