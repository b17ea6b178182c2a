"""The figure of a calibration: what reuse costs, how much of it is left, and the fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from teacache.calibrate.fit import Fit
from teacache.core.calibrated import Costs

WIDE, HIGH, DPI = 12.0, 3.6, 100  # inches


def draw(costs: Costs, fit: Fit, path: Path) -> None:
    """Draw it as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE, HIGH), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    matrix, sensitivity, fitted = figure.subplots(1, 3)

    shown = np.where(np.isfinite(costs.cost), costs.cost, np.nan)
    image = matrix.imshow(shown, norm=LogNorm(), cmap="viridis")
    matrix.set(title="cost of reuse", xlabel="at step", ylabel="the residual of step")
    figure.colorbar(image, ax=matrix, shrink=0.8)

    inner = np.arange(1, costs.num_steps - 1)
    sensitivity.semilogy(inner, costs.sensitivity[inner], marker=".")
    sensitivity.set(title="sensitivity of the result", xlabel="step")
    sensitivity.grid(alpha=0.3)

    fitted.plot(*fit.points.T, ".", alpha=0.4)
    x = np.linspace(*fit.coefficients.fitted_range, 200)
    fitted.plot(x, np.polyval(fit.coefficients.values, x))
    fitted.set(
        title=f"coefficients: R2 {fit.r2:.2f}",
        xlabel="the timestep embedding's distance",
        ylabel="the residual's",
    )
    fitted.grid(alpha=0.3)
    figure.savefig(path)
