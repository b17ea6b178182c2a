"""GPU memory for the decoder: the transformer is offloaded if both do not fit."""

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

# Decoding beyond the weights: at 720x480 7.0 GiB of tensors and 2.4 for cuDNN's convolutions, as on
# an H100, and 20 % more that torch's allocator reserved.
DECODING_BYTES_PER_PIXEL = 34 * 1024


class DecoderMemory:
    """Frees the memory of a pipeline's transformer while a video is decoded.

    Args:
        offload: the way of `--offload`. `model` and `sequential` have freed the memory already.
    """

    def __init__(self, pipe: ConsisIDPipeline, size: VideoSize, offload: str):
        self._pipe, self._size, self._offload = pipe, size, offload
        self._offloaded: Offloaded | None = None

    @contextlib.contextmanager
    def to_decode(self, last: bool) -> Iterator[None]:
        """Have enough memory for decoding in the block.

        For the last video the transformer's weights are deleted. Else they are in host memory
        during the block, if both do not fit.
        """
        transformer, device = self._pipe.transformer, self._pipe.vae.device
        if self._offload in ("model", "sequential") or (not last and self._both_fit(device)):
            yield
            return
        if last:
            if isinstance(transformer.transformer_blocks, StreamedBlocks):
                transformer.transformer_blocks.vacate()
            transformer.to("meta")
        else:
            self._offloaded = self._offloaded or Offloaded(transformer, device)
            self._offloaded.to_host()
        devices.free_cached_memory(device)
        try:
            yield
        finally:
            if self._offloaded and not last and not interruption.stop_requested():
                self._offloaded.to_device()

    def _both_fit(self, device: torch.device) -> bool:
        """Whether transformer and decoder fit on the GPU together; always true on a CPU."""
        tiled = self._pipe.vae.use_tiling
        return device.type == "cpu" or (
            devices.free_memory_bytes(device) > decoding_bytes(self._size, tiled)
        )


def decoding_bytes(size: VideoSize, tiled: bool) -> int:
    """Memory for decoding beyond the VAE's weights; in tiles less than 4 GiB, weights included."""
    whole = DECODING_BYTES_PER_PIXEL * size.width * size.height
    return min(whole, 4 * 2**30) if tiled else whole


class Offloaded:
    """Moves a transformer to host memory and back.

    The weights are copied to host memory once, at the first move, and must not change afterwards.
    torchao's quantized layers have no plain memory to copy: torch moves them each time.
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

    def to_host(self) -> None:
        """Move the weights to host memory."""
        if self._streamed is not None:
            self._streamed.vacate()
        if self.weights is None:
            self._transformer.to("cpu")
        for weights in self.weights or ():
            weights.to_host()

    def to_device(self) -> None:
        """Move the weights to the device."""
        if self.weights is None:
            self._transformer.to(self._device)
        for weights in self.weights or ():
            weights.to_device()
