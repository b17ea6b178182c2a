"""The TeaCache rule: which denoising steps are computed, and which reuse the cached residual.

The rule needs one number a step, the relative L1 distance between the timestep embeddings of this
step and of the one before. A polynomial fitted on the model rescales it to an estimate of how far
the model's output has moved; the estimates are added up, and while the sum stays below the
threshold the residual of the last computed step is good enough to be used again.

Source: Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
arXiv:2411.19108.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from teacache.errors import ArgumentError

if TYPE_CHECKING:
    import torch

DEGREE = 4
UNBOUNDED = (0.0, math.inf)


@dataclass(frozen=True)
class Coefficients:
    """The polynomial that rescales a relative L1 distance.

    Args:
        values: the coefficients, highest power first.
        fitted_range: the distances that the fit speaks for, ends included. Outside of it the
            polynomial is an extrapolation, which may well be below zero.
        source: where the coefficients come from.
    """

    values: tuple[float, ...]
    fitted_range: tuple[float, float]
    source: str

    def rescale(self, distance: float) -> float:
        """The polynomial at `distance`: Horner's rule in float64, as `numpy.poly1d` does it."""
        result = 0.0
        for value in self.values:
            result = result * distance + value
        return result

    def covers(self, distance: float) -> bool:
        """Whether the fit speaks for `distance`: inside its range, and a number from 0 on."""
        low, high = self.fitted_range
        return low <= distance <= high and 0.0 <= self.rescale(distance) < math.inf

    def as_json(self) -> dict[str, object]:
        """What `from_json` reads back."""
        bounded = self.fitted_range != UNBOUNDED
        return {
            "values": list(self.values),
            "fitted_range": list(self.fitted_range) if bounded else None,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, data: object) -> Coefficients:
        """Read what a coefficients file holds: `values`, `fitted_range` and `source`.

        Args:
            data: a JSON object. `values` (five numbers) is required; without `fitted_range`, or
                with null, every distance counts at which the polynomial is not negative.

        Raises:
            ArgumentError: naming the key that is wrong.
        """
        if not isinstance(data, dict):
            raise ArgumentError('the file must hold an object such as {"values": [a, b, c, d, e]}')
        unknown = sorted(set(data) - {"values", "fitted_range", "source"})
        if unknown:
            raise ArgumentError(f"unknown key {unknown[0]!r}; known: values, fitted_range, source")
        values = _finite_numbers(data.get("values"), "values", DEGREE + 1)
        fitted_range = UNBOUNDED
        if data.get("fitted_range") is not None:
            low, high = _finite_numbers(data["fitted_range"], "fitted_range", 2)
            if not 0 <= low < high:
                raise ArgumentError("fitted_range must be two rising distances, 0 or more")
            fitted_range = (low, high)
        source = data.get("source", "a coefficients file")
        if not isinstance(source, str):
            raise ArgumentError(f"source must be text, found {source!r}")
        return cls(values, fitted_range, source)


def _finite_numbers(value: object, key: str, count: int) -> tuple[float, ...]:
    numbers = value if isinstance(value, list) else []
    usable = [n for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)]
    try:
        finite = all(map(math.isfinite, usable))
    except OverflowError:  # a whole number beyond all floats
        finite = False
    if len(numbers) != count or len(usable) != count or not finite:
        raise ArgumentError(f"{key} must be a list of {count} finite numbers, found {value!r}")
    return tuple(float(number) for number in usable)


# Published with TeaCache for CogVideoX-5B, and used for ConsisID, which was trained from it,
# without fitting anew. The range is where the polynomial is positive.
COGVIDEOX_5B = Coefficients(
    values=(-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    fitted_range=(0.00746, 0.32997),
    source="TeaCache for CogVideoX-5B, fitted at 50 steps",
)


def relative_l1(embedding: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """How far the timestep embedding has moved: mean(|e_t - e_(t-1)|) / mean(|e_(t-1)|).

    Args:
        embedding: [batch, time_embed_dim], this step's output of `time_embedding`.
        previous: the same of the step before, whether that one was computed or reused.

    Returns:
        one number on the tensors' device, so that nothing waits for it yet. It is computed in their
        own dtype: with bfloat16 the rounding is part of the published rule.
    """
    return (embedding - previous).abs().mean() / previous.abs().mean()


def check_threshold(rel_l1_thresh: float) -> float:
    """Return the threshold, or raise ArgumentError where it is negative or not finite."""
    if not (math.isfinite(rel_l1_thresh) and rel_l1_thresh >= 0):
        raise ArgumentError(f"rel_l1_thresh must be 0 or more, and finite: found {rel_l1_thresh}")
    return float(rel_l1_thresh)


@dataclass
class Policy:
    """The rule over one video: `decide` is called once a denoising step, in order.

    Args:
        num_steps: denoising steps of the video.
        rel_l1_thresh: the threshold on the accumulated rescaled distance; 0 never reuses.
        coefficients: the polynomial and its fitted range.
        given: the steps to compute between the first and the last, where something else than the
            rule has decided on them.

    The lists that it fills are the schedule of the video: `computed_steps` and `reused_steps` hold
    step indices; `distances` and `rescaled` hold one entry a step, None for the first step, which
    has no step before it; `extrapolated_steps` are the steps whose distance the coefficients do
    not cover.
    """

    num_steps: int
    rel_l1_thresh: float
    coefficients: Coefficients = COGVIDEOX_5B
    given: frozenset[int] | None = None
    accumulated: float = 0.0
    computed_steps: list[int] = field(default_factory=list)
    reused_steps: list[int] = field(default_factory=list)
    distances: list[float | None] = field(default_factory=list)
    rescaled: list[float | None] = field(default_factory=list)
    extrapolated_steps: list[int] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Index of the step that the next call of `decide` is about."""
        return len(self.distances)

    @property
    def may_reuse(self) -> bool:
        """Whether any step may be reused: not at threshold 0."""
        return self.rel_l1_thresh > 0 or self.given is not None

    def decide(self, distance: float | None) -> bool:
        """Whether this step is computed (True) or reuses the cached residual (False).

        Args:
            distance: the relative L1 distance to the step before; None for the first step.
        """
        step = self.step
        rescaled = None if distance is None else self.coefficients.rescale(distance)
        self.distances.append(distance)
        self.rescaled.append(rescaled)
        extrapolated = distance is not None and not self.coefficients.covers(distance)
        if extrapolated:
            self.extrapolated_steps.append(step)

        # The published rule adds an extrapolated value too. Below zero that buys steps which
        # nothing has measured, so here such a step is computed and the sum starts anew.
        compute = step == 0 or step >= self.num_steps - 1 or extrapolated
        if self.given is not None:
            compute = step in self.given or step in (0, self.num_steps - 1)
        elif not compute:
            # Covered values are 0 or more, so with threshold 0 nothing is ever reused.
            self.accumulated += rescaled
            compute = not self.accumulated < self.rel_l1_thresh
        if compute:
            self.accumulated = 0.0
        (self.computed_steps if compute else self.reused_steps).append(step)
        return compute

    def why_nothing_was_reused(self) -> str | None:
        """The reason, in a few words, or None where a step was reused or none had to be."""
        if self.rel_l1_thresh == 0 or self.reused_steps:
            return None
        between = self.num_steps - 2
        if between <= 0:
            return "the first and the last step are always computed"
        inner = range(1, min(self.num_steps - 1, self.step))
        if not inner:
            return "no step came after the first"
        covered = [step for step in inner if step not in self.extrapolated_steps]
        if not covered:
            low, high = self.coefficients.fitted_range
            found = [self.distances[step] for step in inner]
            return (
                f"the coefficients cover distances from {low:g} to {high:g}, "
                f"this run's are {min(found):.4f} to {max(found):.4f}"
            )
        smallest = min(self.rescaled[step] for step in covered)
        return f"the smallest rescaled distance, {smallest:.4f}, is not below the threshold"
