"""The first stage of the training: the autoencoder, on cuttings of clips.

Its loss is L1 and L2 of the pixels, L1 of their differences to the neighbours, so that edges count,
and a little of the divergence from a normal distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as upstream
from torch import Tensor

from teacache.embedded import clips
from teacache.embedded.build import untrained_vae
from teacache.embedded.descent import Descent, mean_gradients

SEED = 1
FRAMES, SIDE = 5, 64  # of a cutting
PARTS, CUTTINGS = 2, 4  # parts of a batch, cuttings in a part
WHOLE_FRAMES_FROM = 0.8  # of the training: norms see whole frames in the end, as in use
POOL = 48  # clips at hand, a new one at each step


def untrained() -> AutoencoderKLCogVideoX:
    """The real class at small widths, so that a residual block passes on its input at first."""
    torch.manual_seed(SEED)
    vae = untrained_vae()
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, upstream.CogVideoXResnetBlock3D):
                module.conv2.conv.weight.zero_()
            if isinstance(module, upstream.CogVideoXSpatialNorm3D):
                module.conv_y.conv.weight.mul_(0.1)
                module.conv_y.conv.bias.fill_(1.0)
    return vae


def train(folder: Path, steps: int, pool: ThreadPoolExecutor) -> AutoencoderKLCogVideoX:
    """Train the autoencoder, or go on with it; its state is kept in `folder`."""
    vae = untrained()
    descent = Descent(
        "vae",
        vae,
        lambda name, p: p.ndim >= 4 and p.shape[-1] == 3 and "conv_in" not in name,
        steps,
        folder,
        muon_rate=0.01,
        adam_rate=3e-3,
    )
    at_hand: dict[int, clips.Clip] = {}
    with quick_convolutions():
        for step in descent.remaining():
            numbers = range(step, step + POOL)
            at_hand = {n: at_hand.get(n) or _clip(n) for n in numbers}
            whole = step >= WHOLE_FRAMES_FROM * steps
            of_part = partial(_loss_of_part, vae, list(at_hand.values()), whole, step)
            descent.apply(*mean_gradients(pool, descent.parameters, of_part, PARTS))
    descent.take_mean()
    return vae.eval().requires_grad_(False)


def _loss_of_part(
    vae: AutoencoderKLCogVideoX, at_hand: list[clips.Clip], whole: bool, step: int, part: int
) -> tuple[Tensor, dict[str, float]]:
    generator = torch.Generator().manual_seed(SEED + PARTS * step + part)
    frames = batch(np.random.default_rng([SEED, 1, step, part]), at_hand, whole)
    return loss(vae, frames, generator)


def _clip(number: int) -> clips.Clip:
    return clips.random_clip(np.random.default_rng([SEED, 0, number]))


def batch(rng: np.random.Generator, at_hand: list[clips.Clip], whole: bool) -> Tensor:
    """[cuttings, 3, frames, height, width], -1 to 1: of clips, or of faces, one frame each."""
    if rng.random() < 0.2:
        chosen = [at_hand[n].portrait for n in rng.integers(len(at_hand), size=2 * CUTTINGS)]
        return to_tensor(np.stack([clips.condition(portrait)[None] for portrait in chosen]))
    cuttings = []
    for number in rng.integers(len(at_hand), size=CUTTINGS // 2 if whole else CUTTINGS):
        frames = at_hand[number].frames
        start = rng.integers(len(frames) - FRAMES + 1)
        top = 0 if whole else rng.integers(clips.HEIGHT - SIDE + 1)
        left = 0 if whole else rng.integers(clips.WIDTH - SIDE + 1)
        cutting = frames[start : start + FRAMES, top:, left:]
        cuttings.append(cutting if whole else cutting[:, :SIDE, :SIDE])
    return to_tensor(np.stack(cuttings))


def to_tensor(frames: np.ndarray) -> Tensor:
    """[n, frames, height, width, 3], uint8, as the autoencoder takes it: [n, 3, ...], -1 to 1."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1)


def loss(
    vae: AutoencoderKLCogVideoX, frames: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and the PSNR of what comes back in dB."""
    posterior = vae.encode(frames).latent_dist
    back = vae.decode(posterior.sample(generator)).sample
    error = back - frames
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    square = error.square().mean()
    divergence = posterior.kl().sum() / posterior.mean.numel()
    total = error.abs().mean() + square + 0.5 * edges + 1e-4 * divergence
    figures = {"loss": total.item(), "psnr": 10 * np.log10(4 / square.item())}
    return total, figures


class _CausalConvolution(torch.autograd.Function):
    """A convolution over time and space as one over space, on the frames' channels side by side.

    The same sum as torch's conv3d, several times faster on a CPU: channels lie last in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, frames: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]
    ) -> Tensor:
        """frames: [batch, time, height, width, channels], padded in time."""
        batch, _, height, width, channels = frames.shape
        outputs, _, taps = weight.shape[:3]
        length = frames.shape[1] - taps + 1
        side_by_side = torch.cat([frames[:, n : n + length] for n in range(taps)], -1)
        planes = side_by_side.reshape(batch * length, height, width, -1).permute(0, 3, 1, 2)
        flat = weight.permute(0, 2, 1, 3, 4).reshape(outputs, taps * channels, *weight.shape[3:])
        flat = flat.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(planes, flat)
        ctx.sizes = frames.shape, weight.shape, padding
        out = F.conv2d(planes, flat, bias, padding=padding)
        return out.permute(0, 2, 3, 1).reshape(batch, length, height, width, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        planes, flat = ctx.saved_tensors
        (batch, time, height, width, channels), kernel, padding = ctx.sizes
        taps = kernel[2]
        length = time - taps + 1
        gradient = gradient.reshape(batch * length, height, width, -1).permute(0, 3, 1, 2)
        of_planes, of_flat, of_bias = torch.ops.aten.convolution_backward(
            gradient.contiguous(memory_format=torch.channels_last),
            planes,
            flat,
            [len(flat)],
            [1, 1],
            list(padding),
            [1, 1],
            False,
            [0, 0],
            1,
            [ctx.needs_input_grad[0], True, True],
        )
        of_weight = of_flat.reshape(kernel[0], taps, channels, *kernel[3:]).permute(0, 2, 1, 3, 4)
        if of_planes is None:
            return None, of_weight, of_bias, None
        parts = of_planes.permute(0, 2, 3, 1).reshape(batch, length, height, width, taps, channels)
        of_frames = gradient.new_zeros(batch, time, height, width, channels)
        for tap in range(taps):
            of_frames[:, tap : tap + length] += parts[..., tap, :]
        return of_frames, of_weight, of_bias, None


@contextmanager
def quick_convolutions() -> Iterator[None]:
    """Within the block, the autoencoder's causal convolutions are computed the quick way."""
    slow = upstream.CogVideoXCausalConv3d.forward

    def forward(self: Any, inputs: Tensor, conv_cache: Tensor | None = None) -> Any:
        padded = self.fake_context_parallel_forward(inputs, conv_cache)
        taps, conv = self.time_kernel_size, self.conv
        channels_last = padded.permute(0, 2, 3, 4, 1)
        if conv.weight.shape[-1] == 1:
            out = F.linear(channels_last, conv.weight.flatten(1), conv.bias)
        else:
            out = _CausalConvolution.apply(
                channels_last.contiguous(), conv.weight, conv.bias, conv.padding[1:]
            )
        return out.permute(0, 4, 1, 2, 3), padded[:, :, -taps + 1 :]

    upstream.CogVideoXCausalConv3d.forward = forward
    try:
        yield
    finally:
        upstream.CogVideoXCausalConv3d.forward = slow
