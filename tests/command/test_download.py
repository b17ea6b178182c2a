"""The download, from a server on the loopback address that speaks the hub's protocol."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from support import ROOT

from teacache.checkpoint.folder import check_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "Own/Repo"


class Hub(http.server.ThreadingHTTPServer):
    """One repository, a folder; `error` answers everything with (status, X-Error-Code), and
    `breaks_in` names a file whose first transfer ends in the middle, `short` one that is sent
    shorter than it is listed; the first transfer of `stalls_in` waits in the middle for
    `released`."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.error: tuple[int, str] | None = None
        self.breaks_in: str | None = None
        self.short: str | None = None
        self.stalls_in: str | None = None
        self.stalled, self.released = threading.Event(), threading.Event()
        self.transfers: Counter[str] = Counter()

    def files(self) -> list[Path]:
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file()]


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Nothing: the tests look at what was transferred."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        hub, root = self.server, f"/{REPOSITORY}/resolve/{COMMIT}/"
        if hub.error:
            status, code = hub.error
            self.reply(b"{}", status, {"X-Error-Code": code})
        elif path == f"/api/models/{REPOSITORY}/revision/main":
            names = [str(file.relative_to(hub.folder)) for file in hub.files()]
            siblings = [{"rfilename": name} for name in names]
            self.reply(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/{REPOSITORY}/tree/{COMMIT}":
            tree = [
                {
                    "type": "file",
                    "path": str(file.relative_to(hub.folder)),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(str(file).encode()).hexdigest(),
                }
                for file in hub.files()
            ]
            self.reply(json.dumps(tree).encode())
        elif path.startswith(root) and (hub.folder / path.removeprefix(root)).is_file():
            self.send_file(path.removeprefix(root))
        else:
            self.reply(b"{}", 404)

    def send_file(self, name: str) -> None:
        content = (self.server.folder / name).read_bytes()
        if self.command == "GET" and self.server.short == name:
            content = content[:-100]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET":
            self.server.transfers[name] += 1
        if self.command == "GET" and self.server.stalls_in == name:
            self.server.stalls_in = None
            self.reply(content, 200, headers, sent=len(content) // 2)
            self.wfile.flush()
            self.server.stalled.set()
            self.server.released.wait(60)
            self.close_connection = True
        elif self.command == "GET" and self.server.breaks_in == name:
            self.reply(content, 200, headers, sent=len(content) // 2)
            self.close_connection = True
            self.server.breaks_in = None
            self.server.error = (503, "")
        else:
            self.reply(content, 200, headers)

    def reply(self, body: bytes, status: int = 200, headers=None, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])


@pytest.fixture
def hub(tiny, tmp_path):
    folder = tmp_path / "repository"
    shutil.copytree(tiny, folder, copy_function=os.link)
    (folder / "data_process").mkdir()
    (folder / "data_process" / "tool.pth").write_bytes(b"x" * 1000)
    (folder / "README.md").write_text("not needed")
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def start(hub, tmp_path):
    """Starts the command in an empty folder, with the hub at the server."""
    here = tmp_path / "here"
    here.mkdir()

    def popen(*arguments: object, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, ROOT / "teacache_sample_video.py", *map(str, arguments)],
            cwd=here,
            env={
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
                "HF_HOME": str(tmp_path / "hf_home"),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return popen


@pytest.fixture
def command(start):
    """Runs it to its end: (code, output, error)."""

    def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
        process = start(*arguments, **environment)
        output, error = process.communicate(timeout=300)
        return process.returncode, output, error

    return run


SAMPLE = (
    *("--ckpts_path", REPOSITORY, "--device", "cpu", "--image", "astronaut"),
    *("--num_infer_steps", 2, "--num_frames", 1),
)


# Ends with what is refused first once the download is done, and spares some seconds.
DOWNLOAD = (*SAMPLE[:-4], "--num_infer_steps", 2000)
DOWNLOADED = "error: --num_infer_steps 2000: the scheduler knows 1000 timesteps\n"


def test_broken_off_then_resumed_then_sampled(hub, command, tmp_path):
    folder, incomplete = tmp_path / "here" / "Own" / "Repo", tmp_path / "here/Own/Repo.incomplete"
    broken = "face_encoder/detection_Resnet50_Final.pth"
    hub.breaks_in = broken
    code, _, error = command(*SAMPLE)
    assert code == 2
    assert error.startswith("error: --ckpts_path Own/Repo: there is no such folder here")
    assert error.count("\n") == 1
    assert not folder.exists()
    assert incomplete.is_dir()

    had = brought(incomplete)
    # Without a connection the half is not taken for the whole.
    code, _, error = command(*SAMPLE, HF_HUB_OFFLINE="1")
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Without a connection, put these into Own/Repo.incomplete, weights" in error
    told = asked_for(error)
    assert broken in told
    assert not set(told) & had, "what has come already"
    assert len(told) + len(had) >= 15
    assert not folder.exists()

    hub.error = None
    before = Counter(hub.transfers)
    code, output, error = command(*SAMPLE)
    assert code == 0, error
    assert "download" in output
    assert hub.transfers[broken] > before[broken]
    fetched_again = {name for name in hub.transfers if hub.transfers[name] > before[name]}
    assert not fetched_again & had, "what was whole is not fetched again"

    assert not incomplete.exists()
    check_checkpoint(folder)
    assert not any(name.startswith("data_process") or name == "README.md" for name in hub.transfers)
    for file in hub.files():
        name = file.relative_to(hub.folder)
        if str(name) in hub.transfers:
            assert (folder / name).read_bytes() == file.read_bytes()
    assert {path.name for path in folder.iterdir()} == {
        *("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
        "face_encoder",
    }
    assert (tmp_path / "here" / "teacache_results" / "42_0.1_0000.mp4").is_file()

    hub.error = (500, "")
    code, output, error = command(*SAMPLE)
    assert code == 0, "what is here needs no server any more"
    assert "download" not in output


def brought(folder: Path) -> set[str]:
    """The files that have come to a folder, as paths below it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def asked_for(error: str) -> list[str]:
    """The files that an error without a connection names."""
    return error.split("with their index: ")[1].split(". --ckpts_path")[0].split(", ")


def downloading(here: Path) -> list[Path]:
    """The processes that bring files to this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if b"teacache.checkpoint.download" in (folder / "cmdline").read_bytes():
                found += [folder] if (folder / "cwd").readlink() == here else []
    return found


@pytest.mark.parametrize("by_terminal", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_interrupted_while_the_server_stalls(hub, start, tmp_path, by_terminal):
    """A terminal sends Ctrl-C to all of its processes, `kill` sends SIGTERM to one."""
    incomplete = tmp_path / "here/Own/Repo.incomplete"
    hub.stalls_in = "transformer/diffusion_pytorch_model.safetensors"
    process = start(*SAMPLE)
    assert hub.stalled.wait(60)
    time.sleep(0.5)  # for what else is under way
    assert len(downloading(tmp_path / "here")) == 1
    sent = time.monotonic()
    if by_terminal:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - sent < 2
    assert (process.returncode, error) == (130, "interrupted\n")
    assert not downloading(tmp_path / "here")
    assert not list(incomplete.rglob("*.incomplete")), "of a file of which half has come"

    had = brought(incomplete)
    assert "model_index.json" in had
    before = Counter(hub.transfers)
    assert start(*DOWNLOAD).communicate(timeout=300)[1] == DOWNLOADED
    assert not {name for name in hub.transfers if hub.transfers[name] > before[name]} & had


def test_killed_while_the_server_stalls(hub, start, tmp_path):
    """With no time to end anything: what downloads notices by itself."""
    hub.stalls_in = "transformer/diffusion_pytorch_model.safetensors"
    process = start(*SAMPLE)
    assert hub.stalled.wait(60)
    process.kill()
    process.communicate()
    ends = time.monotonic() + 5
    while downloading(tmp_path / "here") and time.monotonic() < ends:
        time.sleep(0.05)
    assert not downloading(tmp_path / "here")


def test_without_a_connection_the_last_file_may_be_brought_by_hand(hub, command, tmp_path):
    broken = "face_encoder/detection_Resnet50_Final.pth"
    hub.breaks_in = broken
    code, *_ = command(*SAMPLE)
    assert code == 2
    incomplete = tmp_path / "here" / "Own" / "Repo.incomplete"
    code, _, error = command(*SAMPLE, HF_HUB_OFFLINE="1")
    assert code == 2
    assert "put these into Own/Repo.incomplete" in error
    for name in asked_for(error):
        (incomplete / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub.folder / name, incomplete / name)
    assert command(*DOWNLOAD, HF_HUB_OFFLINE="1")[2] == DOWNLOADED
    assert check_checkpoint(tmp_path / "here" / "Own" / "Repo") is None


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ((404, "RepoNotFound"), "404"),
        ((401, "GatedRepo"), "Ask for access on its page, then log in with `hf auth login`"),
        ((403, "GatedRepo"), "Ask for access on its page, then log in with `hf auth login`"),
    ],
)
def test_refusals_are_one_line(hub, command, tmp_path, error, told):
    hub.error = error
    code, _, text = command(*SAMPLE)
    assert code == 2
    assert text.startswith("error: --ckpts_path Own/Repo: there is no such folder here")
    assert told in text
    assert text.count("\n") == 1
    assert not (tmp_path / "here" / "Own" / "Repo").exists()


def test_a_repository_that_lacks_a_file_is_named(hub, command):
    (hub.folder / "face_encoder" / "parsing_bisenet.pth").unlink()
    code, _, error = command(*SAMPLE)
    assert code == 2
    assert "missing or empty: face_encoder/parsing_bisenet.pth" in error


def test_a_name_that_the_hub_would_not_take(command):
    code, _, error = command("--ckpts_path", "own/a--b", *SAMPLE[2:])
    assert code == 2
    assert error.startswith("error: --ckpts_path own/a--b")
    assert error.count("\n") == 1


def test_a_file_of_another_size_than_announced_is_refused(hub, command, tmp_path):
    """As from a proxy that has kept a part of it."""
    hub.short = "vae/diffusion_pytorch_model.safetensors"
    code, _, error = command(*SAMPLE)
    assert code == 2
    assert error.startswith("error: --ckpts_path Own/Repo")
    assert error.count("\n") == 1
    assert not (tmp_path / "here" / "Own" / "Repo").exists()
    hub.short = None
    assert command(*DOWNLOAD)[2] == DOWNLOADED
