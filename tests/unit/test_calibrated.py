"""Schedules from costs, against numbers worked out by hand and against every subset."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from teacache.base.errors import ArgumentError
from teacache.core.calibrated import Costs, best_steps, even_steps


def random_costs(rng, steps):
    """Residuals that wander, errors that are partly aligned: as what is measured, and rougher."""
    residuals = rng.normal(size=(steps, 6)).cumsum(axis=0) * rng.uniform(0.2, 2)
    cost = np.linalg.norm(residuals[:, None] - residuals[None], axis=-1)
    cost[np.tril_indices(steps)] = np.inf
    sensitivity = np.exp(rng.normal(size=steps))
    sensitivity[[0, -1]] = 0
    left = rng.normal(size=(steps, 4)) + rng.uniform(0, 2)
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    return Costs(cost, sensitivity, left @ left.T)


def test_the_error_by_hand():
    cost = np.full((5, 5), np.inf)
    cost[0, 1], cost[0, 2], cost[1, 2], cost[2, 3] = 1.0, 3.0, 2.0, 4.0
    alignment = np.eye(5)
    alignment[1, 2] = alignment[2, 1] = 0.5
    costs = Costs(cost, np.array([0, 2.0, 1.0, 0.5, 0]), alignment)
    assert costs.error((0, 1, 2, 3, 4)) == 0
    assert costs.error((0, 2, 3, 4)) == 2.0  # 1 x 2
    assert costs.error((0, 1, 2, 4)) == 2.0  # 4 x 0.5
    # Steps 1 and 2 leave 2 and 3, half aligned: 4 + 9 + 2 x 0.5 x 2 x 3.
    assert costs.error((0, 3, 4)) == pytest.approx(19**0.5)
    assert costs.error((0, 2, 4)) == pytest.approx(8**0.5)
    assert costs.error((0, 4)) == np.inf  # from step 0 to step 3 nothing was measured


@pytest.mark.parametrize("computed", range(2, 9))
def test_the_best_of_all_subsets(computed):
    """Of 8 steps: never worse than the even ones, and nearly always the best there is."""
    rng = np.random.default_rng(computed)
    best = 0
    for _ in range(40):
        costs = random_costs(rng, 8)
        found = best_steps(costs, computed)
        assert len(found) == computed
        assert (found[0], found[-1]) == (0, 7)
        every = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), computed - 2)]
        best += costs.error(found) == min(map(costs.error, every))
        assert costs.error(found) <= costs.error(even_steps(8, computed))
    assert best >= 39


def test_of_errors_that_cancel_both_are_made():
    """Steps 1 and 3 leave the opposite of each other: to compute one of them would do harm."""
    cost = np.triu(np.ones((6, 6)), 1)
    alignment = np.eye(6)
    alignment[1, 3] = alignment[3, 1] = -1.0
    costs = Costs(cost, np.array([0, 1.0, 2.0, 1.0, 2.0, 0]), alignment)
    assert best_steps(costs, 4) == (0, 2, 4, 5)
    assert costs.error((0, 2, 4, 5)) == 0


@pytest.mark.parametrize(
    ("num_steps", "computed", "retain_last", "expected"),
    [
        (10, 5, 1, (0, 2, 4, 6, 9)),
        (10, 5, 2, (0, 2, 5, 8, 9)),
        (10, 5, 4, (0, 6, 7, 8, 9)),
        (10, 5, 9, (0, 6, 7, 8, 9)),
        (10, 10, 2, tuple(range(10))),
        (10, 2, 2, (0, 9)),
        (2, 2, 2, (0, 1)),
        (1, 1, 2, (0,)),
    ],
)
def test_even_steps(num_steps, computed, retain_last, expected):
    assert even_steps(num_steps, computed, retain_last) == expected


def test_even_steps_are_even():
    for computed in range(4, 51):
        steps = even_steps(50, computed)
        assert len(set(steps)) == computed
        assert steps[-3:] == (47, 48, 49)
        gaps = np.diff(steps[:-2])
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("computed", [0, 1, 51])
def test_refuses_a_number_of_computed_steps(computed):
    with pytest.raises(ArgumentError, match=f"--computed_steps {computed}: of 50 steps 2 to 50"):
        even_steps(50, computed)
