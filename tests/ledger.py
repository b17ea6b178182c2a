"""A ledger of memory: the bytes of all tensors that are there at a time, by their storages.

Under torch's FakeTensorMode tensors have shapes and no data, so that the models run at full size
within seconds, and the ledger tells what they would take. What it does not see is what kernels
allocate for themselves, and what torch's allocator holds besides.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30


class Ledger(TorchDispatchMode):
    """Books each storage that an operation makes, until it is freed.

    Args:
        tensors: that are there from the beginning.

    Attributes:
        now, peak: bytes, beyond those tensors.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._there: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self._book(tensor)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._book(tensor)
        return out

    def begin_stage(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now

    def _book(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._there:
            return

        def freed(_: object) -> None:
            del self._there[key]
            self.now -= size

        self._there[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
