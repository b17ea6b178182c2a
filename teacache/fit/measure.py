"""How far the residual moves from step to step, and the polynomial of the timestep embedding's
distance that is fitted to it.

TeaCache fits it by least squares (arXiv:2411.19108, section 3.3). Nothing guarantees that the
residual is a function of that distance; R2 says how well the fit explains it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from teacache.base.errors import SamplingError
from teacache.command.readers import DEGREE
from teacache.core.rule import Coefficients, relative_l1

if TYPE_CHECKING:
    from teacache.core.handle import TeaCacheHandle
    from teacache.sampling.sampler import Loop


@torch.no_grad()
def residual_changes(
    handle: TeaCacheHandle, loop: Loop, num_steps: int, on_step: Callable[[], None]
) -> list[float]:
    """Sample a video with every step computed, calling `on_step` after each.

    Returns:
        of each step the relative L1 distance of its residual to that of the step before; NaN for
        the first, and for the last, whose residual is not kept.
    """
    changes, before = [], None
    handle.follow([0])
    for step in range(num_steps):
        if step:
            # The handle keeps the residual of a computed step only where the next one reuses it.
            video = handle.video
            video.plan = dataclasses.replace(video.plan, computed_steps=(step,))
        loop.advance(loop.predict())
        residual = None if handle.video.residual is None else handle.video.residual.float()
        if before is None or residual is None:
            changes.append(math.nan)
        else:
            changes.append(relative_l1(residual, before).item())
        before = residual
        on_step()
    return changes


def fit(
    distances: tuple[float | None, ...], changes: list[list[float]], source: str
) -> tuple[Coefficients, float]:
    """The fitted polynomial, and its R2: the share of the changes' variance that it explains.

    Args:
        distances: of each step, see `teacache.core.rule.distances_between`.
        changes: of each video, see `residual_changes`.

    Raises:
        SamplingError: where too few of the changes are finite.
    """
    x = np.array([np.nan if distance is None else distance for distance in distances])
    pairs = [pair for own in changes for pair in zip(x, own, strict=True)]
    points = np.array([pair for pair in pairs if np.isfinite(pair).all()])
    if len(points) <= DEGREE:
        raise SamplingError("the residuals hold NaN or infinite numbers: try another --dtype")
    known, moved = points.T
    values = np.polyfit(known, moved, DEGREE)
    missed = moved - np.polyval(values, known)
    r2 = 1 - float(missed.var() / moved.var()) if moved.var() else 1.0
    span = float(known.min()), float(known.max())
    return Coefficients(tuple(values.tolist()), span, source), r2
