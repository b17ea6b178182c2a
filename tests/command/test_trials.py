"""What a newcomer and a hostile user tried, and what they get now: a video, or one line."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import main

from teacache.base import files
from teacache.base.errors import DeviceError
from teacache.command import readers
from teacache.results import video


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
    video.write_video(noise_frames(5), path)
    assert video.count_frames(path) == 5
    assert video.read_video(path).frames.shape == (5, 48, 64, 3)
    assert [p.name for p in tmp_path.iterdir()] == [path.parent.name]


def test_the_command_takes_a_time_stamp_for_a_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--ckpts_path", "tiny", "--num_infer_steps", 1, "--num_frames", 1, "--quiet")
    asked = (*arguments, "--output_path", "2026-11-24T10:33", "--rel_l1_thresh", 0, 0.1)
    assert main(capsys, *asked)[0] == 0
    code, *_ = main(capsys, *asked, "--resume")
    assert code == 0
    assert {path.suffix for path in (tmp_path / "2026-11-24T10:33").iterdir()} == {
        *(".mp4", ".json", ".md", ".png")
    }
    assert len(list((tmp_path / "2026-11-24T10:33").glob("42_*.mp4"))) == 2, "found again"


@pytest.mark.parametrize("read", [readers.path, readers.image, readers.name])
def test_the_home_directory_is_put_in_once_for_every_path(tmp_path, monkeypatch, read):
    """bash does it for `--output_path ~/x`, and not for `--output_path=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x y").write_text("")
    assert str(read("~/x y")) == str(tmp_path / "x y")
    monkeypatch.chdir(tmp_path)
    Path("~nobodyhere").mkdir()
    (tmp_path / "~nobodyhere" / "x").write_text("")
    assert str(read("~nobodyhere/x")) == "~nobodyhere/x", "as bash leaves it"


def test_the_home_directory_of_a_user_of_an_address_and_of_the_command(
    capsys, tmp_path, monkeypatch
):
    me = pwd.getpwuid(os.getuid())
    assert readers.path(f"~{me.pw_name}/videos") == Path(me.pw_dir) / "videos"
    assert readers.path("a~/b") == Path("a~/b")
    assert readers.image("https://host/~me/face.png") == "https://host/~me/face.png"
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    content = {"values": [0, 0, 0, 1, 0], "fitted_range": [0, 1], "source": "here"}
    (tmp_path / "home" / "c.json").write_text(json.dumps(content))
    asked = ("--coefficients=~/c.json", "--output_path=~/results", "--num_infer_steps", 1)
    code, output, _ = main(capsys, "--ckpts_path", "tiny", *asked, "--num_frames", 1, "--quiet")
    assert (code, output) == (0, f"{tmp_path}/home/results/42_0.1_0000.mp4\n")
    assert not (tmp_path / "~").exists()


def test_a_user_without_a_home_directory_is_told(monkeypatch):
    """As in containers that run under some number for which /etc/passwd has no line."""

    def unknown(uid):
        raise KeyError(uid)

    def cache() -> Path:
        files.folder_without_home.cache_clear()
        return files.cache_folder()

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    with pytest.raises(DeviceError, match="no home directory: set XDG_CACHE_HOME"):
        files.cache_folder()
