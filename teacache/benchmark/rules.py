"""Rules that choose a video's steps before it begins: ours, and MagCache's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from teacache.core.calibrated import best_steps, even_steps
from teacache.core.rule import Limits, schedule

if TYPE_CHECKING:
    import torch

    from teacache.calibrate.measure import Run

PUBLISHED = "published rule"

Distances = tuple[float | None, ...]
Rule = Callable[[int], tuple[int, ...] | None]


def rules_by_name(distances: Distances, runs: list[tuple[Run, torch.Tensor]]) -> dict[str, Rule]:
    """Each rule by its name: number of computed steps -> the steps, None where it has none."""
    from teacache.calibrate.measure import costs_of

    costs, steps = costs_of(runs), len(distances)
    magnitudes = np.mean([run.magnitudes for run, _ in runs], axis=0)
    rules: dict[str, Rule] = {PUBLISHED: partial(at_threshold, distances, 1)}
    for last in (2, 3, 4):
        rules[f"{PUBLISHED}, --retain_last {last}"] = partial(at_threshold, distances, last)
    for last in (1, 2, 3):
        rules[f"even, last {last}"] = partial(even_steps, steps, retain_last=last)
    rules["MagCache"] = partial(mag_cache, magnitudes, retention=0.2, most=3)
    rules["MagCache, no retention"] = partial(
        mag_cache, magnitudes, retention=0.02, most=len(distances)
    )
    rules["calibrated"] = partial(best_steps, costs)
    return rules


def at_threshold(distances: Distances, last: int, computed: int) -> tuple[int, ...] | None:
    """The published rule's schedule of so many steps, where a threshold has one."""
    for threshold in np.arange(0, 3, 0.001):
        limits = Limits(retain_last=last)
        found = schedule(distances, float(threshold), limits=limits).computed_steps
        if len(found) <= computed:
            return found if len(found) == computed else None
    return None


def mag_cache(
    magnitudes: np.ndarray, computed: int, *, retention: float, most: int
) -> tuple[int, ...] | None:
    """MagCache's rule, as diffusers 0.42.1 has it in hooks/mag_cache.py, at a threshold that gives
    so many steps; arXiv:2506.09045.

    Args:
        magnitudes: [steps], of the residuals; NaN for the last.
        retention: the share of the first steps that are computed.
        most: steps reused in a row.
    """
    ratios = np.append(1.0, magnitudes[1:] / magnitudes[:-1])

    def at(threshold: float) -> tuple[int, ...]:
        steps, ratio, error, reused = [], 1.0, 0.0, 0
        for step in range(len(magnitudes)):
            if step >= int(retention * len(magnitudes) + 0.5):
                ratio *= ratios[step]
                error += abs(1 - ratio)
                reused += 1
                if error <= threshold and reused <= most and step < len(magnitudes) - 1:
                    continue
            steps.append(step)
            ratio, error, reused = 1.0, 0.0, 0
        return tuple(steps)

    for threshold in np.geomspace(1e-4, 10, 2000):
        found = at(threshold)
        if len(found) <= computed:
            return found if len(found) == computed else None
    return None
