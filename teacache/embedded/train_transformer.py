"""The last stage of the training: the transformer, on the clips' latents.

It learns v-prediction as the real one does, with its text dropped now and then. In the last part
it learns to be sampled with guidance: not its own prediction but the guided one has to be right.
Else guidance with a factor of 6 overshoots, and colours come out overdriven.

Of the 226 text tokens most are padding. The text encoder makes the same of each, and in this class
text has no positions; so in joint attention n of them weigh as much as one with log n added to its
score. The training computes that one.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import CogVideoXDPMScheduler, ConsisIDTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from torch import Tensor, nn

from teacache.core.forward import embed_video, run_blocks
from teacache.embedded import clips
from teacache.embedded.build import SCHEDULER, untrained_transformer
from teacache.embedded.descent import Descent, mean_gradients
from teacache.embedded.text import Reader

SEED = 2
PARTS, BATCH = 2, 8  # parts of a batch, clips in a part
TEXT_DROPPED = 0.2
GUIDANCE = 6.0  # the sampler's
GUIDED_FROM = 0.7  # of the training
UNGUIDED = 2  # of the clips in a part of the guided stage: their text is dropped


class Material(NamedTuple):
    """What the transformer is trained on, scaled as it sees it; n clips of m portraits.

    latents: [n, latent frames, channels, height, width].
    condition_mean, condition_std: [n, channels, height, width], of the autoencoder's posterior.
    faces: [m, queries, width], the face extractor's output.
    portrait: [n], the portrait of each clip.
    scenes: n.
    """

    latents: Tensor
    condition_mean: Tensor
    condition_std: Tensor
    faces: Tensor
    portrait: list[int]
    scenes: list[clips.Scene]


def train(
    folder: Path, material: Material, reader: Reader, steps: int, pool: ThreadPoolExecutor
) -> ConsisIDTransformer3DModel:
    """Train the transformer, or go on with it; its state is kept in `folder`."""
    transformer = trainable()
    descent = Descent(
        "transformer",
        transformer,
        lambda name, p: p.ndim == 2 and name.startswith(("transformer_blocks", "perceiver")),
        steps,
        folder,
        muon_rate=0.02,
        adam_rate=2e-3,
    )
    for step in descent.remaining():
        of_part = partial(
            _loss_of_part, transformer, material, reader, step >= GUIDED_FROM * steps, step
        )
        descent.apply(*mean_gradients(pool, descent.parameters, of_part, PARTS))
    descent.take_mean()
    return finished(transformer)


def _loss_of_part(
    transformer: ConsisIDTransformer3DModel,
    material: Material,
    reader: Reader,
    guided: bool,
    step: int,
    part: int,
) -> tuple[Tensor, dict[str, float]]:
    rng = np.random.default_rng([SEED, step, part])
    return loss(transformer, material, reader, rng, guided)


def trainable() -> ConsisIDTransformer3DModel:
    """The untrained transformer, its blocks quiet at first, ready for `predict`."""
    torch.manual_seed(SEED)
    transformer = untrained_transformer()
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            for norm in (block.norm1, block.norm2):
                # Shift, scale and gate of the video, then of the text.
                norm.linear.weight.mul_(0.3)
                norm.linear.bias.zero_()
                norm.linear.bias[2 * width : 3 * width] = 0.5
                norm.linear.bias[5 * width :] = 0.5
        for attend in transformer.perceiver_cross_attention:
            attend.to_out.weight.zero_()
        transformer.proj_out.weight.mul_(0.3)
    transformer.set_attn_processor(_PaddingAsOne())
    transformer.local_facial_extractor.requires_grad_(False)
    transformer.time_embedding.requires_grad_(False)
    positions = transformer.patch_embed.pos_embedding
    del transformer.patch_embed.pos_embedding
    transformer.patch_embed.pos_embedding = nn.Parameter(positions.float())
    return transformer


def finished(transformer: ConsisIDTransformer3DModel) -> ConsisIDTransformer3DModel:
    """The same as it is sampled with: a fresh one with its weights."""
    fresh = untrained_transformer()
    fresh.load_state_dict(transformer.state_dict())
    return fresh.eval().requires_grad_(False)


def loss(
    transformer: ConsisIDTransformer3DModel,
    material: Material,
    reader: Reader,
    rng: np.random.Generator,
    guided: bool,
) -> tuple[Tensor, dict[str, float]]:
    """The mean squared error of a batch's v-prediction, or of its guided one."""
    alphas = CogVideoXDPMScheduler(**SCHEDULER).alphas_cumprod.float()
    chosen = rng.integers(len(material.latents), size=BATCH)
    dropped = np.arange(BATCH) < UNGUIDED if guided else rng.random(BATCH) < TEXT_DROPPED
    prompts = [
        "" if drop else clips.prompt_of(material.scenes[n], rng)
        for n, drop in zip(chosen, dropped, strict=True)
    ]
    index = torch.from_numpy(chosen)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    latents = material.latents[index].float()
    noise = torch.randn(latents.shape, generator=generator)
    condition = material.condition_mean[index].float()
    spread = torch.randn(condition.shape, generator=generator)
    condition = condition + spread * material.condition_std[index].float()
    timesteps = torch.randint(0, len(alphas), (BATCH,), generator=generator)
    share = alphas[timesteps].view(-1, 1, 1, 1, 1)
    noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
    target = share.sqrt() * noise - (1 - share).sqrt() * latents
    image = torch.zeros_like(latents)
    image[:, 0] = condition
    inputs = torch.cat([noisy, image], 2)
    faces = material.faces[[material.portrait[n] for n in chosen]]

    predicted = predict(transformer, inputs, reader.short(prompts), timesteps, faces)
    if guided:
        rest = slice(UNGUIDED, None)
        with torch.no_grad():
            blank = reader.short([""] * (BATCH - UNGUIDED))
            plain = predict(transformer, inputs[rest], blank, timesteps[rest], faces[rest])
        steered = plain + GUIDANCE * (predicted[rest] - plain)
        predicted = torch.cat([predicted[:UNGUIDED], steered])
    errors = (predicted - target).square().mean((1, 2, 3, 4))
    early = timesteps >= 600
    figures = {"loss": errors.mean().item()}
    if early.any() and not early.all():
        figures |= {"early": errors[early].mean().item(), "late": errors[~early].mean().item()}
    else:
        figures |= {"early": figures["loss"], "late": figures["loss"]}
    # A guided error is GUIDANCE times that of the prediction it is made of; so is its gradient.
    weight = torch.ones(BATCH)
    if guided:
        weight[UNGUIDED:] = 1 / GUIDANCE
    return (weight * errors).mean(), figures


def predict(
    transformer: ConsisIDTransformer3DModel,
    inputs: Tensor,
    text: Tensor,
    timesteps: Tensor,
    faces: Tensor,
) -> Tensor:
    """What the transformer's forward returns, with the padding computed as one token.

    Args:
        inputs: [batch, latent frames, 32, height, width].
        text: [batch, TOKENS, text embed dim], see `text.Reader.short`.
        timesteps: [batch].
        faces: [batch, queries, width], the face extractor's output.
    """
    batch, frames, _, height, width = inputs.shape
    emb = transformer.time_embedding(transformer.time_proj(timesteps).to(inputs.dtype))
    video = run_blocks(
        transformer,
        embed_video(transformer.patch_embed, inputs),
        transformer.patch_embed.text_proj(text),
        emb,
        rotary_embedding(transformer),
        faces,
    )
    video = transformer.proj_out(transformer.norm_out(transformer.norm_final(video), temb=emb))
    p = transformer.config.patch_size
    video = video.reshape(batch, frames, height // p, width // p, -1, p, p)
    return video.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def rotary_embedding(transformer: ConsisIDTransformer3DModel) -> tuple[Tensor, Tensor]:
    """Cosines and sines, as `ConsisIDPipeline` makes them at the configuration's size."""
    config = transformer.config
    grid = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    return get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=((0, 0), grid),
        grid_size=grid,
        temporal_size=(config.sample_frames - 1) // config.temporal_compression_ratio + 1,
    )


class _PaddingAsOne:
    """Attention over few text tokens, the last of which stands for all the padding."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], 1)
        batch, length, _ = tokens.shape
        query, key, value = (
            project(tokens).view(batch, length, attn.heads, -1).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            torch.cat([part[:, :, :text], apply_rotary_emb(part[:, :, text:], image_rotary_emb)], 2)
            for part in (attn.norm_q(query), attn.norm_k(key))
        )
        weight = query.new_zeros(1, 1, 1, length)
        weight[..., text - 1] = math.log(226 - (text - 1))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=weight)
        out = attn.to_out[0](out.transpose(1, 2).reshape(batch, length, -1))
        return out[:, text:], out[:, :text]
