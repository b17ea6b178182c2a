"""What the machine, and the files on it, may lack: told in one line, or done without."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
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
    import imageio_ffmpeg

    path = tmp_path / "sound.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error"]
    subprocess.run([*command, *"-f lavfi -i sine=duration=1".split(), path], check=True)
    with pytest.raises((OSError, RuntimeError)):
        video.probe(path)


CHECK = "from teacache.environment import check_environment; check_environment()"


def check_environment(*options: str, limit: int | None = None, **variables: str) -> str:
    """What the check raises in a process of its own: the last line; "" where all is well."""

    def limited() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    ended = subprocess.run(
        [sys.executable, *options, "-c", CHECK],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=limited,
        env={**os.environ, **variables},
    )
    assert (ended.returncode == 0) == (not ended.stderr)
    return (ended.stderr.splitlines() or [""])[-1]


def test_this_machine_has_what_is_needed():
    assert check_environment() == ""


@pytest.mark.parametrize("library", ["libGL.so.1", "libgthread-2.0.so.0"])
def test_a_server_without_a_screen_is_told_what_to_install(tmp_path, library):
    said = f"{library}: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text(f"raise ImportError({said!r})")
    assert check_environment(PYTHONPATH=str(tmp_path)) == (
        f"teacache.errors.DeviceError: opencv does not find {library}: "
        "apt-get install libgl1 libglib2.0-0"
    )


def test_an_opencv_that_is_missing_or_broken_otherwise(tmp_path):
    (tmp_path / "cv2").mkdir()
    (tmp_path / "cv2" / "__init__.py").write_text("raise ImportError('no\\nABI')")
    assert check_environment(PYTHONPATH=str(tmp_path)) == (
        "teacache.errors.DeviceError: opencv cannot be imported: no\\nABI"
    )


def test_python_without_docstrings_is_refused():
    assert check_environment("-OO").startswith("teacache.errors.DeviceError: python -OO ")
    assert check_environment("-O") == ""


def test_too_little_address_space_is_told_before_torch_fails_in_it():
    assert check_environment(limit=3 * 2**30) == (
        "teacache.errors.DeviceError: not enough address space: 5 GB are needed, "
        "`ulimit -v` allows 3.0"
    )
    assert check_environment(limit=5 * 2**30) == ""
