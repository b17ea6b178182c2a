"""Downloading a checkpoint from the Hugging Face hub, whole or not at all."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from teacache.checkpoint import check_checkpoint
from teacache.errors import CheckpointError

# All that sampling needs of the repository; it holds training data tools (data_process/) as well.
DOWNLOADED = (
    "model_index.json",
    *(f"{name}/*" for name in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")),
    "face_encoder/*",
)


def download_checkpoint(repo_id: str) -> Path:
    """Download a repository into a folder of its name, below the current one, and return it.

    The files come to `<name>.incomplete`, which is renamed once it is whole: a folder that has the
    repository's own name needs no second look. Asked again, a broken download goes on with
    the files that it still lacks.

    Raises:
        CheckpointError: where the repository cannot be reached, read or written down.
    """
    from filelock import FileLock
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    folder = Path(repo_id)
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():  # else another process has just finished it
                snapshot_download(repo_id, local_dir=incomplete, allow_patterns=list(DOWNLOADED))
                # Without a connection the hub is content with whatever is there already.
                check_checkpoint(incomplete)
                shutil.rmtree(incomplete / ".cache", ignore_errors=True)
                incomplete.rename(folder)
    except (
        errors.HTTPError,  # of the hub's HTTP client, whichever that is; HfHubHTTPError is one
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HFValidationError,
        CheckpointError,
        OSError,
    ) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"--ckpts_path {repo_id}: there is no such folder here, and the repository of that "
            f"name could not be downloaded ({reason}). {_way_out(error)}"
        ) from error
    return folder


def _way_out(error: Exception) -> str:
    """What a user can do about a download that failed."""
    from huggingface_hub import errors

    answer = getattr(error, "response", None)
    if isinstance(error, errors.GatedRepoError) or getattr(answer, "status_code", 0) in (401, 403):
        return "Ask for access on its page, then log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        needed = ", ".join(pattern.replace("/*", "/") for pattern in DOWNLOADED)
        return f"Without a connection, put {needed} of it there; --ckpts_path tiny needs none"
    return "--ckpts_path tiny needs no download"
