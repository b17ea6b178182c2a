"""The polynomial that is fitted to how far residuals move."""

from __future__ import annotations

import numpy as np
import pytest

from teacache.base.errors import SamplingError
from teacache.fit.residuals import fit


def test_every_video_counts():
    """Of two videos the polynomial goes through the middle."""
    distances = (None, *np.linspace(0.02, 0.2, 12).tolist())
    inner = np.array(distances[1:])
    changes = [[np.nan, *(inner + shift).tolist()] for shift in (-0.01, 0.01)]
    coefficients, r2 = fit(distances, changes, "here")
    assert np.polyval(coefficients.values, inner) == pytest.approx(inner)
    assert r2 == pytest.approx(1 - 0.01**2 / (inner.var() + 0.01**2))
    assert coefficients.fitted_range == pytest.approx((0.02, 0.2))
    assert coefficients.source == "here"


def test_what_does_not_depend_on_the_distance_is_not_explained():
    rng = np.random.default_rng(0)
    distances = (None, *rng.uniform(0.02, 0.2, 400).tolist())
    _, r2 = fit(distances, [[np.nan, *rng.normal(size=400).tolist()]], "noise")
    # Four powers of it explain about 4 / 400 of noise.
    assert 0 <= r2 < 0.05


def test_residuals_that_are_not_finite():
    with pytest.raises(SamplingError, match="the residuals hold NaN"):
        fit((None, *[0.1] * 12), [[np.nan] * 13], "nothing")
