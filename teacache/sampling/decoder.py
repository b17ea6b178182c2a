"""CogVideoX's decoder with less memory, bit for bit.

It decodes two latent frames at a time, and hands what a causal convolution needs of the frames
before from one call to the next, as `conv_cache`. Four things there take memory for nothing:

- a convolution of one frame in time keeps all of its input, and nothing reads it;
- what was kept of the last call stays until the whole call is done, beside what this one keeps;
- activation, scale, shift and shortcut each write another copy of tensors that nothing else reads;
- what a block has worked on stays until the next block is done, and what a layer has until the next
  layer is.

The forwards below are diffusers' (0.42.1, models/autoencoders/autoencoder_kl_cogvideox.py) without
them. They compute the same numbers in the same order. They are for sampling: what is written in
place could not be differentiated through.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
    CogVideoXUpBlock3D,
)

from teacache.base.patch import put_in_place

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX

Cache = dict[str, torch.Tensor | None]
Caches = dict[str, Cache]  # of the blocks within


def use_lean_decoder(vae: AutoencoderKLCogVideoX) -> None:
    """Let a VAE decode with less memory, the same numbers."""
    for module in vae.decoder.modules():
        forward = _lean_forward(module)
        if forward is not None:
            put_in_place(module, functools.partial(forward, module))


def _lean_forward(module: torch.nn.Module):  # type: ignore[no-untyped-def]
    """What stands in the place of a module's forward; None where it is fine as it is."""
    if isinstance(module, CogVideoXCausalConv3d):
        one_frame = module.time_kernel_size == 1 and module.pad_mode != "replicate"
        return _convolve_one_frame if one_frame else None
    if isinstance(module, CogVideoXSpatialNorm3D):
        return _spatial_norm
    if isinstance(module, CogVideoXDecoder3D):
        return _decoder
    if isinstance(module, CogVideoXUpBlock3D):
        return _up_block
    if isinstance(module, CogVideoXResnetBlock3D):
        plain = isinstance(module.nonlinearity, torch.nn.SiLU) and not module.use_conv_shortcut
        plain = plain and module.conv1.pad_mode != "replicate"
        return _residual_block if plain and not module.training else None
    return None


def _convolve_one_frame(
    module: CogVideoXCausalConv3d, inputs: torch.Tensor, conv_cache: None = None
) -> tuple[torch.Tensor, None]:
    """[batch, channels, frames, height, width]; no frame before has a say, so none is kept."""
    return module.conv(inputs), None


def _spatial_norm(
    module: CogVideoXSpatialNorm3D,
    f: torch.Tensor,
    zq: torch.Tensor,
    conv_cache: Cache | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Normalise the features, and scale and shift them by the latents; see `_modulate`."""
    return _modulate(module, module.norm_layer(f), zq), {}


def _modulate(
    module: CogVideoXSpatialNorm3D, normed: torch.Tensor, zq: torch.Tensor
) -> torch.Tensor:
    """Scale and shift normalised features by the latents, in place.

    Args:
        normed: [batch, channels, frames, height, width].
        zq: [batch, latent channels, latent frames, latent height, latent width]. Where the frames
            are odd in number the first one goes by itself: it was not compressed in time.
    """
    frames, *area = normed.shape[2:]
    if frames > 1 and frames % 2 == 1:
        first, rest = (1, *area), (frames - 1, *area)
        parts = (F.interpolate(zq[:, :, :1], size=first), F.interpolate(zq[:, :, 1:], size=rest))
        zq = torch.cat(parts, dim=2)
    else:
        zq = F.interpolate(zq, size=(frames, *area))
    return normed.mul_(module.conv_y(zq)[0]).add_(module.conv_b(zq)[0])


def _decoder(
    module: CogVideoXDecoder3D,
    sample: torch.Tensor,
    temb: None = None,
    conv_cache: dict[str, Caches] | None = None,
) -> tuple[torch.Tensor, dict[str, Caches]]:
    """[batch, latent channels, latent frames, latent height, latent width] to pixels."""
    before: dict[str, Caches] = conv_cache or {}
    kept: dict[str, Caches] = {}
    hidden, kept["conv_in"] = module.conv_in(sample, conv_cache=before.get("conv_in"))
    hidden, kept["mid_block"] = module.mid_block(
        hidden, None, sample, conv_cache=before.get("mid_block")
    )
    for i, block in enumerate(module.up_blocks):
        handed = [hidden]
        del hidden
        name = f"up_block_{i}"
        hidden, kept[name] = block(handed, None, sample, conv_cache=before.get(name))
    hidden, kept["norm_out"] = module.norm_out(hidden, sample)
    hidden = module.conv_act(hidden)
    hidden, kept["conv_out"] = module.conv_out(hidden, conv_cache=before.get("conv_out"))
    return hidden, kept


def _up_block(
    module: CogVideoXUpBlock3D,
    handed: list[torch.Tensor],
    temb: None,
    zq: torch.Tensor,
    conv_cache: Caches | None = None,
) -> tuple[torch.Tensor, Caches]:
    """Residual blocks, and the picture twice as large.

    Args:
        handed: [batch, channels, frames, height, width] in a list, out of which it is taken: so
            nothing holds it beyond the first residual block.
    """
    before: Caches = conv_cache or {}
    kept: Caches = {}
    hidden = handed.pop()
    for i, block in enumerate(module.resnets):
        name = f"resnet_{i}"
        hidden, kept[name] = block(hidden, None, zq, conv_cache=before.get(name))
    for upsampler in module.upsamplers or ():
        hidden = upsampler(hidden)
    return hidden, kept


def _residual_block(
    module: CogVideoXResnetBlock3D,
    inputs: torch.Tensor,
    temb: None,
    zq: torch.Tensor,
    conv_cache: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Two convolutions and a shortcut; the old caches leave their dictionary as they are used.

    Args:
        inputs: [batch, channels, frames, height, width].
        zq: see `_modulate`.
        conv_cache: the two frames before, of each convolution; emptied.
    """
    before: dict[str, torch.Tensor] = {} if conv_cache is None else conv_cache
    kept: Cache = {}
    hidden = module.norm1(inputs, zq)[0]
    # One after the other, so that each step frees what the one before has made.
    hidden = _activate_and_pad(module.conv1, hidden, before.pop("conv1", None))
    kept["conv1"] = _last_frames(module.conv1, hidden)
    hidden = module.conv1.conv(hidden)
    hidden = module.norm2.norm_layer(hidden)
    hidden = _modulate(module.norm2, hidden, zq)
    hidden = _activate_and_pad(module.conv2, hidden, before.pop("conv2", None))
    kept["conv2"] = _last_frames(module.conv2, hidden)
    hidden = module.conv2.conv(hidden)
    if module.in_channels != module.out_channels:
        inputs = module.conv_shortcut(inputs)
    return hidden.add_(inputs), kept


def _activate_and_pad(
    conv: CogVideoXCausalConv3d, hidden: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    """What a causal convolution works on, activated, with the frames before in front of it.

    By itself it would keep the features without them, too.
    """
    padded: torch.Tensor = conv.fake_context_parallel_forward(F.silu(hidden, inplace=True), before)
    return padded


def _last_frames(conv: CogVideoXCausalConv3d, padded: torch.Tensor) -> torch.Tensor:
    """What a causal convolution needs the next time, a copy."""
    return padded[:, :, 1 - conv.time_kernel_size :].clone()
