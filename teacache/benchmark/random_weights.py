"""ConsisID with random weights, at its real size or smaller.

A matrix product takes the same time with random numbers as with trained ones. The models are made
on the device, in the dtype of the run, and need no files.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDPMScheduler,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
)
from PIL import Image

from teacache.checkpoint.size import VideoSize
from teacache.embedded import configuration as tiny
from teacache.inputs.identity import Identity
from teacache.inputs.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

# What differs from the defaults of diffusers, which are ConsisID's for everything else.
FULL = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "num_layers": 42,
    "in_channels": 32,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
}
# Half as wide and half as deep: an eighth of the linear layers' work, a quarter of attention's.
HALF = {**FULL, "num_attention_heads": 24, "num_layers": 21, "LFE_output_dim": 1024}
SMALL = {
    **FULL,
    "num_attention_heads": 12,
    "num_layers": 12,
    "text_embed_dim": 512,
    "max_text_seq_length": 64,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 17,
    "cross_attn_num_heads": 4,
    "LFE_vit_dim": 256,
    "LFE_num_heads": 4,
    "LFE_output_dim": 512,
}
FULL_VAE: dict[str, Any] = {"scaling_factor": 0.7}
SMALL_VAE = {**tiny.VAE, "temporal_compression_ratio": 4}
CONFIGS = {"full": (FULL, FULL_VAE), "half": (HALF, FULL_VAE), "small": (SMALL, SMALL_VAE)}


class Material(NamedTuple):
    """A pipeline without text encoder, and the inputs of a video."""

    pipe: ConsisIDPipeline
    identity: Identity
    text: Text
    size: VideoSize


def random_material(name: str, device: torch.device, dtype: torch.dtype) -> Material:
    """A random pipeline and random inputs.

    Args:
        name: one of `CONFIGS`.
    """
    transformer_config, vae_config = CONFIGS[name]
    torch.manual_seed(0)
    with made_in_place(device, dtype):
        transformer = ConsisIDTransformer3DModel(**transformer_config).eval().to(dtype)
        vae = AutoencoderKLCogVideoX(**vae_config).eval().to(dtype)
        config = transformer.config
        text = Text(
            *(torch.randn(1, config.max_text_seq_length, config.text_embed_dim) for _ in range(2))
        )
        hidden = [torch.randn(1, 577, config.LFE_vit_dim) for _ in range(5)]
        id_cond = torch.randn(1, config.LFE_id_dim)
    face = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))
    pipe = ConsisIDPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDPMScheduler(**tiny.SCHEDULER),
    )
    pipe.set_progress_bar_config(disable=True)
    size = VideoSize(config.sample_width * 8, config.sample_height * 8, config.sample_frames)
    identity = Identity(id_cond, hidden, face, np.zeros((5, 2)), np.zeros(512))
    return Material(pipe, identity, text, size)


def spread(computed_steps: int, num_infer_steps: int) -> list[int]:
    """The indices of the computed steps, evenly spaced, from the first step to the last."""
    return np.linspace(0, num_infer_steps - 1, computed_steps).round().astype(int).tolist()


@contextlib.contextmanager
def made_in_place(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make `device` and `dtype` the defaults for tensors created in the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
