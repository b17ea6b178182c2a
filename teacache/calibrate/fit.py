"""The rescaling polynomial, fitted on a model: how far a residual moves, by how far the timestep
embedding does.

As TeaCache fits it (arXiv:2411.19108, section 3.3), in the least squares sense; there is no reason
that it should fit, and `r2` says whether it does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from teacache.core.rule import Coefficients

DEGREE = 4
LEAST_STEPS = DEGREE + 4  # of a video, the first and the last of which say nothing
POOR = 0.5  # an r2 below this is warned of


class Fit(NamedTuple):
    """r2: the share of the changes' variance that the polynomial explains; points: [n, 2]."""

    coefficients: Coefficients
    r2: float
    points: np.ndarray


def fit(distances: tuple[float | None, ...], changes: list[np.ndarray], source: str) -> Fit:
    """Fit a polynomial of degree 4.

    Args:
        distances: of each step, see `teacache.core.rule.distances_between`.
        changes: of each video [steps], the relative L1 distance of each residual to the one before,
            NaN where there is none.
    """
    x = np.array([np.nan if distance is None else distance for distance in distances])
    points = np.array(
        [pair for own in changes for pair in zip(x, own, strict=True) if np.isfinite(pair).all()]
    )
    known, moved = points.T
    values = np.polyfit(known, moved, DEGREE)
    missed = moved - np.polyval(values, known)
    r2 = 1 - float(missed.var() / moved.var()) if moved.var() else 1.0
    span = float(known.min()), float(known.max())
    return Fit(Coefficients(tuple(values.tolist()), span, source), r2, points)
