"""A ledger of memory: the bytes of all tensors that are there at a time, by their storages.

Under torch's FakeTensorMode tensors have shapes and no data, so that the models run at full size
within seconds, and the ledger tells what they would take, and what torch's allocator would hold for
them. What it does not see is what kernels allocate for themselves.
"""

import bisect
import weakref
from collections.abc import Iterable

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GIB, MIB = 2**30, 2**20


class Segment:
    """Torch's caching allocator with expandable segments, a model: one segment that grows.

    A tensor takes the smallest free block that holds it, the first of several, and leaves the rest;
    where none does, the segment grows. What is freed becomes one with what is free beside it.
    Small tensors have a segment of their own (`c10/cuda/CUDACachingAllocator.cpp`).

    Args:
        page: bytes by which it grows.
    """

    def __init__(self, page: int):
        self._page = page
        self._free: list[tuple[int, int]] = []  # first byte, end
        self._taken: dict[int, int] = {}
        self.reserved = 0

    def take(self, size: int) -> int:
        """Return the first byte of so many."""
        fitting = [(end - first, first) for first, end in self._free if end - first >= size]
        if not fitting:
            first = self._free.pop()[0] if self._ends_free() else self.reserved
            self.reserved = -(-(first + size) // self._page) * self._page
            self._free.append((first, self.reserved))
            fitting = [(self.reserved - first, first)]
        length, first = min(fitting)
        self._free.remove((first, first + length))
        if length > size:
            bisect.insort(self._free, (first + size, first + length))
        self._taken[first] = first + size
        return first

    def give(self, first: int) -> None:
        """Free what begins there."""
        end = self._taken.pop(first)
        for other in list(self._free):
            if other[1] == first or other[0] == end:
                self._free.remove(other)
                first, end = min(first, other[0]), max(end, other[1])
        bisect.insort(self._free, (first, end))

    def _ends_free(self) -> bool:
        return bool(self._free) and self._free[-1][1] == self.reserved


class Ledger(TorchDispatchMode):
    """Books each storage that an operation makes, until it is freed.

    Args:
        tensors: that are there from the beginning.

    Attributes:
        now, peak: bytes, beyond those tensors.
        reserved: bytes that torch's allocator would hold, beyond those tensors.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._there: dict[int, weakref.ref] = {}
        self._small, self._large = Segment(2 * MIB), Segment(20 * MIB)
        for tensor in tensors:
            self._book(tensor)
        self.now = self.peak = 0
        self._begun = self._small.reserved + self._large.reserved

    @property
    def reserved(self) -> int:
        """See above."""
        return self._small.reserved + self._large.reserved - self._begun

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
        rounded = max(512, -(-size // 512) * 512)
        segment = self._small if rounded <= MIB else self._large
        place = segment.take(rounded)

        def freed(_: object) -> None:
            del self._there[key]
            segment.give(place)
            self.now -= size

        self._there[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
