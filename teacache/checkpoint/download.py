"""Downloads a checkpoint from the Hugging Face hub."""

import contextlib
import shutil
import sys
from pathlib import Path

from teacache.base.errors import CheckpointError, reason
from teacache.base.files import locked
from teacache.checkpoint.find import cached_snapshot
from teacache.checkpoint.folder import check_checkpoint, lacking

# The files that sampling needs. The repository also has tools for training data (data_process/).
DOWNLOADED = (
    "model_index.json",
    *(f"{name}/*" for name in ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")),
    "face_encoder/*",
)


def download_checkpoint(repo_id: str) -> Path:
    """Download a repository into a folder of its name, below the current folder.

    The files are written to `<name>.incomplete`, which is renamed once all are there. A second call
    after a failed download fetches the missing files.

    Raises:
        CheckpointError: where the repository cannot be reached or read, or the files not written.
    """
    folder = Path(repo_id)
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            if not folder.is_dir():  # else another process has downloaded it
                _download(repo_id, incomplete)
                check_checkpoint(incomplete)
                shutil.rmtree(incomplete / ".cache", ignore_errors=True)
                incomplete.rename(folder)
    except (OSError, CheckpointError) as error:
        with contextlib.suppress(OSError):
            folder.parent.rmdir()  # where nothing has come
        raise CheckpointError(
            f"--ckpts_path {repo_id}: there is no such folder here, and the repository of that "
            f"name could not be downloaded: {reason(error)}"
        ) from error
    return folder


def _download(repo_id: str, folder: Path) -> None:
    """Download the missing files one by one, without threads, which could not be interrupted.

    Raises:
        CheckpointError: where a download fails; it says what to do.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

    if not sys.stderr.isatty():
        disable_progress_bars()
    for part in folder.rglob("*.incomplete"):  # left by a killed process; the hub does not resume
        part.unlink()
    try:
        repository = HfApi().model_info(repo_id, revision="main")
        names = [file.rfilename for file in repository.siblings or ()]
        for name in filter_repo_objects(names, allow_patterns=list(DOWNLOADED)):
            hf_hub_download(repo_id, name, revision=repository.sha, local_dir=folder)
    except Exception as error:  # the hub's, its HTTP client's, the system's
        # A complete folder needs no hub.
        if not folder.is_dir() or lacking(folder):
            advice = _advice(error, repo_id, folder)
            raise CheckpointError(f"{hub_message(error)}. {advice}") from error


def hub_message(error: Exception) -> str:
    """What an error of the hub's client says, in one line."""
    if isinstance(error, ImportError) and "socksio" in str(error):  # it names another package
        return "a SOCKS proxy needs socksio: pip install socksio"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _advice(error: Exception, repo_id: str, folder: Path) -> str:
    """Advice for a user after a failed download into a folder."""
    from huggingface_hub import errors

    answer = getattr(error, "response", None)
    if isinstance(error, errors.GatedRepoError) or getattr(answer, "status_code", 0) in (401, 403):
        return "Ask for access on its page, then log in with `hf auth login`, or set HF_TOKEN"
    if snapshot := cached_snapshot(repo_id, whole=False):
        try:
            check_checkpoint(snapshot)
        except CheckpointError as in_part:
            return f"The hub's cache has only a part: {in_part}"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return (
            f"Without a connection, put these into {folder}, weights as one file or as shards "
            f"with their index: {', '.join(lacking(folder))}. --ckpts_path tiny needs none"
        )
    return "--ckpts_path tiny needs no download"
