"""Which of the models' weights are on the GPU, chosen by its free memory.

`teacache/sampling/README.md` has the table, and says which figures were measured.
"""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch

from teacache.base.device import free_memory_bytes, total_memory_bytes
from teacache.checkpoint.folder import weight_files, weight_shapes
from teacache.checkpoint.size import Architecture, VideoSize
from teacache.request.values import Machine
from teacache.sampling.decoder_memory import decoding_bytes

GIB = 2**30
# Memory of denoising beyond the weights, in multiples of all tokens in the sampling dtype. On an
# H100 it reserved 3.55 GiB for 2 x 17,776 tokens of 3072 numbers in bfloat16.
COPIES_OF_TOKENS = 17.5
BESIDES = GIB // 2  # kernels' own memory, fragmentation
WHERE = {
    "none": "transformer resident",
    "blocks": "blocks streamed from host memory",
    "model": "one model at a time",
    "sequential": "one layer at a time, slow",
}


class Needs(NamedTuple):
    """GPU memory of the stages in bytes, weights included."""

    text: int  # the text encoder
    resident: int  # denoising, with the whole transformer on the GPU
    streamed: int  # denoising, with two of its blocks on the GPU
    decoding: int  # without the transformer


def fit_to_card(
    machine: Machine,
    checkpoint: Path,
    size: VideoSize,
    guided: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Machine, str]:
    """Replace each `auto` of a machine, and describe the result in one line; none for a CPU.

    Exact computation has priority: the transformer is on the GPU, or its blocks are streamed. The
    decoder works in tiles only if nothing else fits.
    """
    offload, tiling = machine.offload, machine.vae_tiling
    if device.type == "cpu":
        offload = "none" if offload == "auto" else offload
        tiling = "off" if tiling == "auto" else tiling
        return dataclasses.replace(machine, offload=offload, vae_tiling=tiling), ""
    free, total = free_memory_bytes(device), total_memory_bytes(device)
    needed = needs(checkpoint, size, guided, dtype)
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
    """The fastest way of `--offload` that fits."""
    if machine.num_gpus > 1 or needed.resident <= free:
        return "none"
    if machine.quantize:  # quantized layers cannot be streamed
        return "model"
    if machine.compile or max(needed.text, needed.streamed) <= free:
        return "blocks"
    return "sequential"


def needs(checkpoint: Path, size: VideoSize, guided: bool, dtype: torch.dtype) -> Needs:
    """GPU memory of the stages, by the shapes of a checkpoint's weights and the video's size."""
    model = Architecture.of(checkpoint)
    tokens = model.video_tokens(size) + model.text_tokens
    activations = (1 + guided) * tokens * model.heads * model.head_dim * COPIES_OF_TOKENS
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
    """Parameter count of a model, of the weights whose names have the prefix."""
    return sum(
        math.prod(shape)
        for path in weight_files(component)
        for name, shape in weight_shapes(path).items()
        if name.startswith(prefix)
    )
