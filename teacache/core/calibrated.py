"""Schedules of exactly so many computed steps: evenly spaced, or the best by measured costs.

A step that reuses an older residual predicts something else than it would have computed, and that
moves the latents at the end. Three measured things say how far (`teacache.calibrate`):

- the cost of reusing step i's residual at step j: how far the prediction of step j moves;
- the sensitivity of the result to an error of step j's prediction: what remains of it at the end;
- the alignment of two steps: whether what remains of their errors adds up or cancels.

To first order the error of a whole schedule is then a quadratic form, which takes microseconds to
evaluate: so schedules are searched, not derived. Sampling costs nothing more than with any other
list of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from teacache.base.errors import ArgumentError

# Of evenly spaced steps, so many at the end are computed besides: their errors are never corrected.
RETAINED = 3
# Where the search starts from: evenly spaced, so many of the last steps computed.
STARTS = (1, 2, 3, 4)


@dataclass(frozen=True, eq=False)
class Costs:
    """What reuse costs, measured for one model, scheduler and number of steps.

    Attributes:
        cost: [steps, steps], of reusing step i's residual at step j, at [i, j]: the root mean
            square by which the guided prediction moves. Infinite where it was not measured.
        sensitivity: [steps], the root mean square error of the final latents over that of the
            step's prediction. 0 for the first and the last step, which are never reused.
        alignment: [steps, steps], the cosine between the errors that two steps leave at the end.
    """

    cost: np.ndarray
    sensitivity: np.ndarray
    alignment: np.ndarray

    @property
    def num_steps(self) -> int:
        """Denoising steps in all."""
        return len(self.sensitivity)

    def error(self, computed_steps: tuple[int, ...]) -> float:
        """The root mean square error of the final latents that a schedule is predicted to make.

        Args:
            computed_steps: rising, the first and the last step among them.
        """
        last = np.zeros(self.num_steps, dtype=int)  # the last computed step, at each
        last[list(computed_steps)] = computed_steps
        last = np.maximum.accumulate(last)
        own = np.arange(self.num_steps)
        with np.errstate(invalid="ignore"):  # what infinite costs come to
            left = np.where(last == own, 0.0, self.cost[last, own] * self.sensitivity)
            squared = left @ self.alignment @ left
        return float(np.sqrt(max(squared, 0.0))) if np.isfinite(squared) else np.inf


def even_steps(num_steps: int, computed: int, retain_last: int = RETAINED) -> tuple[int, ...]:
    """So many steps, spread evenly from the first one on, with the last few all among them.

    Raises:
        ArgumentError: where there are not so many steps.
    """
    check_computed(num_steps, computed)
    retained = min(retain_last, computed - 1)
    spread = computed - retained
    end = num_steps - retained
    return (*(step * end // spread for step in range(spread)), *range(end, num_steps))


def best_steps(costs: Costs, computed: int) -> tuple[int, ...]:
    """So many steps, with the least error that the costs predict, as far as a search finds it.

    From several evenly spaced starts one step is exchanged for another as long as that helps, the
    best exchange each time.

    Raises:
        ArgumentError: where there are not so many steps.
    """
    starts = {even_steps(costs.num_steps, computed, last) for last in STARTS}
    ends = {_descend(costs, start) for start in starts}
    return min((costs.error(steps), steps) for steps in ends)[1]


def check_computed(num_steps: int, computed: int) -> None:
    """Raise ArgumentError where not so many of the steps can be computed."""
    least = min(2, num_steps)
    if not least <= computed <= num_steps:
        raise ArgumentError(
            f"--computed_steps {computed}: of {num_steps} steps {least} to {num_steps} are computed"
        )


def _descend(costs: Costs, steps: tuple[int, ...]) -> tuple[int, ...]:
    error = costs.error(steps)
    while True:
        exchanged = (
            tuple(sorted({*steps, new} - {old}))
            for old in steps[1:-1]
            for new in range(1, costs.num_steps - 1)
            if new not in steps
        )
        found = min(((costs.error(s), s) for s in exchanged), default=(np.inf, steps))
        if not found[0] < error:
            return steps
        error, steps = found
