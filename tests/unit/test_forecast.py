"""The forecast, against formulas and denoisers in closed form."""

import math

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DDIMScheduler

from teacache.base.errors import ArgumentError
from teacache.core.forecast import (
    Forecast,
    Settings,
    check_scheduler,
    settings_for,
    solver_steps,
)
from teacache.core.rule import Limits, spread_steps

KINDS = [CogVideoXDPMScheduler, CogVideoXDDIMScheduler]
CONFIG = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "snr_shift_scale": 1.0,
}


def scheduler_of(kind, steps, **changed):
    scheduler = kind(**{**CONFIG, **changed})
    scheduler.set_timesteps(steps)
    return scheduler


def products(scheduler):
    """alpha^2 at each trained timestep, computed from the configuration alone in NumPy."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2


@pytest.mark.parametrize("steps", [50, 7])
def test_ddim_steps_are_those_of_the_formula(steps):
    scheduler = scheduler_of(CogVideoXDDIMScheduler, steps)
    alphas_squared = products(scheduler)
    for at, t in zip(solver_steps(scheduler), scheduler.timesteps.tolist(), strict=True):
        square, before = alphas_squared[t], t - 1000 // steps
        next_square = alphas_squared[before] if before >= 0 else 1.0
        alpha, sigma = math.sqrt(square), math.sqrt(1 - square)
        to_alpha, to_sigma = math.sqrt(next_square), math.sqrt(1 - next_square)
        expected = (alpha, sigma, to_sigma / sigma, to_alpha - alpha * to_sigma / sigma, 0.0)
        # The scheduler's betas are float32, of which alpha^2 is a product of a thousand factors.
        assert tuple(at) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("steps", [50, 7])
def test_dpm_steps_are_those_of_the_formula(steps):
    """SDE-DPM-Solver++(2M), of first order in the first step and in one that ends without noise.

    The last of 7 steps does not end there, since 7 does not divide 1000.
    """
    scheduler = scheduler_of(CogVideoXDPMScheduler, steps)
    timesteps, alphas_squared = scheduler.timesteps.tolist(), scheduler.alphas_cumprod.double()

    def log_ratio(square):
        if square in (0, 1):
            return math.inf * (square - 0.5)
        return 0.5 * math.log(square / (1 - square))

    for step, (at, t) in enumerate(zip(solver_steps(scheduler), timesteps, strict=True)):
        square, before = alphas_squared[t].item(), t - 1000 // steps
        next_square = alphas_squared[before].item() if before >= 0 else 1.0
        h = log_ratio(next_square) - log_ratio(square)
        decay, to_alpha = math.exp(-h), math.sqrt(next_square)
        of_sample = math.sqrt((1 - next_square) / (1 - square)) * decay
        of_clean, of_previous = to_alpha * (1 - decay**2), 0.0
        if step > 0 and before >= 0:
            h_last = log_ratio(square) - log_ratio(alphas_squared[timesteps[step - 1]].item())
            half = h / (2 * h_last)  # 1 / 2r
            of_clean, of_previous = of_clean * (1 + half), -of_clean * half
        expected = (math.sqrt(square), math.sqrt(1 - square), of_sample, of_clean, of_previous)
        assert tuple(at) == pytest.approx(expected, abs=1e-5)


class Run:
    """A video of a few numbers: a scheduler's own steps over a denoiser in closed form.

    Args:
        denoiser: x0 of (alpha, sigma, sample).
    """

    def __init__(self, scheduler, denoiser, seed, shape=(1, 1, 4)):
        self.scheduler, self.denoiser = scheduler, denoiser
        self.solver = solver_steps(scheduler)
        self.generator = torch.Generator().manual_seed(seed)
        self.sample = torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def v(self, step):
        at = self.solver[step]
        return (at.alpha * self.sample - self.denoiser(at.alpha, at.sigma, self.sample)) / at.sigma

    def to_the_end(self, computed, settings=None):
        """The sample after each step. settings: of a forecast; None: v is held."""
        samples = []
        forecast = settings and Forecast(self.solver, settings)
        held = remembered = before = None
        for step, t in enumerate(self.scheduler.timesteps.tolist()):
            if step in computed:
                held = self.v(step)
                v = forecast.computed(step, self.sample, held) if forecast else held
            else:
                v = forecast.reused(step, self.sample) if forecast else held
            if isinstance(self.scheduler, CogVideoXDDIMScheduler):
                self.sample = self.scheduler.step(v, t, self.sample, return_dict=False)[0]
            else:
                self.sample, remembered = self.scheduler.step(
                    *(v, remembered, t, before, self.sample),
                    generator=self.generator,
                    return_dict=False,
                )
            before = t
            samples.append(self.sample)
        return torch.stack(samples)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("computed", [(0, 19), (0, 1, 5, 6, 12, 19)])
def test_exact_for_a_gaussian(kind, variance, computed):
    """A denoiser of that variance and a mean that stays: what is forecast is what it says."""
    mean = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)

    def denoiser(alpha, sigma, sample):
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return gain * sample + (1 - gain * alpha) * mean

    for early_slope in (0.5, 1.0):
        settings = Settings(variance, early_slope)
        every = Run(scheduler_of(kind, 20), denoiser, 0).to_the_end(range(20))
        ours = Run(scheduler_of(kind, 20), denoiser, 0).to_the_end(computed, settings)
        # The schedulers' alphas are float32 inside of a step, v divides by them: not 1e-15.
        assert (ours - every).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_corrected_to_what_interpolated_means_lead_to(kind):
    """Between computed steps m moves by a straight line: the correction makes up for all of it.

    The slopes differ from line to line, so that every forecast is wrong.
    """
    rates = torch.tensor([0.3, -1.2, 2.0, 0.0], dtype=torch.float64)
    computed = (0, 1, 5, 6, 12, 19)
    path = np.interp(range(20), computed, (0.0, 1.0, 0.2, 3.0, -1.0, 2.0))

    for variance, early_slope in ((0.1, 0.5), (0.0, 1.0)):
        scheduler = scheduler_of(kind, 20)
        alphas = [at.alpha for at in solver_steps(scheduler)]

        def denoiser(alpha, sigma, sample, alphas=alphas, variance=variance):
            gain = alpha * variance / (alpha**2 * variance + sigma**2)
            return gain * sample + (1 - gain * alpha) * rates * path[alphas.index(alpha)]

        every = Run(scheduler, denoiser, 0).to_the_end(range(20))
        settings = Settings(variance, early_slope)
        ours = Run(scheduler_of(kind, 20), denoiser, 0).to_the_end(computed, settings)
        off = (ours - every).abs().amax((1, 2, 3))
        # As for a Gaussian. What follows a computed step is the first step that shows it.
        assert off[list(computed)].max() < 1e-6
        assert off.max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_after_a_computed_one_keeps_its_very_v(kind):
    scheduler = scheduler_of(kind, 12)
    forecast = Forecast(solver_steps(scheduler), settings_for(scheduler))
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        sample, v = torch.randn(2, 1, 3, 4, generator=generator)
        assert forecast.computed(step, sample, v) is v


def mixture(generator):
    """The posterior mean of two Gaussians in four dimensions, of unlike weights and variances."""
    means = 1.5 * torch.randn(2, 4, generator=generator, dtype=torch.float64)
    weights, variances = (0.4, 0.6), (0.05, 0.2)

    def denoiser(alpha, sigma, sample):
        logs, posteriors = [], []
        for mean, weight, variance in zip(means, weights, variances, strict=True):
            total = alpha**2 * variance + sigma**2
            off = sample - alpha * mean
            logs.append(math.log(weight) - 2 * math.log(total) - off.square().sum(-1) / 2 / total)
            posteriors.append(mean + alpha * variance / total * off)
        parts = torch.stack(logs).softmax(0)
        return sum(p[..., None] * each for p, each in zip(parts, posteriors, strict=True))

    return denoiser


@pytest.mark.parametrize("kind", KINDS)
def test_nearer_than_v_that_is_held(kind):
    """To the run that computes every step, in the median of 64 videos of each of 4 mixtures.

    Not in the mean: where a video ends in the other Gaussian, either way is as far off.
    """
    computed = spread_steps(50, 8, Limits())
    for seed in range(4):
        denoiser = mixture(torch.Generator().manual_seed(seed))

        def end(steps, settings=None, seed=seed, denoiser=denoiser):
            run = Run(scheduler_of(kind, 50), denoiser, seed, shape=(64, 1, 4))
            return run.to_the_end(steps, settings)[-1]

        every, held = end(range(50)), end(computed)
        forecast = end(computed, settings_for(scheduler_of(kind, 50)))
        ours, theirs = ((each - every).norm(dim=-1).median() for each in (forecast, held))
        assert ours < 0.5 * theirs


def test_refuses_what_it_is_not_derived_for():
    for kind in KINDS:
        check_scheduler(scheduler_of(kind, 5))
        with pytest.raises(ArgumentError, match="prediction_type v_prediction, found epsilon"):
            check_scheduler(scheduler_of(kind, 5, prediction_type="epsilon"))
    with pytest.raises(ArgumentError, match="CogVideoXDDIMScheduler, found DDIMScheduler"):
        check_scheduler(DDIMScheduler(prediction_type="v_prediction"))
