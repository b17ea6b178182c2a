"""CogVideoX's decoder with less memory, bit for bit.

The decoder decodes two latent frames at a time. A causal convolution needs frames of the previous
call, which are passed on as `conv_cache`. Diffusers' code needs more memory than necessary:

- a convolution over one frame caches its whole input, and nothing reads it;
- the old caches exist until the call ends, beside the new ones;
- activation, scale, shift and shortcut each allocate a copy of a tensor that nothing else reads;
- the input of a block exists until the block ends, and the input of a layer until the layer ends.

The forwards below are those of diffusers (0.42.1, models/autoencoders/autoencoder_kl_cogvideox.py)
without that. They compute the same numbers in the same order. For sampling only: in-place
operations prevent gradients.
"""

import functools

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as cogvideox

from teacache.base.patch import put_in_place

Cache = dict[str, torch.Tensor | None]
Caches = dict[str, Cache]  # by block


def use_lean_decoder(vae: cogvideox.AutoencoderKLCogVideoX) -> None:
    """Replace the forwards of a VAE's decoder by those below, in place."""
    for module in vae.decoder.modules():
        forward = _lean_forward(module)
        if forward is not None:
            put_in_place(module, functools.partial(forward, module))


def _lean_forward(module: torch.nn.Module):  # type: ignore[no-untyped-def]
    """The replacement for a module's forward; None if it needs none."""
    if isinstance(module, cogvideox.CogVideoXCausalConv3d):
        return _convolve_one_frame if module.time_kernel_size == 1 else None
    if isinstance(module, cogvideox.CogVideoXSpatialNorm3D):
        return _spatial_norm
    if isinstance(module, cogvideox.CogVideoXDecoder3D):
        return _decoder
    if isinstance(module, cogvideox.CogVideoXUpBlock3D):
        return _up_block
    if isinstance(module, cogvideox.CogVideoXResnetBlock3D):
        return _residual_block if isinstance(module.nonlinearity, torch.nn.SiLU) else None
    return None


def _convolve_one_frame(
    module: cogvideox.CogVideoXCausalConv3d, inputs: torch.Tensor, conv_cache: None = None
) -> tuple[torch.Tensor, None]:
    """[batch, channels, frames, height, width]. It needs no previous frame, so no cache."""
    return module.conv(inputs), None


def _spatial_norm(
    module: cogvideox.CogVideoXSpatialNorm3D,
    f: torch.Tensor,
    zq: torch.Tensor,
    conv_cache: Cache | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Normalise the features, then scale and shift them by the latents; see `_modulate`."""
    return _modulate(module, module.norm_layer(f), zq), {}


def _modulate(
    module: cogvideox.CogVideoXSpatialNorm3D, normed: torch.Tensor, zq: torch.Tensor
) -> torch.Tensor:
    """Scale and shift normalised features by the latents, in place.

    Args:
        normed: [batch, channels, frames, height, width].
        zq: [batch, latent channels, latent frames, latent height, latent width]. With an odd number
            of frames the first one is interpolated alone, since it is not compressed in time.
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
    module: cogvideox.CogVideoXDecoder3D,
    sample: torch.Tensor,
    temb: None = None,
    conv_cache: dict[str, Caches] | None = None,
) -> tuple[torch.Tensor, dict[str, Caches]]:
    """[batch, latent channels, latent frames, latent height, latent width] to pixels."""
    before: dict[str, Caches] = conv_cache or {}
    after: dict[str, Caches] = {}
    hidden, after["conv_in"] = module.conv_in(sample, conv_cache=before.get("conv_in"))
    hidden, after["mid_block"] = module.mid_block(
        hidden, None, sample, conv_cache=before.get("mid_block")
    )
    for i, block in enumerate(module.up_blocks):
        holder = [hidden]
        del hidden
        name = f"up_block_{i}"
        hidden, after[name] = block(holder, None, sample, conv_cache=before.get(name))
    hidden, after["norm_out"] = module.norm_out(hidden, sample)
    hidden = module.conv_act(hidden)
    hidden, after["conv_out"] = module.conv_out(hidden, conv_cache=before.get("conv_out"))
    return hidden, after


def _up_block(
    module: cogvideox.CogVideoXUpBlock3D,
    holder: list[torch.Tensor],
    temb: None,
    zq: torch.Tensor,
    conv_cache: Caches | None = None,
) -> tuple[torch.Tensor, Caches]:
    """Residual blocks, then upsampling by two.

    holder: a list of one tensor, [batch, channels, frames, height, width]. It is popped, so that
    the tensor is freed after the first residual block.
    """
    before: Caches = conv_cache or {}
    after: Caches = {}
    hidden = holder.pop()
    for i, block in enumerate(module.resnets):
        name = f"resnet_{i}"
        hidden, after[name] = block(hidden, None, zq, conv_cache=before.get(name))
    for upsampler in module.upsamplers or ():
        hidden = upsampler(hidden)
    return hidden, after


def _residual_block(
    module: cogvideox.CogVideoXResnetBlock3D,
    inputs: torch.Tensor,
    temb: None,
    zq: torch.Tensor,
    conv_cache: dict[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Cache]:
    """Two convolutions and a shortcut; `inputs` and `zq` as for `_modulate`.

    It pops the old caches, the two previous frames of each convolution, which frees them after use.
    """
    before: dict[str, torch.Tensor] = {} if conv_cache is None else conv_cache
    after: Cache = {}
    hidden = module.norm1(inputs, zq)[0]
    # One statement for each operation, so that each frees the result of the previous one.
    hidden = _activate_and_pad(module.conv1, hidden, before.pop("conv1", None))
    after["conv1"] = _last_frames(module.conv1, hidden)
    hidden = module.conv1.conv(hidden)
    hidden = module.norm2.norm_layer(hidden)
    hidden = _modulate(module.norm2, hidden, zq)
    hidden = _activate_and_pad(module.conv2, hidden, before.pop("conv2", None))
    after["conv2"] = _last_frames(module.conv2, hidden)
    hidden = module.conv2.conv(hidden)
    if module.in_channels != module.out_channels:
        inputs = module.conv_shortcut(inputs)
    return hidden.add_(inputs), after


def _activate_and_pad(
    conv: cogvideox.CogVideoXCausalConv3d, hidden: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    """The input of a causal convolution: activated, with the previous frames in front.

    The convolution's own forward would hold a second copy without these frames.
    """
    padded: torch.Tensor = conv.fake_context_parallel_forward(F.silu(hidden, inplace=True), before)
    return padded


def _last_frames(conv: cogvideox.CogVideoXCausalConv3d, padded: torch.Tensor) -> torch.Tensor:
    """A copy of the frames that the next call of a causal convolution needs."""
    return padded[:, :, 1 - conv.time_kernel_size :].clone()
