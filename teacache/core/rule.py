"""The TeaCache rule: which denoising steps are computed, and which are reused.

The rule needs one number a step, the relative L1 distance between the timestep embeddings of this
step and of the step before. A polynomial fitted on the model rescales it to an estimate of how far
the model's output moves. The estimates are added up. While the sum is below the threshold, the step
is reused. Otherwise it is computed, and the sum starts again at zero.

For ConsisID the timestep embedding depends only on the timestep. So all distances of a video are
known before its first step, and so is its whole schedule: a value, returned by a pure function.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv:2411.19108.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from teacache.base.errors import ArgumentError

if TYPE_CHECKING:
    import torch

# The ways to reuse a step, see teacache.core.forward and .forecast.
REUSES = ("residual", "forecast")
# For `spread_steps`: the number of last steps that are computed, at most 3 of 10, as no later step
# corrects them; and a power above 1, for more computed steps early, which determine the content.
RETAINED = 3
DENSITY = 1.2
UNBOUNDED = (0.0, math.inf)  # a fitted range


def threshold_steps(
    rescaled: Sequence[float | None], rel_l1_thresh: float, limits: Limits
) -> tuple[int, ...]:
    """The published rule. Returns the indices of the computed steps, in rising order.

    Args:
        rescaled: rescaled distance of each step to the step before. A step with None is computed:
            it has no distance, or the polynomial does not cover it.
    """
    computed: list[int] = []
    accumulated = 0.0
    for step, distance in enumerate(rescaled):
        accumulated += distance or 0.0
        must_compute = distance is None or accumulated >= rel_l1_thresh
        last_computed = computed[-1] if computed else -1
        if must_compute or limits.forbid(step, len(rescaled), last_computed):
            computed.append(step)
            accumulated = 0.0
    return tuple(computed)


def spread_steps(num_steps: int, count: int, limits: Limits) -> tuple[int, ...]:
    """`count` computed steps: the first, the last ones, and others between, denser at the start.

    Raises:
        ArgumentError: if the video has fewer steps, or `limits` require more.
    """
    first = min(limits.retain_first, num_steps)
    last = min(limits.retain_last, num_steps - first)
    if not first + last <= count <= num_steps:
        possible = f"a video of {num_steps} steps has {first + last} to {num_steps} computed ones"
        raise ArgumentError(f"computed_steps {count}: {possible}")
    last = max(last, min(RETAINED, round(0.3 * count), count - first))
    start, inner = first - 1, count - first - last
    end = num_steps - last
    computed = list(range(first))
    for number in range(1, inner + 1):
        place = round(start + (end - start) * (number / (inner + 1)) ** DENSITY)
        latest = end - 1 - inner + number  # which leaves a step for each number that follows
        computed.append(max(computed[-1] + 1, min(place, latest)))
    computed += range(end, num_steps)
    most = max((b - a - 1 for a, b in itertools.pairwise(computed)), default=0)
    if limits.max_reuse is not None and most > limits.max_reuse:
        raise ArgumentError(
            f"computed_steps {count} reuses {most} steps in a row, max_reuse allows "
            f"{limits.max_reuse}: compute more"
        )
    return tuple(computed)


def whole_number(value: Any, name: str) -> int:
    """The value as an int. Raise ArgumentError if it is none, or a bool, as in a mask of steps."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{name} must be a whole number: found {value!r}")
    return int(value)


@dataclass(frozen=True)
class Coefficients:
    """The polynomial that rescales a relative L1 distance, and its source.

    values: highest power first. fitted_range: the distances that the fit covers; outside, p may be
    negative.
    """

    values: tuple[float, ...]
    fitted_range: tuple[float, float]
    source: str

    def rescale(self, distance: float) -> float:
        """The polynomial at `distance`: Horner's rule in float64, like `numpy.poly1d`."""
        result = 0.0
        for value in self.values:
            result = result * distance + value
        return result

    def covers(self, distance: float) -> bool:
        """Whether `distance` is in the fitted range, and its estimate is finite and 0 or more."""
        low, high = self.fitted_range
        return low <= distance <= high and 0.0 <= self.rescale(distance) < math.inf

    def as_json(self) -> dict[str, object]:
        """The content of a coefficients file; `fitted_range` is null if it is unbounded."""
        fitted_range = None if self.fitted_range == UNBOUNDED else list(self.fitted_range)
        return {"values": list(self.values), "fitted_range": fitted_range, "source": self.source}


# TeaCache uses them for ConsisID too, which was trained from CogVideoX-5B: ali-vilab/TeaCache,
# TeaCache4ConsisID/teacache_sample_video.py, line 82. In this range the polynomial is positive.
COGVIDEOX_5B = Coefficients(
    values=(-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    fitted_range=(0.00746, 0.32997),
    source="TeaCache for CogVideoX-5B, fitted at 50 steps",
)


@dataclass(frozen=True)
class Limits:
    """Limits on reuse that apply at any threshold. The defaults are as published.

    Attributes:
        retain_first, retain_last: number of computed steps at the start and at the end.
        max_reuse: largest number of reused steps in a row; None is no limit.
    """

    retain_first: int = 1
    retain_last: int = 1
    max_reuse: int | None = None

    def __post_init__(self) -> None:
        """Raise ArgumentError if a number is not whole, or below 1."""
        for name, value in vars(self).items():
            if value is not None and whole_number(value, name) < 1:
                raise ArgumentError(f"{name} must be 1 or more: found {value}")

    def forbid(self, step: int, num_steps: int, last_computed: int) -> bool:
        """Whether `step` of `num_steps` must be computed after the step `last_computed`."""
        if step < self.retain_first or step >= num_steps - self.retain_last:
            return True
        return self.max_reuse is not None and step - last_computed > self.max_reuse


PUBLISHED = Limits()


def relative_l1(embedding: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Relative distance of two timestep embeddings: mean(|e_t - e_(t-1)|) / mean(|e_(t-1)|).

    Both are [batch, time_embed_dim], outputs of `time_embedding`; the previous step was computed or
    reused. A scalar in their dtype: the rounding of bfloat16 is part of the published rule.
    """
    return (embedding - previous).abs().mean() / previous.abs().mean()


def distances_between(embeddings: Sequence[torch.Tensor]) -> tuple[float | None, ...]:
    """The distance of each step to the one before; None for the first. One synchronisation.

    embeddings: of each denoising step, [batch, time_embed_dim].
    """
    import torch

    pairs = itertools.pairwise(embeddings)
    moved = [relative_l1(embedding, previous) for previous, embedding in pairs]
    return (None, *torch.stack(moved).tolist()) if moved else (None,)


@dataclass(frozen=True)
class Schedule:
    """The computed steps of one video, and how the others are reused.

    Attributes:
        distances: of each step; None for the first.
        computed_steps: rising step indices.
        rel_l1_thresh: the threshold; None if the steps do not follow from one.
        coefficients, limits: the polynomial that rescales the distances; limits on reuse.
        reuse: one of `REUSES`.
    """

    distances: tuple[float | None, ...]
    computed_steps: tuple[int, ...]
    rel_l1_thresh: float | None
    coefficients: Coefficients = COGVIDEOX_5B
    limits: Limits = PUBLISHED
    reuse: str = "residual"

    @property
    def num_steps(self) -> int:
        """Number of denoising steps."""
        return len(self.distances)

    @property
    def reused_steps(self) -> tuple[int, ...]:
        """Rising step indices."""
        computed = set(self.computed_steps)
        return tuple(step for step in range(self.num_steps) if step not in computed)

    @property
    def rescaled(self) -> tuple[float | None, ...]:
        """p(x) of each step's distance x; None without a distance."""
        return tuple(x if x is None else self.coefficients.rescale(x) for x in self.distances)

    @property
    def steps_outside_fitted_range(self) -> tuple[int, ...]:
        """The steps whose distances the coefficients do not cover."""
        covers, known = self.coefficients.covers, enumerate(self.distances)
        return tuple(step for step, x in known if x is not None and not covers(x))

    @property
    def speedup(self) -> float:
        """Speed-up of denoising over every step computed, if a reused step takes no time."""
        return self.num_steps / len(self.computed_steps)

    def until(self, step: int) -> Schedule:
        """The part of the schedule before `step`, where a video was stopped."""
        done = tuple(computed for computed in self.computed_steps if computed < step)
        return replace(self, distances=self.distances[:step], computed_steps=done)

    def why_nothing_was_reused(self) -> str | None:
        """A short reason; None if a step was reused, or the threshold is 0 or None."""
        if not self.rel_l1_thresh or self.reused_steps:
            return None
        covers = self.coefficients.covers
        inner = self.distances[self.limits.retain_first : self.num_steps - self.limits.retain_last]
        estimates = [self.coefficients.rescale(x) for x in inner if x is not None and covers(x)]
        if estimates:
            return f"the smallest rescaled distance, {min(estimates):.4f}, is not below it"
        if inner:
            low, high = self.coefficients.fitted_range
            return f"the coefficients cover distances from {low:g} to {high:g} alone"
        return "the first and the last steps are always computed"


def schedule(
    distances: Sequence[float | None],
    rel_l1_thresh: float | None,
    coefficients: Coefficients = COGVIDEOX_5B,
    limits: Limits = PUBLISHED,
    reuse: str | None = None,
    computed_steps: int | Iterable[int] | None = None,
) -> Schedule:
    """The schedule of one video, by the published rule or by `computed_steps`.

    It deviates from the published rule in two cases in which that gives wrong results. A step whose
    distance the coefficients do not cover is computed; the published rule adds its estimate, which
    may be negative. And threshold 0 never reuses: no sum of covered estimates is below 0.

    Args:
        rel_l1_thresh: ignored if `computed_steps` is not None.
        reuse: one of `REUSES`; by default the forecast for a number of steps, else the residual.
        computed_steps: instead of the rule, the number of steps to compute, see `spread_steps`; or
            their indices, to which the first and the last are added.

    Raises:
        ArgumentError: if the threshold is negative or not finite, or a step is none of the video's.
    """
    known, num_steps = tuple(distances), len(distances)
    if computed_steps is None:
        rel_l1_thresh = check_threshold(rel_l1_thresh or 0.0)
        covers, rescale = coefficients.covers, coefficients.rescale
        rescaled = [rescale(x) if x is not None and covers(x) else None for x in known]
        steps = threshold_steps(rescaled, rel_l1_thresh, limits)
        return Schedule(known, steps, rel_l1_thresh, coefficients, limits, reuse or "residual")
    if not isinstance(computed_steps, Iterable):
        steps = spread_steps(num_steps, whole_number(computed_steps, "computed_steps"), limits)
        return Schedule(known, steps, None, coefficients, limits, reuse or "forecast")
    listed = (whole_number(step, "a computed step") for step in computed_steps)
    steps = tuple(sorted({0, num_steps - 1, *listed}))
    for step in steps:
        if not 0 <= step < num_steps:
            raise ArgumentError(f"step {step} cannot be computed: the video has {num_steps} steps")
    return Schedule(known, steps, None, coefficients, limits, reuse or "residual")


def check_threshold(rel_l1_thresh: float) -> float:
    """Return the threshold; raise ArgumentError if it is negative or not finite."""
    if not (math.isfinite(rel_l1_thresh) and rel_l1_thresh >= 0):
        raise ArgumentError(f"rel_l1_thresh must be 0 or more, and finite: found {rel_l1_thresh}")
    return float(rel_l1_thresh)
