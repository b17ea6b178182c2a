"""Finds a checkpoint: a folder, or a repository that the Hugging Face hub's cache has whole."""

import contextlib
import logging
import re
from pathlib import Path

from teacache.base.errors import CheckpointError
from teacache.checkpoint.folder import lacking

logger = logging.getLogger(__name__)


def local_checkpoint(name: str) -> Path | None:
    """The folder of that name, or the repository's in the hub's cache; None where it is in neither.

    Raises:
        CheckpointError: where the name is no folder's and no repository's, `owner/name`.
    """
    folder = Path(name)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # too long a name, or no permission
        raise CheckpointError(f"--ckpts_path {name[:80]}: {error.strerror}") from error
    if folder.exists():
        single = (
            " with weights" if folder.suffix in (".safetensors", ".ckpt", ".pt", ".bin") else ""
        )
        raise CheckpointError(
            f"--ckpts_path {name} is a single file{single}: a checkpoint is a folder with a "
            "model_index.json"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(("./", "../")):
        raise CheckpointError(
            f"--ckpts_path {name}: there is no such folder. "
            "Name one, or a Hugging Face repository as owner/name, or tiny"
        )
    return cached_snapshot(name)


def cached_snapshot(repo_id: str, whole: bool = True) -> Path | None:
    """A repository's snapshot in the hub's cache, where diffusers and `hf download` put it.

    It is that of the main branch, as the cache knows it; else the newest, with a warning. The
    environment says where the cache is. Where `whole`, it has every file for sampling.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    main = ""
    with contextlib.suppress(OSError):
        main = (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    with contextlib.suppress(OSError, CheckpointError):  # no such cache; no permission; damaged
        snapshots = [path for path in (cache / "snapshots").iterdir() if path.is_dir()]
        snapshots.sort(key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True)
        for snapshot in snapshots:
            if not (whole and lacking(snapshot)):
                if whole and snapshot.name != main:
                    logger.warning(
                        "%s: revision %s, not main's, is taken from the hub's cache",
                        *(repo_id, snapshot.name),
                    )
                return snapshot
    return None
