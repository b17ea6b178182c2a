"""A GPU's memory, which the transformer leaves to the decoder where both do not fit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from teacache.base import device as devices
from teacache.base import interruption
from teacache.sampling.streaming import HostWeights, StreamedBlocks, besides_blocks

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline, ConsisIDTransformer3DModel

    from teacache.checkpoint.size import VideoSize

# What decoding takes beyond the weights: at 720x480 7.0 GiB of tensors, and with 2.4 for cuDNN's
# convolutions, as an H100 had it, 9.4; and a fifth more, which torch's allocator held besides.
DECODING_BYTES_PER_PIXEL = 34 * 1024


class Room:
    """Whether and how a pipeline's transformer steps aside while videos are decoded.

    Args:
        offload: with `model` and `sequential` it has left already.
    """

    def __init__(self, pipe: ConsisIDPipeline, size: VideoSize, offload: str):
        self._pipe, self._size, self._offload = pipe, size, offload
        self._aside: Aside | None = None

    @contextlib.contextmanager
    def to_decode(self, last: bool) -> Iterator[None]:
        """Have the memory to decode in the block.

        Args:
            last: whether no other video follows: then the transformer's weights are dropped; else
                they wait in host memory for the end of the block, where both do not fit.
        """
        transformer, device = self._pipe.transformer, self._pipe.vae.device
        if self._offload in ("model", "sequential") or (not last and self._both_fit(device)):
            yield
            return
        if last:
            drop(transformer)
        else:
            self._aside = self._aside or Aside(transformer, device)
            self._aside.leave()
        devices.free_cached_memory(device)
        try:
            yield
        finally:
            if self._aside and not last and not interruption.stop_requested():
                self._aside.come()

    def _both_fit(self, device: torch.device) -> bool:
        """Whether a GPU can decode beside the transformer; on a CPU nothing is gained."""
        tiled = self._pipe.vae.use_tiling
        return device.type == "cpu" or (
            devices.free_memory_bytes(device) > decoding_bytes(self._size, tiled)
        )


def decoding_bytes(size: VideoSize, tiled: bool) -> int:
    """What decoding takes beyond the VAE's weights; in tiles less than 4 GiB, with them."""
    whole = DECODING_BYTES_PER_PIXEL * size.width * size.height
    return min(whole, 4 * 2**30) if tiled else whole


def drop(transformer: ConsisIDTransformer3DModel) -> None:
    """Free a transformer's weights."""
    if isinstance(transformer.transformer_blocks, StreamedBlocks):
        transformer.transformer_blocks.vacate()
    transformer.to("meta")


class Aside:
    """A transformer that steps aside and comes back.

    Its weights are copied to host memory once, when it first leaves, and must not change then.
    What torchao has made of layers has no plain memory to copy, and moves as torch moves it.
    """

    def __init__(self, transformer: ConsisIDTransformer3DModel, device: torch.device):
        self._transformer, self._device = transformer, device
        plain = all(type(each.data) is torch.Tensor for each in transformer.parameters())
        blocks = transformer.transformer_blocks
        self._streamed = blocks if isinstance(blocks, StreamedBlocks) else None
        modules = [] if self._streamed is not None else [*blocks]
        for child in besides_blocks(transformer):
            modules += [*child] if isinstance(child, torch.nn.ModuleList) else [child]
        self.weights = [HostWeights(module, device) for module in modules] if plain else None

    def leave(self) -> None:
        """To host memory."""
        if self._streamed is not None:
            self._streamed.vacate()
        if self.weights is None:
            self._transformer.to("cpu")
            return
        for weights in self.weights:
            weights.leave()

    def come(self) -> None:
        """To the device."""
        if self.weights is None:
            self._transformer.to(self._device)
            return
        for weights in self.weights:
            weights.come()
