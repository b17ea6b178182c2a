"""Forecast reuse: a reused step extrapolates the clean latents of the computed steps.

The transformer predicts v for latents x = alpha x0 + sigma noise. So x0 = alpha x - sigma v is its
estimate of the clean latents. Model it as the best linear denoiser for a Gaussian prior with mean m
and variance s:

    x0 = g x + (1 - g alpha) m,    g = alpha s / (alpha^2 s + sigma^2)

So x0 has a part that follows the noise in the latents, g x, and a part that does not, m.
Each computed step gives a value of m, which changes slowly and smoothly from step to step.

1. Forecast: a reused step extrapolates m from the last two computed steps, linearly in the index of
   the step. From m it computes x0 and v for its latents.
2. Correction: the next computed step gives a new m. Interpolation between the two computed steps is
   a better estimate of m at the reused steps between them. A sampler's step is linear in x0, so the
   latents for this better m can be computed without another forward. The computed step returns the
   v with which the sampler continues from these latents.

Residual reuse, in contrast, keeps v nearly constant. If the sampler adds noise at each step, a
constant v treats that noise as signal, but x0 treats it as noise. The correction is that of UniPC
(Zhao et al., arXiv:2302.04867), which corrects a sample without evaluating the model again. A
forecast needs two latents instead of a residual, no forward, and nothing from other ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from teacache.base.errors import ArgumentError

Scheduler: TypeAlias = CogVideoXDPMScheduler | CogVideoXDDIMScheduler


class SolverStep(NamedTuple):
    """One step of a sampler: x' = of_sample x + of_clean x0 + of_previous x0_before + noise.

    alpha, sigma: x = alpha x0 + sigma noise. x0_before: x0 of the previous step.
    """

    alpha: float
    sigma: float
    of_sample: float
    of_clean: float
    of_previous: float


class Settings(NamedTuple):
    """Parameters of a forecast.

    variance: s, of the prior. early_slope: factor on the slope of m in the first quarter of the
    steps. If the sampler adds noise, half of the slope there is noise.
    """

    variance: float
    early_slope: float


# Chosen on the embedded checkpoint and on a denoiser in closed form: teacache/benchmark/README.md.
WITH_NOISE = Settings(variance=0.1, early_slope=0.5)
WITHOUT_NOISE = Settings(variance=0.0, early_slope=1.0)  # g = 0: m is x0 itself


def settings_for(scheduler: Scheduler) -> Settings:
    """The settings for a sampler that adds noise at each step, or for one that does not."""
    return WITH_NOISE if isinstance(scheduler, CogVideoXDPMScheduler) else WITHOUT_NOISE


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise ArgumentError if the forecast does not support a scheduler."""
    if not isinstance(scheduler, (CogVideoXDPMScheduler, CogVideoXDDIMScheduler)):
        raise ArgumentError(
            "a forecast needs CogVideoXDPMScheduler or CogVideoXDDIMScheduler, found "
            f"{type(scheduler).__name__}: use the residual"
        )
    if scheduler.config.prediction_type != "v_prediction":
        raise ArgumentError(
            "a forecast needs a scheduler of prediction_type v_prediction, found "
            f"{scheduler.config.prediction_type}: use the residual"
        )


def solver_steps(scheduler: Scheduler) -> tuple[SolverStep, ...]:
    """The coefficients of each denoising step, computed with the scheduler itself.

    A step is linear. So each coefficient is the change of the result if the sample, x0 or the
    previous x0 changes from 0 to 1, with the same noise.

    Args:
        scheduler: after `set_timesteps`.
    """
    timesteps, products = scheduler.timesteps.tolist(), scheduler.alphas_cumprod.double()
    steps = []
    for timestep, before in zip(timesteps, [None, *timesteps], strict=False):
        alpha, sigma = products[timestep].sqrt().item(), (1 - products[timestep]).sqrt().item()
        stepped = functools.partial(_stepped, scheduler, timestep, before, alpha, sigma)
        still = stepped(0.0, 0.0, 0.0)
        ones = (stepped(1.0, 0.0, 0.0), stepped(0.0, 1.0, 0.0), stepped(0.0, 0.0, 1.0))
        steps.append(SolverStep(alpha, sigma, *(one - still for one in ones)))
    return tuple(steps)


def _stepped(
    scheduler: Scheduler,
    timestep: int,
    before: int | None,
    alpha: float,
    sigma: float,
    *numbers: float,
) -> float:
    """The scheduler's step on scalars. numbers: the sample, its x0, and the previous step's x0."""
    sample, clean, previous = (torch.tensor([number], dtype=torch.float64) for number in numbers)
    v = (alpha * sample - clean) / sigma
    if isinstance(scheduler, CogVideoXDDIMScheduler):
        return scheduler.step(v, timestep, sample, return_dict=False)[0].item()
    memory = None if before is None else previous
    noise = torch.Generator().manual_seed(0)
    stepped = scheduler.step(
        v, memory, timestep, before, sample, generator=noise, return_dict=False
    )
    return stepped[0].item()


class Forecast:
    """The forecast of one video, with the state of its computed steps.

    Samples and v are [batch, latent frames, channels, height, width], in float32. Both halves of
    guidance are in the batch, which is correct because all operations are linear.

    solver, settings: see `solver_steps` and `settings_for`.
    """

    def __init__(self, solver: tuple[SolverStep, ...], settings: Settings):
        self._solver, self._settings = solver, settings
        self._means: list[tuple[int, torch.Tensor]] = []  # m at the last two computed steps
        # DPM's next step also uses the x0 of this one. A correction that was added to that x0 is
        # subtracted there: this is its negative.
        self._from_previous: torch.Tensor | None = None

    @classmethod
    def by(cls, scheduler: Scheduler) -> Forecast:
        """The forecast of a video by this scheduler, after `set_timesteps`."""
        check_scheduler(scheduler)
        return cls(solver_steps(scheduler), settings_for(scheduler))

    def reused(self, step: int, sample: torch.Tensor) -> torch.Tensor:
        """v for a reused step."""
        last, mean = self._means[-1]
        slope = self._slope()
        if slope is not None:
            mean = mean + slope * (self._slope_weight(step) * (step - last))
        return self._v_of(step, sample, self._clean(step, sample, mean))

    def computed(self, step: int, sample: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """v for a computed step, corrected if it follows a reused step.

        Args:
            v: the transformer's prediction.
        """
        at, gain = self._solver[step], self._gain(step)
        clean = at.alpha * sample - at.sigma * v
        mean = (clean - gain * sample) / (1 - gain * at.alpha)
        shift = self._shift(step, mean)
        self._means = [*self._means[-1:], (step, mean)]
        if shift is None and self._from_previous is None:
            return v
        return self._v_of(step, sample, clean, shift)

    def _shift(self, step: int, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Change of the sample and of the previous x0 by interpolated instead of forecast means.

        Forecast and interpolation start at the last computed step with different slopes. The change
        is linear in each slope.

        Args:
            mean: m at this computed step.
        """
        if not self._means or step - self._means[-1][0] == 1:
            return None
        last, last_mean = self._means[-1]
        by_new = self._response(last, step, lambda _: 1.0)
        slope = (mean - last_mean) / (step - last)
        sample, clean = by_new[0] * slope, by_new[1] * slope
        forecast = self._slope()
        if forecast is not None:
            by_old = self._response(last, step, self._slope_weight)
            sample, clean = sample - by_old[0] * forecast, clean - by_old[1] * forecast
        return sample, clean

    def _response(
        self, last: int, step: int, weight: Callable[[int], float]
    ) -> tuple[float, float]:
        """Response to a slope of 1 of the mean from the computed step `last` on.

        Returns:
            the change of the sample of `step`, and of x0 of the step before.
        """
        sample = clean = 0.0
        for reused in range(last + 1, step):
            at, gain = self._solver[reused], self._gain(reused)
            before = clean
            clean = gain * sample + (1 - gain * at.alpha) * weight(reused) * (reused - last)
            sample = at.of_sample * sample + at.of_clean * clean + at.of_previous * before
        return sample, clean

    def _v_of(
        self,
        step: int,
        sample: torch.Tensor,
        clean: torch.Tensor,
        shift: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """v with which the sampler's step gives the result for the shifted sample and x0.

        Args:
            clean: x0 at the sample without the shift.
            shift: of the sample and of the previous x0, see `_shift`.
        """
        at, extra = self._solver[step], None
        if self._from_previous is not None:  # DPM has stored another x0 than intended
            extra = self._from_previous * (at.of_previous / at.of_clean)
        if shift is not None:
            sample_shift, previous_shift = shift
            moved = sample_shift * (at.of_sample / at.of_clean)
            moved = moved + previous_shift * (at.of_previous / at.of_clean)
            extra = moved if extra is None else extra + moved
            clean = clean + self._gain(step) * sample_shift
        if extra is not None:
            clean = clean + extra
        self._from_previous = None if extra is None or not at.of_previous else -extra
        return (at.alpha * sample - clean) / at.sigma

    def _slope(self) -> torch.Tensor | None:
        """Change of m per step between the last two computed steps; None before there are two."""
        if len(self._means) < 2:
            return None
        (first, earlier), (last, later) = self._means
        return (later - earlier) / (last - first)

    def _slope_weight(self, step: int) -> float:
        early = step < len(self._solver) // 4
        return self._settings.early_slope if early else 1.0

    def _gain(self, step: int) -> float:
        """g at a step."""
        at, s = self._solver[step], self._settings.variance
        return at.alpha * s / (at.alpha**2 * s + at.sigma**2)

    def _clean(self, step: int, sample: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """x0 at a sample, for a prior with that mean."""
        gain = self._gain(step)
        return gain * sample + (1 - gain * self._solver[step].alpha) * mean
