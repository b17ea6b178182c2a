"""ConsisID with random weights, at its real size or smaller: in memory, or on disk.

A matrix product takes the same time with random numbers as with trained ones. The models are made
on the device, in the dtype of the run, and need no files. On disk they are a checkpoint in the real
layout, with the tokenizer and the face models of the embedded one.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
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
from transformers import T5Config, T5EncoderModel

from teacache.base.errors import OutputError
from teacache.base.quiet import no_progress_bars
from teacache.checkpoint.size import VideoSize
from teacache.embedded import configuration as tiny
from teacache.embedded.cached import cached_tiny_checkpoint
from teacache.embedded.faces import write_eva_clip
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
FULL_VAE: dict[str, Any] = {"scaling_factor": 0.7}
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}  # XXL
TINY_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
# Transformer, VAE and text encoder.
CONFIGS = {
    "full": (FULL, FULL_VAE, T5),
    "half": (HALF, FULL_VAE, T5),
    "tiny": (tiny.TRANSFORMER, tiny.VAE, TINY_T5),
}


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
    torch.manual_seed(0)
    with made_in_place(device, dtype):
        transformer, vae = random_models(name)
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
        vae=vae.to(dtype),
        transformer=transformer.to(dtype),
        scheduler=CogVideoXDPMScheduler(**tiny.SCHEDULER),
    )
    pipe.set_progress_bar_config(disable=True)
    pixels = pipe.vae_scale_factor_spatial
    size = VideoSize(
        config.sample_width * pixels, config.sample_height * pixels, config.sample_frames
    )
    return Material(
        pipe, Identity(id_cond, hidden, face, np.zeros((5, 2)), np.zeros(512)), text, size
    )


def random_models(name: str) -> tuple[ConsisIDTransformer3DModel, AutoencoderKLCogVideoX]:
    """Transformer and VAE, as their libraries initialise them."""
    transformer_config, vae_config, _ = CONFIGS[name]
    transformer = ConsisIDTransformer3DModel(**transformer_config).eval()
    return transformer, AutoencoderKLCogVideoX(**vae_config).eval()


def random_text_encoder(name: str) -> T5EncoderModel:
    """The text encoder, as its library initialises it."""
    *_, config = CONFIGS[name]
    return T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **config))


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


def write_checkpoint(folder: Path, name: str, device: torch.device) -> None:
    """Write a checkpoint of random weights, in bfloat16; at full size 22 GB.

    Args:
        folder: a new one.
        name: one of `CONFIGS`.
        device: where the weights are made.

    Raises:
        OutputError: if it exists.
    """
    if folder.exists():
        raise OutputError(f"--write {folder}: it exists")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a killed process
    shutil.copytree(cached_tiny_checkpoint(), part)
    torch.manual_seed(0)
    with no_progress_bars(), made_in_place(device, torch.bfloat16):
        transformer, vae = random_models(name)
        width = transformer.config.LFE_vit_dim
        _replace(part / "transformer", transformer)
        _replace(part / "vae", vae)
        del transformer, vae  # a GPU of 16 GB holds one of the two large models
        _replace(part / "text_encoder", random_text_encoder(name))
    if width != tiny.TRANSFORMER["LFE_vit_dim"]:
        write_eva_clip(part / "face_encoder", width)
    part.rename(folder)


def _replace(folder: Path, model: Any) -> None:
    shutil.rmtree(folder)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="5GB")
