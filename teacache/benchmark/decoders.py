"""Rows of the decoder: as the command has it, then with one change each, which is taken back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from teacache.benchmark.table import Row
from teacache.sampling import acceleration, sampler
from teacache.sampling.decoder_memory import DecoderMemory

if TYPE_CHECKING:
    from teacache.benchmark.timing import Bench


def decodings(bench: Bench) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The name and the measurement of each row. The latents are those of the last step."""
    vae, expected = bench.pipe.vae, []

    def measure(change: contextlib.AbstractContextManager) -> Row:
        with change, DecoderMemory(bench.pipe, bench.size, "none").to_decode(last=False):
            sampler.decode(bench.pipe, bench.latents)  # warms up
            bench.forget_peak()
            seconds = []
            for _ in range(2):
                before = time.perf_counter()
                frames = sampler.decode(bench.pipe, bench.latents)
                seconds.append(time.perf_counter() - before)
        pixels = np.stack([np.asarray(frame, int) for frame in frames])
        expected.append(pixels)
        away = np.abs(pixels - expected[0]).max()
        notes = f"up to {away} of 255 away" if away else "the same frames"
        return Row(seconds, *bench.peak(), notes if len(expected) > 1 else "")

    changes: dict[str, contextlib.AbstractContextManager] = {
        "decoding": contextlib.nullcontext(),
        "decoding, cuDNN's fastest algorithms": _set(torch.backends.cudnn, "benchmark", True),
        "decoding, channels last": _channels_last(vae),
        "decoding, four latent frames at a time": _set(vae, "num_latent_frames_batch_size", 4),
        "decoding, compiled": _compiled(vae),
    }
    for figure, change in changes.items():
        yield figure, partial(measure, change)


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _channels_last(vae: torch.nn.Module) -> Iterator[None]:
    """Have the channels of all weights of 3D convolutions last, and so those of their outputs."""
    layers = [module for module in vae.modules() if isinstance(module, torch.nn.Conv3d)]
    before = [layer.weight.data for layer in layers]
    for layer in layers:
        layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight.data = weight


@contextlib.contextmanager
def _compiled(vae: torch.nn.Module) -> Iterator[None]:
    acceleration.compile_decoder(vae)
    try:
        yield
    finally:
        for module in vae.modules():
            module._compiled_call_impl = None
