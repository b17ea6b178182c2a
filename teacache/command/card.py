"""What of the models is on the GPU when, chosen by what the card has free.

The figures are those of the README's memory table: measured where it says so.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.device import free_memory_bytes, total_memory_bytes
from teacache.checkpoint.folder import weight_files, weight_shapes
from teacache.checkpoint.size import Architecture
from teacache.sampling.room import decoding_bytes

if TYPE_CHECKING:
    import torch

    from teacache.checkpoint.size import VideoSize
    from teacache.command.order import Machine

GIB = 2**30
# Of each number of the video's and the text's tokens, in the sampling dtype: on an H100 denoising
# reserved 3.55 GiB beyond the weights, for 2 x 17,776 tokens of 3072 numbers in bfloat16.
COPIES_OF_TOKENS = 17.5
BESIDES = GIB // 2  # kernels' own memory, fragmentation
WHERE = {
    "none": "transformer resident",
    "blocks": "blocks streamed from host memory",
    "model": "models brought one by one",
    "sequential": "layers brought one by one, slowly",
}


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of GPU memory that the stages take, weights included.

    Attributes:
        text: the text encoder. resident: denoising with the whole transformer there.
        streamed: denoising with two of its blocks there. decoding: without the transformer.
    """

    text: int
    resident: int
    streamed: int
    decoding: int


def fit_to_card(
    machine: Machine,
    checkpoint: Path,
    size: VideoSize,
    guided: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Machine, str]:
    """The machine with nothing left open, and a line that says what it comes to.

    What is exact comes first: the transformer stays on the GPU, or its blocks are streamed there;
    the decoder works in tiles where nothing else fits. On a CPU nothing is gained, nor said.
    """
    if device.type == "cpu":
        return dataclasses.replace(
            machine,
            offload="none" if machine.offload == "auto" else machine.offload,
            vae_tiling="on" if machine.vae_tiling == "on" else "off",
        ), ""
    free, total = free_memory_bytes(device), total_memory_bytes(device)
    needed = needs(checkpoint, size, guided, dtype)
    offload, tiling = machine.offload, machine.vae_tiling
    if offload == "auto":
        offload = choose_offload(machine, needed, free)
    if tiling == "auto":
        tiling = "on" if needed.decoding > free else "off"
    decoder = "decoder in tiles, not bit for bit" if tiling == "on" else "decoder untiled"
    line = (
        f"{'memory':<12}{total / GIB:8.1f} GiB, {free / GIB:.1f} free: {WHERE[offload]}, {decoder}"
    )
    return dataclasses.replace(machine, offload=offload, vae_tiling=tiling), line


def choose_offload(machine: Machine, needed: Needs, free: int) -> str:
    """The way of `--offload` that takes least time of those that fit."""
    if machine.num_gpus > 1 or needed.resident <= free:
        return "none"
    if machine.quantize:  # its layers cannot be streamed
        return "model"
    if machine.compile or max(needed.text, needed.streamed) <= free:
        return "blocks"
    return "sequential"


def needs(checkpoint: Path, size: VideoSize, guided: bool, dtype: torch.dtype) -> Needs:
    """What the stages take with a checkpoint, by its weights' shapes and the video's size."""
    model = Architecture.of(checkpoint)
    tokens = model.video_tokens(size) + model.text_tokens
    inner = model.heads * model.head_dim
    activations = (1 + guided) * tokens * inner * COPIES_OF_TOKENS
    transformer, vae, text = (
        numbers(checkpoint / part) for part in ("transformer", "vae", "text_encoder")
    )
    blocks = numbers(checkpoint / "transformer", "transformer_blocks.")
    streamed = blocks * (1 - 2 / model.num_layers)
    width = dtype.itemsize
    return Needs(
        text=int(text * width) + BESIDES,
        resident=int((transformer + vae + activations) * width) + BESIDES,
        streamed=int((transformer - streamed + vae + activations) * width) + BESIDES,
        decoding=vae * width + decoding_bytes(size, tiled=False),
    )


def numbers(component: Path, prefix: str = "") -> int:
    """How many numbers a model's weights are, of those whose names begin so."""
    return sum(
        math.prod(shape)
        for path in weight_files(component)
        for name, shape in weight_shapes(path).items()
        if name.startswith(prefix)
    )
