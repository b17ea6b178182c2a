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
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

logger = logging.getLogger(__name__)

# Some hundred faces (7 MB each in bfloat16 at full size) or prompts (2 MB).
MOST_BYTES = 2**30
DIGEST_BYTES = 32
ABANDONED_SECONDS = 3600  # a file that is still being written is younger
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
    """Named tensors by what they depend on, each entry a file: a digest, then safetensors.

    Any number of processes may share a folder: an entry is written beside and renamed, and whoever
    finds one damaged removes it and makes it anew. A cache that cannot be written to is none: the
    run goes on.

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
        path = self.path_of(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        tensors = _read_entry(content)
        if tensors is None or set(tensors) != set(names):
            logger.warning("%s is damaged, and is made anew", path)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # gone already, or not ours to touch
            os.utime(path)
        return tensors

    def put(self, key: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        """Keep tensors under the key."""
        from safetensors.torch import save

        body = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, beside = tempfile.mkstemp(prefix=".", suffix=".part", dir=self.folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(hashlib.sha256(body).digest() + body)
                os.replace(beside, self.path_of(key))
            finally:
                Path(beside).unlink(missing_ok=True)
            self._forget_the_oldest()
        except OSError as error:
            logger.warning("embeddings are not kept: %s: %s", self.folder, error.strerror)

    def path_of(self, key: dict[str, str]) -> Path:
        """Where the entry of a key lies."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{name}.bin"

    def _forget_the_oldest(self) -> None:
        for path in self.folder.glob(".*.part"):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()
        entries = []
        for path in self.folder.glob("*.bin"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self.most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _read_entry(content: bytes) -> dict[str, torch.Tensor] | None:
    """The tensors of an entry, or None where it is not what was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    body = content[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != content[:DIGEST_BYTES]:
        return None
    try:
        return load(body)
    except (SafetensorError, KeyError, ValueError, RuntimeError):  # its header's; torch's
        return None
