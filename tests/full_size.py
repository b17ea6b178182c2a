"""The transformer at full size on tensors that have no data, and what it is called with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler, ConsisIDTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from teacache.benchmark.random_weights import FULL
from teacache.core.forward import apply_teacache
from teacache.core.rule import schedule
from teacache.sampling.attention import use_attention
from teacache.sampling.blocks import use_lean_blocks

FRAMES, HEIGHT, WIDTH, TEXT = 13, 60, 90, 226  # latents of 49 frames of 720x480, text tokens


@contextlib.contextmanager
def fake_bfloat16() -> Iterator[None]:
    """Let new tensors have no data, and be bfloat16."""
    default = torch.get_default_dtype()
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def full_transformer(ours: bool) -> ConsisIDTransformer3DModel:
    """The real architecture; `ours`: with this package's attention and blocks."""
    transformer = ConsisIDTransformer3DModel(**FULL).eval()
    if ours:
        use_attention(transformer, "native")
        use_lean_blocks(transformer)
    return transformer


def step_inputs(samples: int) -> dict[str, Any]:
    """Of a call at published settings all but the timestep; `samples`: 2 with guidance."""
    rotary = (FRAMES * HEIGHT * WIDTH // 4, FULL["attention_head_dim"])
    return {
        "hidden_states": torch.empty(samples, FRAMES, 32, HEIGHT, WIDTH),
        "encoder_hidden_states": torch.empty(samples, TEXT, 4096),
        "image_rotary_emb": tuple(torch.empty(*rotary, dtype=torch.float32) for _ in range(2)),
        "id_cond": torch.empty(1, 1280),
        "id_vit_hidden": [torch.empty(1, 577, 1024) for _ in range(5)],
        "return_dict": False,
    }


@contextlib.contextmanager
def three_steps(transformer: ConsisIDTransformer3DModel) -> Iterator[torch.Tensor]:
    """Apply TeaCache, which then computes two steps and reuses one; yields their timesteps."""
    scheduler = CogVideoXDPMScheduler()
    scheduler.timesteps = torch.zeros(4, dtype=torch.int64)
    plan = schedule([1.0, 1.0, 1.0, 1.0], None, computed_steps=(0, 1, 3))
    with apply_teacache(transformer, schedule=plan, scheduler=scheduler):
        yield scheduler.timesteps
