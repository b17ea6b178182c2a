"""CogVideoX's decoder with less memory, bit for bit.

It decodes two latent frames at a time, and hands what a causal convolution needs of the frames
before from one call to the next, as `conv_cache`. Three things there take memory for nothing:

- a convolution of one frame in time keeps all of its input, and nothing reads it;
- what was kept of the last call stays until the whole call is done, beside what this one keeps;
- activation, scale, shift and shortcut each write another copy of tensors that nothing else reads.

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
    CogVideoXResnetBlock3D,
    CogVideoXSpatialNorm3D,
)

from teacache.core.handle import put_in_place, take_away

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX

Cache = dict[str, torch.Tensor | None]


def use_lean_decoder(vae: AutoencoderKLCogVideoX) -> None:
    """Let a VAE decode with less memory, the same numbers, until `undo_lean_decoder`."""
    for module in vae.decoder.modules():
        forward = _lean_forward(module)
        if forward is not None:
            put_in_place(module, functools.partial(forward, module))


def undo_lean_decoder(vae: AutoencoderKLCogVideoX) -> None:
    """Let a VAE decode as it did before."""
    for module in vae.decoder.modules():
        for place in ("_old_forward", "forward"):  # below an offload hook, or on the module
            forward = vars(module).get(place)
            if isinstance(forward, functools.partial) and forward.func is _lean_forward(module):
                take_away(module, forward)


def _lean_forward(module: torch.nn.Module):  # type: ignore[no-untyped-def]
    """What stands in the place of a module's forward; None where it is fine as it is."""
    if isinstance(module, CogVideoXCausalConv3d):
        one_frame = module.time_kernel_size == 1 and module.pad_mode != "replicate"
        return _convolve_one_frame if one_frame else None
    if isinstance(module, CogVideoXSpatialNorm3D):
        return _spatial_norm
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
    """Normalise the features, and scale and shift them by the latents.

    Args:
        f: [batch, channels, frames, height, width].
        zq: [batch, latent channels, latent frames, latent height, latent width]. Where the frames
            are odd in number the first one goes by itself: it was not compressed in time.
    """
    if f.shape[2] > 1 and f.shape[2] % 2 == 1:
        first, rest = (1, *f.shape[-2:]), (f.shape[2] - 1, *f.shape[-2:])
        parts = (F.interpolate(zq[:, :, :1], size=first), F.interpolate(zq[:, :, 1:], size=rest))
        zq = torch.cat(parts, dim=2)
    else:
        zq = F.interpolate(zq, size=f.shape[-3:])
    normed = module.norm_layer(f)
    normed.mul_(module.conv_y(zq)[0]).add_(module.conv_b(zq)[0])
    return normed, {}


def _residual_block(
    module: CogVideoXResnetBlock3D,
    inputs: torch.Tensor,
    temb: None = None,
    zq: torch.Tensor | None = None,
    conv_cache: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Two convolutions and a shortcut; the old caches leave their dictionary as they are used.

    Args:
        inputs: [batch, channels, frames, height, width].
        zq: see `_spatial_norm`.
        conv_cache: the two frames before, of each convolution; emptied.
    """
    before: dict[str, torch.Tensor] = {} if conv_cache is None else conv_cache
    kept: Cache = {}
    hidden = module.norm1(inputs, zq)[0]
    hidden, kept["conv1"] = _activate_and_pad(module.conv1, hidden, before.pop("conv1", None))
    hidden = module.norm2(module.conv1.conv(hidden), zq)[0]
    hidden, kept["conv2"] = _activate_and_pad(module.conv2, hidden, before.pop("conv2", None))
    hidden = module.conv2.conv(hidden)
    if module.in_channels != module.out_channels:
        inputs = module.conv_shortcut(inputs)
    return hidden.add_(inputs), kept


def _activate_and_pad(
    conv: CogVideoXCausalConv3d, hidden: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a causal convolution works on, activated, with the frames before in front of it; and
    what it needs of it the next time. By itself it would keep the features without them, too.
    """
    padded = conv.fake_context_parallel_forward(F.silu(hidden, inplace=True), before)
    return padded, padded[:, :, 1 - conv.time_kernel_size :].clone()
