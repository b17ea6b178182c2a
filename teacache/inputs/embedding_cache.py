"""Embeddings of faces and prompts that are kept from run to run, by what they depend on.

An entry's name is the digest of everything that its values depend on: a changed image, checkpoint
or library has another name. Entries that have not been read for longest go first, once there are
too many.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from teacache.base.errors import reason
from teacache.base.files import locked, with_ending, written_whole

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

logger = logging.getLogger(__name__)

# Some hundred faces (7 MB each in bfloat16 at full size) or prompts (2 MB).
MOST_BYTES = 2**30
ENDING = ".safetensors"
SAMPLED_BYTES = 2**20


def fingerprint(files: list[Path], times: bool = True) -> str:
    """A digest that changes with the files: names, sizes, times of change, first megabytes.

    All of 20 GB would take as long to read as to load.

    Args:
        times: of change; without them a copy of the files has the same digest.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        changed = status.st_mtime_ns if times else ""
        digest.update(f"{path.name} {status.st_size} {changed} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()


class EmbeddingCache:
    """Named tensors by what they depend on, each entry a safetensors file.

    Any number of processes may share a folder. An entry that is damaged is made anew. A cache that
    cannot be written to is none: the run goes on.

    Args:
        folder: made when the first entry is.
        most_bytes: what all entries may take together.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES):
        self.folder, self.most_bytes = folder, most_bytes

    def get(self, key: dict[str, str], names: Collection[str]) -> dict[str, torch.Tensor] | None:
        """The tensors stored under `key`, on the CPU; None if there is no entry or it is damaged.

        Args:
            names: of the tensors that the caller needs, no more and no less.
        """
        from safetensors.torch import load  # it imports torch

        path = self.path_of(key)
        try:
            tensors = load(path.read_bytes())
            os.utime(path)
        except OSError:
            return None
        except SafetensorError:
            tensors = {}
        if set(tensors) != set(names):
            logger.warning("%s is damaged, and is made anew", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return tensors

    def put(self, key: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        """Keep tensors under the key, unless another process is about to."""
        from safetensors.torch import save_file

        stem = self.path_of(key).with_suffix("")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(stem.with_name(f".{stem.name}.lock")) as ours:
                if ours:
                    with written_whole(stem, ENDING) as (path,):
                        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, path)
            self._forget_the_oldest()
        except (OSError, SafetensorError) as error:
            logger.warning("embeddings are not kept: %s: %s", self.folder, reason(error))

    def path_of(self, key: dict[str, str]) -> Path:
        """Where the entry of a key lies."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return with_ending(self.folder / name, ENDING)

    def _forget_the_oldest(self) -> None:
        entries = []
        for path in self.folder.glob(f"[!.]*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
