"""The rule, against numbers worked out by hand and against a second computation."""

import json
import math

import numpy as np
import pytest
import torch

from teacache.base.errors import ArgumentError
from teacache.core.rule import (
    COGVIDEOX_5B,
    Coefficients,
    Limits,
    Schedule,
    check_threshold,
    distances_between,
    relative_l1,
    schedule,
    spread_steps,
)
from teacache.request.readers import coefficients_of

IDENTITY = Coefficients((0.0, 0.0, 0.0, 1.0, 0.0), (0.0, math.inf), "p(x) = x")


def planned(distances, rel_l1_thresh, coefficients=COGVIDEOX_5B) -> Schedule:
    """The schedule over the distances of all steps but the first, which has none."""
    return schedule([None, *distances], rel_l1_thresh, coefficients)


def test_relative_l1_by_hand():
    previous = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    embedding = torch.tensor([[1.5, -2.0], [2.0, -3.0]])
    # |differences|: 0.5, 0, 1, 1, mean 0.625; |previous|: 1, 2, 3, 4, mean 2.5
    assert relative_l1(embedding, previous) == 0.25


def test_relative_l1_rounds_as_the_sampling_dtype_does():
    previous = torch.full((2, 3), 3.0, dtype=torch.bfloat16)
    embedding = torch.full((2, 3), 3.25, dtype=torch.bfloat16)
    # 0.25 / 3 = 0.08333..., of which bfloat16's 8 significant bits keep 171 / 2048
    assert relative_l1(embedding, previous) == 171 / 2048


def test_published_polynomial_by_hand():
    # -1538.80483 x^4 + 843.202495 x^3 - 134.363087 x^2 + 7.97131516 x - 0.0523162339
    for distance, by_hand in ((0.0, -0.0523162339), (0.1, 0.0905064241), (0.05, 0.1061245882875)):
        # The hand computation is decimal; 1e-15 is a few units in the last place of float64.
        assert COGVIDEOX_5B.rescale(distance) == pytest.approx(by_hand, abs=1e-15)


def test_published_range_is_where_the_polynomial_is_positive():
    low, high = COGVIDEOX_5B.fitted_range
    roots = sorted(root.real for root in np.roots(COGVIDEOX_5B.values) if abs(root.imag) < 1e-12)
    # The range is given to five decimals.
    assert (low, high) == pytest.approx((roots[0], roots[-1]), abs=5e-6)


def test_distances_are_those_of_each_step_to_the_one_before():
    embeddings = [torch.full((2, 3), value) for value in (1.0, 1.5, 3.0)]
    assert distances_between(embeddings) == (None, 0.5, 1.0)
    assert distances_between(embeddings[:1]) == (None,)


def test_accumulates_until_the_threshold_and_starts_anew():
    found = planned([0.4, 0.4, 0.4, 0.25, 0.5, 0.25, 0.1], 1.0, IDENTITY)
    # sums: .4 reuse, .8 reuse, 1.2 compute, .25 reuse, .75 reuse, 1.0 is not below: compute; last
    assert found.computed_steps == (0, 3, 6, 7)
    assert found.reused_steps == (1, 2, 4, 5)
    assert found.distances == (None, 0.4, 0.4, 0.4, 0.25, 0.5, 0.25, 0.1)
    assert found.rescaled == found.distances
    assert (found.num_steps, found.speedup) == (8, 2.0)


@pytest.mark.parametrize(
    ("limits", "computed"),
    [
        # Without limits: sums .3 .6 .9 1.2 compute, and so on by four.
        (Limits(), (0, 4, 8, 11)),
        (Limits(retain_first=3), (0, 1, 2, 6, 10, 11)),
        (Limits(retain_last=3), (0, 4, 8, 9, 10, 11)),
        (Limits(max_reuse=1, retain_last=2), (0, 2, 4, 6, 8, 10, 11)),
        (Limits(retain_first=99, retain_last=99), tuple(range(12))),
    ],
)
def test_limits_are_computed_whatever_the_threshold(limits, computed):
    distances = [None, *[0.3] * 11]
    assert schedule(distances, 1.0, IDENTITY, limits).computed_steps == computed
    assert schedule(distances, 0.0, IDENTITY, limits).computed_steps == tuple(range(12))


def test_why_nothing_was_reused_and_wrong_limits():
    limits = Limits(retain_first=2, retain_last=3)
    for plan, why in (
        (schedule([None, *[0.3] * 4], 1.0, IDENTITY, limits), "first and the last steps are"),
        (planned([0.5, 0.6, 0.55, 0.5], 0.1), "0.00746 to 0.32997"),
        (planned([0.03, 0.04, 0.05, 0.03], 0.05), "0.0874"),
    ):
        assert why in plan.why_nothing_was_reused()
    for wrong in ({"retain_first": 0}, {"retain_last": -1}, {"max_reuse": 0}):
        with pytest.raises(ArgumentError, match=f"{min(wrong)} must be 1 or more"):
            Limits(**wrong)


@pytest.mark.parametrize(
    "steps", [[1.5], [0, 2.0], "012", [True, False], np.array([True]), [None], 2.5, np.float32(2)]
)
def test_steps_that_are_no_whole_numbers_are_refused(steps):
    with pytest.raises(ArgumentError, match="must be a whole number: found"):
        schedule([None, *[0.03] * 4], None, computed_steps=steps)
    with pytest.raises(ArgumentError, match="max_reuse must be a whole number: found"):
        Limits(max_reuse=steps)


@pytest.mark.parametrize("kind", [np.array, set, iter])
def test_steps_of_any_library(kind):
    distances = (None, *[0.03] * 5)
    expected = schedule(distances, None, computed_steps=[2, 3])
    assert schedule(distances, None, computed_steps=kind([2, 3])) == expected
    count = schedule(distances, None, computed_steps=np.int64(4))
    assert count == schedule(distances, None, computed_steps=4)


@pytest.mark.parametrize("limits", [Limits(), Limits(1, 2, 3)])
def test_a_higher_threshold_computes_no_more(limits):
    distances = [None, *np.random.default_rng(0).uniform(0.02, 0.2, 49).tolist()]
    thresholds = np.linspace(0, 2, 100)
    plans = [schedule(distances, x, COGVIDEOX_5B, limits) for x in thresholds]
    counts = [len(plan.computed_steps) for plan in plans]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_first_and_last_step_are_computed(steps):
    found = planned([0.01] * (steps - 1), 100.0, IDENTITY)
    assert found.computed_steps == tuple(sorted({0, steps - 1}))
    assert found.reused_steps == (1,)[: max(0, steps - 2)]


@pytest.mark.parametrize(
    "coefficients",
    [COGVIDEOX_5B, IDENTITY, Coefficients((0.0, 0.0, 0.0, 0.0, -1.0), (0.0, 1.0), "p(x) = -1")],
)
def test_threshold_0_never_reuses(coefficients):
    found = planned([0.0, 0.001, 0.03, 0.5, 0.9, 3.0] * 8 + [0.03], 0.0, coefficients)
    assert found.computed_steps == tuple(range(50))
    assert found.why_nothing_was_reused() is None


@pytest.mark.parametrize("outside", [0.007, 0.34, math.inf, math.nan])
def test_outside_the_fitted_range_is_computed_and_starts_anew(outside):
    found = planned([0.03, outside, 0.03, 0.03, 0.03, 0.03], 0.15)
    # p(0.03) is 0.0874: one fits below 0.15, two do not, unless the sum starts anew in between.
    assert found.computed_steps == (0, 2, 4, 6)
    assert found.steps_outside_fitted_range == (2,)


def test_listed_steps_are_computed_with_the_first_and_the_last():
    distances = (None, 0.03, 0.5, 0.03, 0.03)
    found = schedule(distances, None, computed_steps=[3, 2])
    assert found.computed_steps == (0, 2, 3, 4)
    assert found.reused_steps == (1,)
    assert found.rel_l1_thresh is None
    assert found.why_nothing_was_reused() is None
    for wrong in (-1, 5):
        with pytest.raises(ArgumentError, match=f"step {wrong} cannot be computed: .* 5 steps"):
            schedule(distances, None, computed_steps=[wrong])


@pytest.mark.parametrize("limits", [Limits(), Limits(2, 3), Limits(99, 99)])
def test_so_many_steps_are_spread(limits):
    """Of every number of steps every count that there can be, and no other."""
    for steps in (1, 2, 3, 7, 50):
        first = min(limits.retain_first, steps)
        least = first + min(limits.retain_last, steps - first)
        for count in range(least, steps + 1):
            found = spread_steps(steps, count, limits)
            assert len(found) == count
            assert list(found) == sorted(set(found))
            assert {0, steps - 1} <= set(found) <= set(range(steps))
            for step in range(steps):
                retained = step < limits.retain_first or step >= steps - limits.retain_last
                assert step in found or not retained
        for wrong in (least - 1, steps + 1):
            with pytest.raises(ArgumentError, match=f"{steps} steps has {least} to {steps} comp"):
                spread_steps(steps, wrong, limits)


def test_spread_steps_are_the_denser_the_earlier():
    found = spread_steps(50, 12, Limits())
    # By hand: round(47 (k / 9)^1.2) of k from 1 to 8, the first step, and the last three.
    assert found == (0, 3, 8, 13, 18, 23, 29, 35, 41, 47, 48, 49)
    # The same with 48 (k / 6)^1.2 of k from 1 to 5: of 8 only the last two.
    assert spread_steps(50, 8, Limits()) == (0, 6, 13, 21, 30, 39, 48, 49)
    for count in range(2, 51):
        gaps = np.diff(spread_steps(50, count, Limits()))
        # Rounded places: a gap may be one below an earlier one, and the last three steps are near.
        assert (np.maximum.accumulate(gaps)[:-3] - gaps[:-3]).max(initial=0) <= 1


@pytest.mark.parametrize(("most", "least"), [(1, 30), (4, 14), (6, 11), (48, 2)])
def test_spread_steps_keep_to_the_longest_reuse(most, least):
    limits = Limits(max_reuse=most)
    for count in range(2, 51):
        gap = max(np.diff(spread_steps(50, count, Limits()))) - 1
        if gap <= most:
            assert spread_steps(50, count, limits) == spread_steps(50, count, Limits())
        else:
            with pytest.raises(ArgumentError, match=f"reuses {gap} steps in a row, max_reuse"):
                spread_steps(50, count, limits)
    assert spread_steps(50, least, limits)


def test_a_count_is_a_schedule_without_a_threshold():
    distances = (None, *[0.03] * 49)
    limits = Limits(retain_last=3)
    found = schedule(distances, None, IDENTITY, limits, computed_steps=10)
    assert found.computed_steps == spread_steps(50, 10, limits)
    assert (found.rel_l1_thresh, found.reuse, found.limits) == (None, "forecast", limits)
    assert (found.distances, found.speedup) == (distances, 5.0)
    assert found.why_nothing_was_reused() is None


def test_a_video_that_is_stopped_has_done_a_part():
    whole = planned([0.03] * 6, 0.15)
    assert whole.computed_steps == (0, 2, 4, 6)
    done = whole.until(4)
    assert (done.computed_steps, done.reused_steps) == ((0, 2), (1, 3))
    assert done.distances == whole.distances[:4]
    assert whole.until(7) == whole


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_refuses_a_threshold(threshold):
    with pytest.raises(ArgumentError, match="rel_l1_thresh"):
        check_threshold(threshold)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1, 2, 3, 4, 5]", "object"),
        ('{"values": [1, 2, 3]}', "5 finite numbers"),
        ('{"values": [1, 2, 3, 4, NaN]}', "5 finite numbers"),
        ('{"values": [1, 2, 3, 4, 5], "fitted_range": [1, 0]}', "fitted_range"),
        ('{"values": [1, 2, 3, 4, 5], "range": [0, 1]}', "unknown key 'range'"),
    ],
)
def test_refuses_a_coefficients_file(text, complaint):
    with pytest.raises(ArgumentError, match=complaint):
        coefficients_of(json.loads(text))


def test_reads_a_coefficients_file():
    read = coefficients_of({"values": [0, 0, 0, 1, 0], "fitted_range": [0.1, 0.2]})
    assert read.values == (0.0, 0.0, 0.0, 1.0, 0.0)
    assert read.covers(0.15)
    assert not read.covers(0.25)
    unbounded = coefficients_of({"values": [0, 0, 0, 1, -1]})
    assert unbounded.covers(1e9)
    assert not unbounded.covers(0.5)  # p(0.5) is below 0
