"""What reuse costs, measured on videos that are sampled with every step computed.

Of each video one run keeps where the loop was at each step, and tries the residuals of earlier
steps there: how far the prediction moves is their cost. Then, for each step, the loop goes on from
there with the prediction that the step before's residual gives, everything after it computed: what
is left of that at the end tells the step's sensitivity, and beside another step's their alignment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from teacache.core.calibrated import Costs
from teacache.sampling.sampler import Loop, State

if TYPE_CHECKING:
    from teacache.core.handle import TeaCacheHandle

# How many steps back residuals are tried. Each is 216 MB at full size in bfloat16, in host memory.
REACH = 16


class Run(NamedTuple):
    """A video with every step computed, and what reuse would have cost at each of them.

    Attributes:
        states: of each step, where the loop was.
        tried: of each step, what is predicted with the residual of the step before; None for the
            first and the last.
        final: the latents at the end.
        cost: [steps, steps], see `Costs`.
        magnitudes: [steps], the mean norm of a token's residual; NaN for the last.
        changes: [steps], the relative L1 distance of the residual to that of the step before; NaN
            for the first and the last.
    """

    states: list[State]
    tried: list[torch.Tensor | None]
    final: torch.Tensor
    cost: np.ndarray
    magnitudes: np.ndarray
    changes: np.ndarray


@torch.no_grad()
def full_run(
    handle: TeaCacheHandle, loop: Loop, num_steps: int, on_step: Callable[[], None]
) -> Run:
    """Sample a video with every step computed, and try at each the residuals of those before.

    Args:
        handle: on the loop's transformer.
        on_step: called after each step.
    """
    states, tried = [], []
    cost = np.full((num_steps, num_steps), np.inf)
    magnitudes, changes = np.full((2, num_steps), np.nan)
    residuals: dict[int, torch.Tensor] = {}
    handle.follow([0])
    for step in range(num_steps):
        states.append(loop.state)
        predicted = predict_computed(handle, loop)
        kept = handle.video.residual  # none at the last step, which nothing follows
        reusing = None
        for earlier, residual in residuals.items() if kept is not None else ():
            reusing = predict_reusing(handle, loop, residual.to(predicted.device))
            cost[earlier, step] = _rms(reusing - predicted)
        tried.append(reusing)  # the last is of the step before
        if kept is not None:
            magnitudes[step] = kept.float().norm(dim=-1).mean().item()
            if step:
                before = residuals[step - 1].to(kept.device).float()
                changes[step] = ((kept - before).abs().mean() / before.abs().mean()).item()
            residuals[step] = kept.cpu()
            residuals.pop(step - REACH, None)
        loop.advance(predicted)
        on_step()
    return Run(states, tried, loop.latents, cost, magnitudes, changes)


@torch.no_grad()
def error_left(
    handle: TeaCacheHandle, loop: Loop, run: Run, step: int, on_step: Callable[[], None]
) -> torch.Tensor:
    """What is left in the latents at the end of reusing at one step alone, in float32, on the host.

    Args:
        step: neither the first nor the last.
    """
    predicted = run.tried[step]
    assert predicted is not None
    loop.state = run.states[step]
    loop.advance(predicted)
    while loop.step < len(run.states):
        loop.advance(predict_computed(handle, loop))
        on_step()
    return (loop.latents.float() - run.final.float()).cpu()


def costs_of(runs: list[tuple[Run, torch.Tensor]]) -> Costs:
    """What several videos say together: geometric means, and the mean of cosines.

    Args:
        runs: of each video also [steps, numbers of the latents], what each step leaves; 0 for the
            first and the last.
    """
    costs, sensitivities, alignments = [], [], []
    for run, left in runs:
        rms = left.square().mean(1).sqrt().double()
        unit = (left / left.norm(dim=1, keepdim=True).clamp(min=1e-30)).double()
        own = np.diagonal(run.cost, 1)  # of the step before, at each from the second on
        with np.errstate(divide="ignore", invalid="ignore"):
            sensitivities.append(np.append(0.0, rms[1:].numpy() / own))
        costs.append(run.cost)
        alignments.append((unit @ unit.T).numpy())
    with np.errstate(divide="ignore"):
        cost, sensitivity = (
            np.exp(np.mean(np.log(values), axis=0)) for values in (costs, sensitivities)
        )
    return Costs(cost, sensitivity, np.mean(alignments, axis=0))


def predict_computed(handle: TeaCacheHandle, loop: Loop) -> torch.Tensor:
    """What the loop's step predicts; its residual is then the handle's, unless it is the last."""
    _be_at(handle, loop.step, computed=(loop.step,))
    return loop.predict()


def predict_reusing(handle: TeaCacheHandle, loop: Loop, residual: torch.Tensor) -> torch.Tensor:
    """What the loop's step predicts with another's residual, [batch, video tokens, inner dim]."""
    _be_at(handle, loop.step, computed=())
    handle.video.residual = residual
    return loop.predict()


def _be_at(handle: TeaCacheHandle, step: int, computed: tuple[int, ...]) -> None:
    if handle.schedule is None:  # the first step begins a video by itself
        return
    video = handle.video
    video.step = step
    video.plan = dataclasses.replace(video.plan, computed_steps=computed)


def _rms(difference: torch.Tensor) -> float:
    return difference.square().mean().sqrt().item()
