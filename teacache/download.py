"""Downloading a checkpoint from the Hugging Face hub, whole or not at all."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.checkpoint import check_checkpoint, lacking
from teacache.errors import CheckpointError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

# All that sampling needs of the repository; it holds training data tools (data_process/) as well.
DOWNLOADED = (
    "model_index.json",
    *(f"{name}/*" for name in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")),
    "face_encoder/*",
)
# The hub begins a file anew that is broken off, and some have 5 GB: no more than these are lost.
FILES_AT_ONCE = 2


def download_checkpoint(repo_id: str) -> Path:
    """Download a repository into a folder of its name, below the current one, and return it.

    The files come to `<name>.incomplete`, which is renamed once it is whole: a folder that has the
    repository's own name needs no second look. Asked again, a broken download goes on with
    the files that it still lacks.

    Raises:
        CheckpointError: where the repository cannot be reached, read or written down.
    """
    from filelock import FileLock

    folder = Path(repo_id)
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():  # else another process has just finished it
                _download(repo_id, incomplete)
                # Without a connection the hub is content with whatever is there already.
                check_checkpoint(incomplete)
                shutil.rmtree(incomplete / ".cache", ignore_errors=True)
                incomplete.rename(folder)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"--ckpts_path {repo_id}: there is no such folder here, and the repository of that "
            f"name could not be downloaded: {_reason(error)}"
        ) from error
    return folder


def _download(repo_id: str, folder: Path) -> None:
    """Have the hub's files brought by a process of their own.

    That can be ended at any moment, where the hub's threads would each wait for their file.
    """
    context = multiprocessing.get_context("spawn")
    answer, told = context.Pipe(duplex=False)
    process = context.Process(target=_fetch, args=(repo_id, folder, told), daemon=True)
    # The process inherits what is blocked: a Ctrl-C of the terminal's is for this one alone.
    signals = (signal.SIGINT, signal.SIGTERM)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    told.close()
    try:
        failure = answer.recv()
    except EOFError:
        failure = "the process that downloads was ended"
    finally:
        process.kill()
        process.join()
        for part in folder.rglob("*.incomplete"):  # the hub begins such a file anew
            part.unlink()
    if failure:
        raise CheckpointError(failure)


def _fetch(repo_id: str, folder: Path, told: Connection) -> None:
    """Bring the files, and tell None, or why they could not be brought and what to do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        snapshot_download(
            repo_id,
            local_dir=folder,
            allow_patterns=list(DOWNLOADED),
            max_workers=FILES_AT_ONCE,
        )
    except Exception as error:  # the hub's, its HTTP client's, the system's: more with each release
        told.send(f"{_reason(error)}. {_way_out(error, folder)}")
    else:
        told.send(None)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _way_out(error: Exception, folder: Path) -> str:
    """What a user can do about a download that failed.

    Args:
        folder: what has come so far.
    """
    from huggingface_hub import errors

    answer = getattr(error, "response", None)
    if isinstance(error, errors.GatedRepoError) or getattr(answer, "status_code", 0) in (401, 403):
        return "Ask for access on its page, then log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return (
            f"Without a connection, these are to be put there: {', '.join(lacking(folder))}. "
            "--ckpts_path tiny needs none"
        )
    return "--ckpts_path tiny needs no download"
