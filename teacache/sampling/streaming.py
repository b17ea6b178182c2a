"""`--offload blocks`: the transformer's blocks in host memory, streamed to the GPU one ahead.

At full size a block has 0.25 GiB, and all 42 blocks have 10.3. Two blocks are on the GPU at a time:
one computes while the next is copied. Over PCIe 4 the copy takes a tenth of the time in which an
RTX 4090 computes a block. Weights move only in computed steps. Copies and computation wait for each
other on the GPU, by events; the host does not wait.

Diffusers' group offloading is similar, but moves everything except the blocks at every forward,
also at reused steps. To free a block, either the host waits for it, or the copies run ahead of the
computation and fill the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel


class HostWeights:
    """Moves a module's weights to the device and back, with one copy in host memory.

    The copy is made at the first move to the host, pinned for a GPU. The weights must not change
    afterwards. Each block has its own, because torch rounds pinned memory up to a power of two.
    """

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.device = device
        self.tensors = [*module.parameters(), *module.buffers()]
        self.offsets, end = [], 0
        for tensor in self.tensors:
            self.offsets.append(end)
            end += -(-tensor.nbytes // 512) * 512  # as torch's allocator aligns
        self.nbytes = end
        self._host: torch.Tensor | None = None

    @property
    def host(self) -> torch.Tensor:
        """The copy, as bytes: [nbytes]."""
        if self._host is None:
            pinned = self.device.type == "cuda"
            self._host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned)
            for tensor, view in zip(self.tensors, self._views(self._host), strict=True):
                view.copy_(tensor)
        return self._host

    def to_host(self) -> None:
        """Move the weights to host memory."""
        self._rebind(self.host)

    def to_device(self, buffer: torch.Tensor | None = None) -> None:
        """Copy the weights to a buffer of bytes on the device, or a new one, on this stream."""
        if buffer is None:
            buffer = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        buffer[: self.nbytes].copy_(self.host, non_blocking=True)
        self._rebind(buffer)

    def _rebind(self, buffer: torch.Tensor) -> None:
        for tensor, view in zip(self.tensors, self._views(buffer), strict=True):
            tensor.data = view

    def _views(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            yield buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class Point:
    """A CUDA event; on a CPU it does nothing."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        """Record the event on the current stream."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Let later work of the current stream wait for the event."""
        if self._event is not None:
            self._event.wait()


class BlockBuffer:
    """Device memory for one block, its index, and the ends of its copy and its computation."""

    def __init__(self, nbytes: int, device: torch.device):
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.arrived, self.computed = Point(device), Point(device)
        self.block: int | None = None


class StreamedBlocks(torch.nn.ModuleList):
    """Blocks whose weights are copied to the device during iteration. A forward needs no change.

    They may be on the host or on the device. Their weights must not change afterwards.
    """

    def __init__(self, blocks: Iterable[torch.nn.Module], device: torch.device):
        super().__init__(blocks)
        self._device = device
        self._weights = [HostWeights(block, device) for block in self._modules.values()]
        self._slots: list[BlockBuffer] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        for weights in self._weights:
            weights.to_host()

    def __iter__(self) -> Iterator[torch.nn.Module]:
        """Each block. Its weights are on the device until the next iteration."""
        if not self._slots:
            largest = max(weights.nbytes for weights in self._weights)
            self._slots = [BlockBuffer(largest, self._device) for _ in range(2)]
            for slot in self._slots:
                slot.computed.record()  # earlier work may still use this memory
        for index, block in enumerate(self._modules.values()):
            default = self._slots[index % 2]
            slot = next((each for each in self._slots if each.block == index), default)
            if slot.block != index:  # the first step, or the step before was interrupted
                self._copy(index, slot)
            slot.arrived.wait()
            yield block
            slot.computed.record()
            self._copy((index + 2) % len(self._weights), slot)

    def vacate(self) -> None:
        """Free the device memory until the next iteration."""
        for slot in self._slots:
            slot.arrived.wait()  # the memory is free only after the copy
            if slot.block is not None:
                self._weights[slot.block].to_host()
        self._slots = []

    def _copy(self, index: int, slot: BlockBuffer) -> None:
        """Copy a block's weights to a slot, after the computation that uses the slot."""
        if slot.block is not None:
            self._weights[slot.block].to_host()
        with torch.cuda.stream(self._copies):  # None, on a CPU, is the current stream
            slot.computed.wait()
            self._weights[index].to_device(slot.buffer)
            slot.arrived.record()
        slot.block = index


def stream_blocks(transformer: ConsisIDTransformer3DModel, device: torch.device) -> None:
    """Move a transformer from host memory to a device, with its blocks streamed."""
    for child in besides_blocks(transformer):
        child.to(device)
    transformer.transformer_blocks = StreamedBlocks(transformer.transformer_blocks, device)


def besides_blocks(transformer: ConsisIDTransformer3DModel) -> list[torch.nn.Module]:
    """The modules of a transformer except its blocks."""
    return [each for each in transformer.children() if each is not transformer.transformer_blocks]
