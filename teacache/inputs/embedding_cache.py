"""A cache of the embeddings of faces and prompts.

The name of an entry is a digest of everything that its values depend on. So a changed image,
checkpoint or library has another entry. The least recently read entries are removed where the cache
grows too large.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from teacache.base.errors import reason
from teacache.base.files import locked, with_ending, written_whole

logger = logging.getLogger(__name__)

# More than a hundred faces (7 MB each in bfloat16 at full size), or 500 prompts (2 MB each).
MOST_BYTES = 2**30
ENDING = ".safetensors"


class EmbeddingCache:
    """Entries of named tensors, each a safetensors file.

    Any number of processes may share a folder, which is created with the first entry. A damaged
    entry is computed again. Where the folder cannot be written to, a warning is logged and the run
    goes on.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES):
        self.folder, self.most_bytes = folder, most_bytes

    def get(self, key: dict[str, str], names: Collection[str]) -> dict[str, torch.Tensor] | None:
        """The tensors of these names under a key, on the CPU; None without a whole entry."""
        path = self.path_of(key)
        try:
            # Copied to aligned memory: a CPU sums up in another order where it is not.
            tensors = {name: tensor.clone() for name, tensor in load(path.read_bytes()).items()}
            os.utime(path)
        except OSError:
            return None
        except SafetensorError:
            tensors = {}
        if set(tensors) != set(names):
            logger.warning("%s is damaged and is computed again", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        return tensors

    def put(self, key: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        """Store tensors under a key, unless another process is storing them."""
        stem = self.path_of(key).with_suffix("")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(stem.with_name(f".{stem.name}.lock")) as ours:
                if ours:
                    with written_whole(stem, ENDING) as (path,):
                        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, path)
            self._remove_oldest()
        except (OSError, SafetensorError) as error:
            logger.warning("embeddings cannot be cached in %s: %s", self.folder, reason(error))

    def path_of(self, key: dict[str, str]) -> Path:
        """The file of a key's entry."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return with_ending(self.folder / name, ENDING)

    def _remove_oldest(self) -> None:
        entries = []
        for path in self.folder.glob(f"[!.]*{ENDING}"):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
