"""The download, from a server on the loopback address that speaks the hub's protocol."""

import hashlib
import http.server
import json
import multiprocessing
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
from huggingface_hub import close_session, constants
from support import ROOT

from teacache.base.errors import CheckpointError
from teacache.checkpoint.download import download_checkpoint
from teacache.checkpoint.find import local_checkpoint
from teacache.checkpoint.folder import check_checkpoint
from teacache.command.main import main
from teacache.sampling.lora import lora_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "Own/Repo"
FORK = multiprocessing.get_context("fork")  # with the hub of the fixture


class Hub(http.server.ThreadingHTTPServer):
    """One repository, a folder; `error` answers everything with (status, X-Error-Code). The first
    transfer of `stops_in` ends in the middle: `then` is the error, or it waits for `released`."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.error: tuple[int, str] | None = None
        self.then: tuple[int, str] | None = None
        self.stops_in: str | None = None
        self.stalled, self.released = threading.Event(), threading.Event()
        self.transfers: Counter[str] = Counter()


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
            files = [path for path in sorted(hub.folder.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": str(file.relative_to(hub.folder))} for file in files]
            self.reply(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(root) and (hub.folder / path.removeprefix(root)).is_file():
            self.send_file(path.removeprefix(root))
        else:
            self.reply(b"{}", 404)

    def send_file(self, name: str) -> None:
        hub, content = self.server, (self.server.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET":
            hub.transfers[name] += 1
        if self.command == "HEAD" or hub.stops_in != name:
            self.reply(content, 200, headers)
            return
        hub.stops_in = None
        self.reply(content, 200, headers, sent=len(content) // 2)
        self.close_connection = True
        hub.error = hub.then
        if hub.error is None:
            self.wfile.flush()
            hub.stalled.set()
            hub.released.wait(60)

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
def here(hub, tmp_path, monkeypatch):
    """An empty folder to download into, with the hub at the server."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return folder


@pytest.fixture
def start(here):
    """Starts the command in that folder: a process of a session of its own, and what it says."""

    def command(said: Path) -> None:
        os.setsid()
        with said.open("w", buffering=1) as sys.stderr, open(os.devnull, "w") as sys.stdout:
            words = ("--ckpts_path", REPOSITORY, "--device", "cpu", "--image", "astronaut")
            sys.exit(main([*words, "--num_infer_steps", "2", "--num_frames", "1"]))

    def begin() -> tuple[multiprocessing.Process, Path]:
        process = FORK.Process(target=command, args=(here.parent / "said",))
        process.start()
        return process, here.parent / "said"

    return begin


INCOMPLETE = Path(f"{REPOSITORY}.incomplete")


def refused() -> str:
    """What a download that fails says."""
    with pytest.raises(CheckpointError) as raised:
        download_checkpoint(REPOSITORY)
    assert not Path(REPOSITORY).exists()
    assert Path(REPOSITORY).parent.exists() == bool(brought()), "no empty folder is left"
    message = str(raised.value)
    assert message.startswith("--ckpts_path Own/Repo: there is no such folder here, and the repo")
    assert "\n" not in message
    return message


def brought() -> set[str]:
    """The files that have come, as paths below their folder."""
    return {str(path.relative_to(INCOMPLETE)) for path in INCOMPLETE.rglob("*") if path.is_file()}


def test_broken_off_then_resumed_then_sampled(hub, here, start):
    hub.stops_in, hub.then = "face_encoder/detection_Resnet50_Final.pth", (503, "")
    broken = hub.stops_in
    refused()
    had = brought()
    hub.error = None
    before = Counter(hub.transfers)
    process, said = start()
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    fetched_again = {name for name in hub.transfers if hub.transfers[name] > before[name]}
    assert broken in fetched_again
    assert not fetched_again & had, "what was whole is not fetched again"

    folder = Path(REPOSITORY)
    assert {path.name for path in folder.parent.iterdir()} == {"Repo"}, "nothing hidden stays"
    for name in hub.transfers:
        assert (folder / name).read_bytes() == (hub.folder / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {
        *("model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
        "face_encoder",
    }
    assert (here / "teacache_results" / "42_0.1_0000.mp4").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_while_the_server_stalls(hub, start, number):
    """A terminal sends Ctrl-C to all of its processes, the kernel SIGKILL to one."""
    hub.stops_in = "transformer/diffusion_pytorch_model.safetensors"
    process, said = start()
    assert hub.stalled.wait(60)
    sent = time.monotonic()
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    process.join(60)
    assert time.monotonic() - sent < 10
    if number == signal.SIGKILL:
        assert process.exitcode == -number
    else:
        assert (process.exitcode, said.read_text()) == (130, "interrupted\n")
        assert not list(INCOMPLETE.rglob("*.incomplete")), "of a file of which half has come"

    had = {name for name in brought() if not name.startswith(".cache")}
    assert "model_index.json" in had
    before = Counter(hub.transfers)
    check_checkpoint(download_checkpoint(REPOSITORY))
    assert not {name for name in hub.transfers if hub.transfers[name] > before[name]} & had
    assert {path.name for path in Path(REPOSITORY).parent.iterdir()} == {"Repo"}


def test_two_processes_at_once_download_once(hub, here):
    both = [FORK.Process(target=download_checkpoint, args=(REPOSITORY,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert set(hub.transfers.values()) == {1}
    check_checkpoint(Path(REPOSITORY))


def test_without_a_connection_the_last_files_may_be_brought_by_hand(hub, here, monkeypatch):
    """The half is not taken for the whole, and the error names what is still to come."""
    hub.stops_in, hub.then = "face_encoder/detection_Resnet50_Final.pth", (503, "")
    broken = hub.stops_in
    refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused()
    assert "Without a connection, put these into Own/Repo.incomplete, weights" in error
    names = error.split("with their index: ")[1].split(". --ckpts_path")[0].split(", ")
    assert broken in names
    assert not set(names) & brought(), "what has come already"
    for name in names:
        (INCOMPLETE / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(hub.folder / name, INCOMPLETE / name)
    check_checkpoint(download_checkpoint(REPOSITORY))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, "missing or empty: face_encoder/parsing_bisenet.pth"),
        ((404, "RepoNotFound"), "404"),
        ((401, "GatedRepo"), "Ask for access on its page, then log in with `hf auth login`"),
        ((500, ""), "--ckpts_path tiny needs no download"),
    ],
)
def test_refusals_are_one_line(hub, here, error, told):
    (hub.folder / "face_encoder" / "parsing_bisenet.pth").unlink()
    hub.error = error
    assert told in refused()


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "all_proxy"])
def test_a_socks_proxy_needs_a_package(hub, here, monkeypatch, variable):
    """For a checkpoint, and for a LoRA."""
    monkeypatch.setenv(variable, "socks5://127.0.0.1:9")
    close_session()  # the hub's client has read the environment
    told = "a SOCKS proxy needs socksio: pip install socksio"
    try:
        assert told in refused()
        with pytest.raises(CheckpointError, match=f"^--lora Own/Style is no file here.*{told}"):
            lora_file("Own/Style")
    finally:
        close_session()


@pytest.fixture
def cache(hub, here, monkeypatch):
    """A whole snapshot in the hub's cache, of links to blobs, as the hub's client makes it."""
    folder = here.parent / "hub" / "models--Own--Repo"
    snapshot = folder / "snapshots" / COMMIT
    for number, path in enumerate(path for path in hub.folder.rglob("*") if path.is_file()):
        link, blob = snapshot / path.relative_to(hub.folder), folder / "blobs" / str(number)
        for made in (link, blob):
            made.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent))
    return snapshot


def test_a_whole_snapshot_in_the_hubs_cache_is_used(hub, here, cache, start):
    before = sorted(cache.rglob("*"))
    process, said = start()
    process.join(300)
    assert process.exitcode == 0, said.read_text()
    assert not hub.transfers
    assert [path.name for path in here.iterdir()] == ["teacache_results"]
    assert sorted(cache.rglob("*")) == before, "nothing is written to it"


def test_a_snapshot_in_part_is_completed_and_offline_it_is_named(hub, here, cache, monkeypatch):
    """One link leads nowhere, another was not made; what is there is not fetched again."""
    lost = ("face_encoder/parsing_bisenet.pth", "vae/diffusion_pytorch_model.safetensors")
    (cache / lost[0]).resolve().unlink()
    (cache / lost[1]).rename(cache / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = f"The hub's cache has only a part: {cache} is not whole, missing or empty: "
    assert (
        f"{told}{', '.join(lost)}; of a variant, such as fp16, or pickled, and not read: "
        "vae/diffusion_pytorch_model.fp16.safetensors"
    ) in refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    check_checkpoint(download_checkpoint(REPOSITORY))
    assert set(hub.transfers) == set(lost)


@pytest.mark.parametrize("main", ["f" * 40, None])
def test_a_snapshot_of_another_revision_is_taken_with_a_warning(cache, caplog, main):
    """Where the one that main points to is not there, or not whole."""
    refs = cache.parent.parent / "refs" / "main"
    refs.unlink()
    if main:
        refs.write_text(main)
        (cache.parent / main).mkdir()
    assert local_checkpoint(REPOSITORY) == cache
    assert f"Own/Repo: revision {COMMIT}, not main's, is taken from the hub's cache" in caplog.text
    if main:
        shutil.copytree(cache, cache.parent / main, symlinks=True, dirs_exist_ok=True)
        assert local_checkpoint(REPOSITORY) == cache.parent / main


def test_the_environment_says_where_the_hubs_cache_is(here, cache):
    program = "from teacache.checkpoint.find import local_checkpoint as f; print(f('Own/Repo'))"
    environment = {**os.environ, "HF_HOME": str(here.parent), "PYTHONPATH": str(ROOT)}
    found = subprocess.check_output([sys.executable, "-c", program], text=True, env=environment)
    assert found == f"{cache}\n"


def test_a_lora_of_a_repository_whatever_its_name(hub, here, cache, monkeypatch):
    """Later without a connection."""
    shutil.rmtree(cache.parent.parent)
    (hub.folder / "my style.safetensors").write_bytes(b"weights")
    path = lora_file(REPOSITORY)
    assert path.read_bytes() == b"weights"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert lora_file(REPOSITORY) == path
