"""The polynomial that a calibration fits."""

from __future__ import annotations

import numpy as np
import pytest

from teacache.calibrate.fit import fit


def test_a_polynomial_is_found_again():
    distances = (None, *np.linspace(0.02, 0.2, 12).tolist())
    values = (50.0, -20.0, 3.0, 0.5, 0.01)
    changes = np.append(np.nan, np.polyval(values, np.array(distances[1:])))
    changes[-1] = np.nan  # of the last step nothing is known
    found = fit(distances, [changes, changes], "here")
    assert found.coefficients.values == pytest.approx(values, rel=1e-6)
    assert found.coefficients.fitted_range == (0.02, distances[-2])
    assert found.coefficients.source == "here"
    assert found.r2 == pytest.approx(1.0)
    assert found.points.shape == (22, 2)


def test_what_does_not_depend_on_the_distance_is_not_explained():
    rng = np.random.default_rng(0)
    distances = (None, *rng.uniform(0.02, 0.2, 400).tolist())
    found = fit(distances, [np.append(np.nan, rng.normal(size=400))], "noise")
    # Four powers of it explain about 4 / 400 of noise.
    assert 0 <= found.r2 < 0.05
