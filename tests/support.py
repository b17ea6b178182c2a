"""What tests of every kind use: constants, the command within this process, other detectors."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import torch

from teacache.checkpoint.size import VideoSize
from teacache.results import output_folder

CPU = torch.device("cpu")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ROOT = Path(__file__).parent.parent
SIZE = VideoSize(width=112, height=96, num_frames=13)
PROMPT = "a smiling astronaut stands by the sea"
# Eyes, tip of the nose and corners of the mouth in two photographs, in pixels, marked by hand:
# scikit-image's astronaut and matplotlib's Grace Hopper.
ASTRONAUT = ((204, 101), (246, 103), (225, 126), (204, 140), (243, 141))
GRACE_HOPPER = ((221, 207), (302, 204), (262, 247), (238, 277), (297, 276))


class Stop(Exception):
    """Raised in a step's callback, as a user's Ctrl-C would be."""


def stop_after(step: int):
    def callback(pipe, index, timestep, kwargs):
        if index == step:
            raise Stop
        return {}

    return callback


def grace_hopper() -> Path:
    """A photograph of a face that nothing was trained on."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"


def replace(path: Path, content: bytes) -> None:
    """Put other content in the place of a file that may be a link."""
    path.unlink()
    path.write_bytes(content)


def edit(path: Path, **changed: object) -> None:
    """Change values in a JSON file that may be a link."""
    replace(path, json.dumps({**json.loads(path.read_text()), **changed}).encode())


def untimed_rows(folder: Path) -> list[dict]:
    """The rows of a folder's one sweep, without what differs from run to run."""
    (report,) = folder.glob("sweep_*.json")
    timed = ("latency", "speedup", "video")
    rows = json.loads(report.read_text())["rows"]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@contextlib.contextmanager
def handlers_given_back() -> Iterator[dict]:
    """The signals' handlers as before the block: an interrupted command ignores them to its end."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield handlers
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def encoded(path: Path) -> str:
    """A digest of a video's encoded frames, whatever the file says besides."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-map", "0:v"]
    command += ["-c", "copy", "-f", "md5", "-"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(capsys, *arguments: object) -> tuple[int, str, str]:
    """The command within this process: (exit code, standard output, standard error)."""
    from teacache.command.main import main as command

    with handlers_given_back():
        try:
            code = command([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return code, *capsys.readouterr()


def below(parent: int, words: str) -> list[int]:
    """The processes that one has started, or they in turn, with these words in their command."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            found += [child.pid] * (words in " ".join(child.cmdline()))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and that init has not asked about does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def refused(capsys, *arguments: object) -> str:
    """What the command says, in one line and with code 2, before it loads anything large."""
    code, output, error = main(capsys, *arguments)
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    assert (code, len(lines)) == (2, 1), output + error
    assert lines[0].startswith("error: ")
    assert "diffusers" not in output
    return lines[0]


@contextlib.contextmanager
def locked_by_another_process(folder: Path) -> Iterator[None]:
    """Every lock of an output folder, here one file, is held elsewhere; its holder is killed."""
    path = folder / ".all.lock"
    program = (
        "import filelock, sys, time\n"
        "lock = filelock.FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "print('held', flush=True)\n"
        "time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with mock.patch.object(output_folder, "lock_file", return_value=path):
            yield
    finally:
        holder.kill()
        holder.wait()
