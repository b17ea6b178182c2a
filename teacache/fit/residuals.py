"""The polynomial that estimates from the timestep embedding how far the residual moves.

TeaCache fits it by least squares (arXiv:2411.19108, section 3.3). Nothing guarantees that the
residual depends only on the timestep embedding; R2 measures how well the fit explains it.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import ConsisIDTransformer3DModel

from teacache.base.errors import SamplingError
from teacache.core.rule import Coefficients, relative_l1
from teacache.request.readers import DEGREE
from teacache.sampling.sampler import Loop


@torch.no_grad()
def residual_changes(
    transformer: ConsisIDTransformer3DModel,
    loop: Loop,
    num_steps: int,
    on_step: Callable[[], None],
) -> list[float]:
    """Sample a video, and measure how far the residual moves at each step.

    Args:
        transformer: the loop's, with TeaCache at threshold 0.

    Returns:
        for each step the relative L1 distance of its residual to the one before; NaN for the first.
    """
    tokens: dict[str, torch.Tensor] = {}  # [batch, video tokens, inner dim]
    hooks = [
        transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda block, args, kwargs: tokens.update(before=kwargs["hidden_states"]),
            with_kwargs=True,
        ),
        transformer.norm_final.register_forward_pre_hook(
            lambda norm, args: tokens.update(after=args[0])
        ),
    ]
    changes, previous = [], None
    try:
        for _ in range(num_steps):
            loop.advance(loop.predict())
            residual = (tokens["after"] - tokens["before"]).float()
            change = math.nan if previous is None else relative_l1(residual, previous).item()
            changes.append(change)
            previous = residual
            on_step()
    finally:
        for hook in hooks:
            hook.remove()
    return changes


def fit(
    distances: tuple[float | None, ...], changes: list[list[float]], source: str
) -> tuple[Coefficients, float]:
    """The polynomial, and its R2: the share of the variance of the changes that it explains.

    distances: of each step. changes: of each video, see `residual_changes`.

    Raises:
        SamplingError: where too few of the changes are finite.
    """
    x = np.array([np.nan if distance is None else distance for distance in distances])
    points = np.array([point for video in changes for point in zip(x, video, strict=True)])
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) <= DEGREE:
        raise SamplingError("the residuals hold NaN or infinite numbers: try another --dtype")
    x, y = points.T
    values = np.polyfit(x, y, DEGREE)
    errors = y - np.polyval(values, x)
    r2 = 1 - float(errors.var() / y.var()) if y.var() else 1.0
    return Coefficients(tuple(values.tolist()), (float(x.min()), float(x.max())), source), r2
