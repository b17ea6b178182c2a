"""Names that two runs never share, and files that are whole or absent."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import locked_by_another_process

from teacache.base.files import locked, written_whole
from teacache.results import output_folder
from teacache.results.output_folder import claimed_stem, prepared_folder
from teacache.results.video import read_video, write_video

WRITE_FIVE = """
import sys
from pathlib import Path
from teacache.base.files import written_whole
from teacache.results.output_folder import claimed_stem, locked_name, prepared_folder
for n in range(5):
    with claimed_stem(Path(sys.argv[1]), "42_0.1") as stem:
        with written_whole(stem, ".mp4", ".json") as paths:
            for path in paths:
                path.write_text(f"{sys.argv[2]} {n}")
"""


def test_index_starts_at_0_and_never_overwrites(tmp_path):
    for expected in range(3):
        with claimed_stem(tmp_path, "42_0.15") as stem:
            assert stem.name == f"42_0.15_{expected:04d}"
            with written_whole(stem, ".mp4") as (path,):
                path.write_text(str(expected))
    (tmp_path / "42_0.15_0001.mp4").unlink()
    (tmp_path / "42_0.15_0001.json").write_text("{}")
    with claimed_stem(tmp_path, "42_0.15") as stem, claimed_stem(tmp_path, "42_0.15") as other:
        assert stem.name == "42_0.15_0003", "a record alone keeps its name as well"
        assert other.name == "42_0.15_0004", "two hold different names at once"


def test_kept_latents_keep_their_name(tmp_path):
    kept = tmp_path / "a_0002.latents.safetensors"
    kept.touch()
    with claimed_stem(tmp_path, "a", kept) as stem:
        assert stem.name == "a_0002"
        with claimed_stem(tmp_path, "a", kept) as other:
            assert other.name == "a_0000", "another process is at it"
    with claimed_stem(tmp_path, "a", tmp_path.parent / kept.name) as stem:
        assert stem.name == "a_0000", "those of the temporary folder have no name here"


def test_a_killed_process_holds_no_name(tmp_path):
    program = WRITE_FIVE.replace(
        "with written_whole", "import os; os.kill(os.getpid(), 9)\n        with written_whole"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path), "0"], check=False)
    assert ended.returncode == -9
    with claimed_stem(tmp_path, "42_0.1") as stem:
        assert stem.name == "42_0.1_0000"
    assert not list(tmp_path.iterdir())


def test_processes_side_by_side_share_no_name(tmp_path):
    """6 processes, 5 videos each, in one folder."""
    program = [sys.executable, "-c", WRITE_FIVE, str(tmp_path)]
    processes = [subprocess.Popen([*program, str(number)]) for number in range(6)]
    assert [process.wait(120) for process in processes] == [0] * 6
    videos = sorted(tmp_path.glob("42_0.1_*.mp4"))
    assert len(videos) == 30
    contents = {path.read_text() for path in videos}
    assert contents == {f"{number} {n}" for number in range(6) for n in range(5)}
    for path in videos:
        assert path.with_name(path.name[:-4] + ".json").read_text() == path.read_text()
    assert len(list(tmp_path.iterdir())) == 60, "nothing hidden is left"


@pytest.mark.parametrize(
    ("function", "call"), [("fsync", 1), ("fsync", 2), ("rename", 1), ("rename", 2)]
)
def test_of_two_files_none_is_there_without_the_other(tmp_path, monkeypatch, function, call):
    """Whichever the disk, or an interruption, fails at."""
    owner = os if function == "fsync" else Path
    does, calls = getattr(owner, function), []

    def fails(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return does(*args)

    def write():
        with written_whole(tmp_path / "42_0.1_0000", ".mp4", ".json") as paths:
            for path in paths:
                path.write_text("whole")

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fails)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert not list(tmp_path.iterdir())
    write()
    assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch:  # what was there before stays
        patch.setattr(owner, function, fails)
        calls.clear()
        with contextlib.suppress(KeyboardInterrupt):
            write()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_process_holds_no_lock(tmp_path):
    with (
        locked_by_another_process(tmp_path),
        output_folder.locked_name(tmp_path, "a video") as ours,
    ):
        assert not ours
    (file,) = tmp_path.iterdir()
    with locked(file) as ours:
        assert ours
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_nothing_is_held_back(tmp_path, monkeypatch):
    """In a folder that takes no file, and on a file system without locks."""
    with locked(tmp_path / "missing" / ".lock") as ours:
        assert ours

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / ".lock") as ours:
        assert ours


def raw(path):
    """The frames as the stream has them: [frames, height x 1.5, width] in YUV, 4:2:0."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path]
    command += ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-"]
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_the_mp4_is_the_published_one_and_says_its_colours(tmp_path):
    """Frame by frame, and with its index before the frames. Red is (81, 90, 240) in BT.601."""
    import imageio_ffmpeg
    from diffusers.utils import export_to_video

    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    frames = [Image.fromarray(noise).resize((96, 64)), Image.new("RGB", (96, 64), (255, 0, 0))] * 3
    published, ours = tmp_path / "published.mp4", tmp_path / "ours.mp4"
    export_to_video(frames, str(published), fps=8)
    write_video(frames, ours)
    assert raw(ours) == raw(published)
    assert (read_video(ours).frames == read_video(published).frames).all()
    red = np.frombuffer(raw(ours), np.uint8).reshape(6, 96, 96)[-1]
    assert [red[10, 10], red[70, 10], red[90, 10]] == [81, 90, 240]
    content = ours.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    shown = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", ours], capture_output=True, text=True
    ).stderr
    assert "yuv420p(tv, smpte170m/bt709/iec61966-2-1, progressive)" in shown


def test_a_higher_quality_is_nearer_to_the_frames(tmp_path):
    """Also of the lowest, which imageio refuses; and as diffusers reads the number."""
    from diffusers.utils import export_to_video

    noise = np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8)
    frames = [Image.fromarray(noise).convert("RGB")] * 2
    errors = []
    for quality in (0, 0.9, 1, 2.5, 5, 10):
        write_video(frames, tmp_path / "video.mp4", quality)
        video = read_video(tmp_path / "video.mp4")
        assert (video.frames.shape, video.fps) == ((2, 64, 96, 3), 8)
        errors.append(np.abs(video.frames.astype(float) - np.array(frames[0])).mean())
        if quality >= 1:
            export_to_video(frames, str(tmp_path / "other.mp4"), fps=8, quality=quality)
            assert raw(tmp_path / "other.mp4") == raw(tmp_path / "video.mp4")
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == len(errors)
    assert errors[-1] < 1, "no loss but the rounding to 220 levels, as grey has no colour to lose"


def test_an_empty_folder_that_another_run_removes_is_made_again(tmp_path):
    """That one was refused; this one begins to write only now."""
    folder = tmp_path / "a" / "out"
    with prepared_folder(folder), prepared_folder(folder):
        pass
    assert not (tmp_path / "a").exists()
    with claimed_stem(folder, "42_0.15") as stem, written_whole(stem, ".json") as (path,):
        path.write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["42_0.15_0000.json"]
