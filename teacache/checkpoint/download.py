"""Downloading a checkpoint from the Hugging Face hub, whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from teacache.base.errors import CheckpointError
from teacache.base.quiet import silence_libraries
from teacache.checkpoint.folder import check_checkpoint, lacking

# All that sampling needs of the repository; it holds training data tools (data_process/) as well.
DOWNLOADED = (
    "model_index.json",
    *(f"{name}/*" for name in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")),
    "face_encoder/*",
)
# The hub begins a file anew that was broken off, and some have 5 GB. So few are under way at once.
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
                failure = _download(repo_id, incomplete)
                # What is whole needs no hub, and what the hub calls whole may not be.
                if failure and (not incomplete.is_dir() or lacking(incomplete)):
                    raise CheckpointError(failure)
                check_checkpoint(incomplete)
                shutil.rmtree(incomplete / ".cache", ignore_errors=True)
                incomplete.rename(folder)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"--ckpts_path {repo_id}: there is no such folder here, and the repository of that "
            f"name could not be downloaded: {error}"
        ) from error
    return folder


def _download(repo_id: str, folder: Path) -> str:
    """Have the hub's files brought by a process of their own: this module, as a program.

    That can be ended at any moment, where the hub's threads would each wait for their file. In a
    session of its own it is not told of a Ctrl-C: that is for this process, which ends it. Where
    this one is killed itself, the other sees its standard input end.

    Returns:
        why they could not be brought, and what to do; empty where they could.
    """
    process = None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "teacache.checkpoint.download", repo_id, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdout, "it is a pipe"
        message = process.stdout.read().strip()  # and not communicate(), which ends its input
        if process.wait() and not message:
            message = "the process that downloads has ended without a word"
        return message
    finally:
        if process:
            process.kill()
            process.wait()
        for part in folder.rglob("*.incomplete"):  # the hub begins such a file anew
            part.unlink(missing_ok=True)


def _fetch(repo_id: str, folder: Path) -> None:
    """Bring the files, or print in one line why they could not be brought, and what to do."""
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
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        print(f"{reason}. {_way_out(error, folder)}")


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
            f"Without a connection, put these into {folder}, weights as one file or as shards "
            f"with their index: {', '.join(lacking(folder))}. --ckpts_path tiny needs none"
        )
    return "--ckpts_path tiny needs no download"


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    silence_libraries()
    _fetch(sys.argv[1], Path(sys.argv[2]))
