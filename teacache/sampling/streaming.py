"""The transformer's blocks in host memory, each brought to the GPU while the one before computes.

At full size a block is 0.25 GiB and the 42 of them are 10.3. Two are on the GPU at a time: one
computes, the other arrives, over PCIe 4 in a tenth of the time that an RTX 4090 needs to compute
one. Weights move in computed steps alone, and nothing waits on the host: the copies and the
computation wait for each other on the GPU.

Diffusers has this as group offloading. It moves everything besides the blocks to the GPU and back
at every forward, reused steps too; and with its two ways of freeing a block, either the host
waits for every one of them, or the copies run ahead of the computation and fill the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel

ALIGNMENT = 512  # bytes, as torch's allocator aligns


class HostWeights:
    """A module's weights with one copy in host memory, pinned where there is a GPU.

    It is made when they first leave. They must not change any more. One for each block and not one
    for all: torch rounds pinned memory up to a power of two.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.device = device
        self.tensors = [*module.parameters(), *module.buffers()]
        self.places, end = [], 0
        for tensor in self.tensors:
            self.places.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end
        self._host: torch.Tensor | None = None

    @property
    def host(self) -> torch.Tensor:
        """The copy, one piece of bytes."""
        if self._host is None:
            pinned = self.device.type == "cuda"
            self._host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned)
            for tensor, view in zip(self.tensors, self._views(self._host), strict=True):
                view.copy_(tensor)
        return self._host

    def leave(self) -> None:
        """Be in host memory."""
        self._be(self.host)

    def come(self, buffer: torch.Tensor | None = None) -> None:
        """Be on the device, in the order of the current stream.

        Args:
            buffer: bytes there to be in; else some are allocated.
        """
        if buffer is None:
            buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        buffer[: self.nbytes].copy_(self.host, non_blocking=True)
        self._be(buffer)

    def _be(self, buffer: torch.Tensor) -> None:
        for tensor, view in zip(self.tensors, self._views(buffer), strict=True):
            tensor.data = view

    def _views(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        for tensor, place in zip(self.tensors, self.places, strict=True):
            yield buffer[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class Point:
    """A point in a GPU's queue that work in another queue can wait for; on a CPU nothing."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        """Be where the current stream is."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Let what the current stream is given from now on wait until this is reached."""
        if self._event is not None:
            self._event.wait()


class Slot:
    """Memory on the device for a block: which block is there, when it came and was used."""

    def __init__(self, nbytes: int, device: torch.device):
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.arrived, self.computed = Point(device), Point(device)
        self.block: int | None = None


class StreamedBlocks(torch.nn.ModuleList):
    """Blocks whose weights arrive as they are iterated over: a forward that loops over them needs
    to know nothing of it.

    Args:
        blocks: on the host or on the device; from then on their weights must not change.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module], device: torch.device):
        super().__init__(blocks)
        self._device = device
        self._weights = [HostWeights(block, device) for block in self._modules.values()]
        self._slots: list[Slot] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        for weights in self._weights:
            weights.leave()

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """Each block, its weights there until the next one is asked for."""
        if not self._slots:
            largest = max(weights.nbytes for weights in self._weights)
            self._slots = [Slot(largest, self._device) for _ in range(2)]
            for slot in self._slots:
                slot.computed.record()  # what used this memory before comes first
        for index, block in enumerate(self._modules.values()):
            usual = self._slots[index % 2]
            slot = next((each for each in self._slots if each.block == index), usual)
            if slot.block != index:  # the first step, or one after a step that was interrupted
                self._bring(index, slot)
            slot.arrived.wait()
            yield block
            slot.computed.record()
            self._bring((index + 2) % len(self._weights), slot)

    def vacate(self) -> None:
        """Leave the device, until the next iteration."""
        for slot in self._slots:
            slot.arrived.wait()  # the memory is given to others only when nothing arrives any more
            if slot.block is not None:
                self._weights[slot.block].leave()
        self._slots = []

    def _bring(self, index: int, slot: Slot) -> None:
        """Copy a block's weights into a slot, once what computes from there is done."""
        if slot.block is not None:
            self._weights[slot.block].leave()
        with torch.cuda.stream(self._copies):  # with None, as on a CPU, the current one
            slot.computed.wait()
            self._weights[index].come(slot.buffer)
            slot.arrived.record()
        slot.block = index


def stream_blocks(transformer: ConsisIDTransformer3DModel, device: torch.device) -> None:
    """Let a transformer that is in host memory compute on a device, its blocks streamed there."""
    for child in besides_blocks(transformer):
        child.to(device)
    transformer.transformer_blocks = StreamedBlocks(transformer.transformer_blocks, device)


def besides_blocks(transformer: ConsisIDTransformer3DModel) -> list[torch.nn.Module]:
    """Whatever a transformer has on the device where its blocks are streamed."""
    return [each for each in transformer.children() if each is not transformer.transformer_blocks]
