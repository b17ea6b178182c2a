"""Caches that decide while they sample, from the latents: SeaCache's rule, and cache-dit's DBCache.

How many steps these compute is not known beforehand. For a number of them a threshold is searched
for each video, by sampling it several times.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from teacache.calibrate.measure import predict_computed, predict_reusing
from teacache.core.forward import apply_teacache

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline, ConsisIDTransformer3DModel

    from teacache.sampling.sampler import Loop

# Of their thresholds, between which a search goes, and its halvings.
LEAST, MOST, HALVINGS = 1e-3, 3.0, 7


class Sampled(NamedTuple):
    """A video: latents [1, latent frames, 16, height / 8, width / 8], and its computed steps."""

    latents: torch.Tensor
    computed_steps: tuple[int, ...]


def with_computed(sample: Callable[[float], Sampled], computed: int) -> Sampled | None:
    """The video of the smallest threshold that computes no more than so many steps.

    Args:
        sample: of a threshold.

    Returns:
        None where no threshold computes so few. It may have computed fewer.
    """
    found = sample(MOST)
    if len(found.computed_steps) > computed:
        return None
    low, high = math.log(LEAST), math.log(MOST)
    for _ in range(HALVINGS):
        if len(found.computed_steps) == computed:
            break
        middle = (low + high) / 2
        sampled = sample(math.exp(middle))
        if len(sampled.computed_steps) > computed:
            low = middle
        else:
            high, found = middle, sampled
    return found


def sea_cache(
    pipe: ConsisIDPipeline, loop: Loop, threshold: float, *, order: int = 1, most: int = 2
) -> Sampled:
    """Sample a video by SeaCache's rule, as diffusers 0.42.1 has it in hooks/sea_cache.py;
    arXiv:2602.18993.

    What is compared from step to step are the noisy latents behind a filter that passes what is
    signal at this noise level. Defaults are diffusers'.

    Args:
        loop: the video's, of the pipeline's transformer, at its beginning.
        order: 0 reuses the last computed residual, 1 extrapolates from the last two.
        most: steps reused in a row.
    """
    alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].tolist()
    residuals: list[tuple[int, torch.Tensor]] = []
    computed: list[int] = []
    before, accumulated, reused = None, 0.0, 0
    with apply_teacache(pipe, schedule=[0]) as handle:
        for step, alpha in enumerate(alphas):
            signal = _signal(loop.latents, alpha)
            if before is not None:
                accumulated += float((signal - before).abs().mean() / before.abs().mean())
            before = signal
            if 0 < step < len(alphas) - 1 and reused < most and accumulated < threshold:
                residual = _extrapolated(residuals, step, order)
                loop.advance(predict_reusing(handle, loop, residual))
                reused += 1
                continue
            loop.advance(predict_computed(handle, loop))
            accumulated, reused = 0.0, 0
            computed.append(step)
            if handle.video.residual is not None:  # after the last step it is gone
                residuals = [*residuals[-1:], (step, handle.video.residual)]
    return Sampled(loop.latents, tuple(computed))


def _signal(latents: torch.Tensor, alpha_cumprod: float) -> torch.Tensor:
    """The latents behind SeaCache's filter, [latent frames, height, width, channels].

    Over time, height and width the Wiener gain of a signal whose power falls with the third power
    of the frequency; its mean is 1, so that of signal and noise the proportion matters alone.
    """
    video = latents[0].movedim(1, -1).float()
    ratio = ((1 - alpha_cumprod) / max(alpha_cumprod, 1e-12)) ** 0.5  # of noise to signal
    noise = min(max(ratio / (1 + ratio), 1e-6), 1 - 1e-6)  # flow matching's sigma
    gain = torch.ones((), device=video.device)
    for axis in range(3):
        frequency = torch.fft.fftfreq(video.shape[axis], device=video.device).abs()
        power = 1 / (frequency**3 + 1e-16)
        own = (1 - noise) * power / ((1 - noise) ** 2 * power + noise**2 + 1e-16)
        gain = gain * own.reshape([-1 if n == axis else 1 for n in range(4)])
    spectrum = torch.fft.fftn(video, dim=(0, 1, 2)) * (gain / gain.mean())
    return torch.fft.ifftn(spectrum, dim=(0, 1, 2)).real


def _extrapolated(residuals: list[tuple[int, torch.Tensor]], step: int, order: int) -> torch.Tensor:
    """The residual at a step, from those of the last computed steps."""
    latest, residual = residuals[-1]
    if order == 0 or len(residuals) == 1:
        return residual
    earlier, other = residuals[-2]
    return residual + (residual - other) * ((step - latest) / (latest - earlier))


def has_cache_dit() -> bool:
    """Whether cache-dit is installed: `pip install cache-dit==1.5.3`."""
    return importlib.util.find_spec("cache_dit") is not None


def db_cache(
    transformer: ConsisIDTransformer3DModel,
    sample: Callable[[], torch.Tensor],
    num_infer_steps: int,
    threshold: float,
) -> Sampled:
    """Sample a video under cache-dit's DBCache, its first block always computed.

    It runs all blocks as if they were one. So of the identity cross-attention layers, which this
    model has between its blocks, the first alone is called.

    Args:
        sample: samples the latents with the transformer as it is.
    """
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=1,
        num_inference_steps=num_infer_steps,
    )
    cache_dit.enable_cache(transformer, cache_config=config)
    try:
        latents = sample()
        reused = cache_dit.summary(transformer, logging=False)[0].cached_steps
        return Sampled(latents, tuple(n for n in range(num_infer_steps) if n not in reused))
    finally:
        cache_dit.disable_cache(transformer)
