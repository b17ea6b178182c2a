"""Calibration: what reuse costs, as measured on the embedded checkpoint."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from support import CPU, SIZE

from teacache.calibrate import measure
from teacache.checkpoint.pipeline import load_pipeline
from teacache.core.forward import apply_teacache
from teacache.inputs.text import Text, embed_text
from teacache.sampling import sampler

STEPS = 8


@pytest.fixture(scope="module")
def material(tiny, identity):
    """A pipeline, a start and a text."""
    pipe = load_pipeline(tiny, CPU, torch.float32)
    texts = [embed_text(pipe, prompt).embeds for prompt in ("a red wall", "")]
    return pipe, sampler.prepare(pipe, identity, SIZE, seed=7), Text(*texts)


@pytest.fixture(scope="module")
def measured(material):
    """A run, and what each step leaves."""
    pipe, start, text = material
    loop = sampler.Loop(pipe, start, text, SIZE, STEPS, 6.0)
    done = []
    with apply_teacache(pipe, 0.0) as handle:
        run = measure.full_run(handle, loop, STEPS, lambda: done.append(1))
        left = [torch.zeros_like(run.final)] + [
            measure.error_left(handle, loop, run, step, lambda: done.append(1))
            for step in range(1, STEPS - 1)
        ]
    assert len(done) == STEPS + sum(STEPS - 1 - step for step in range(1, STEPS - 1))
    left.append(left[0])
    return run, torch.stack(left).flatten(1)


def latents(material, computed):
    pipe, start, text = material
    with apply_teacache(pipe, schedule=computed):
        return sampler.denoise(pipe, start, text, SIZE, num_infer_steps=STEPS).latents


def test_the_run_and_what_is_left_are_the_samplers_own(material, measured):
    """Bit for bit, though the loop jumps to and fro."""
    run, left = measured
    full = latents(material, range(STEPS))
    assert torch.equal(run.final, full)
    for step in range(1, STEPS - 1):
        without = latents(material, set(range(STEPS)) - {step})
        assert torch.equal(left[step], (without - full).flatten()), step
        assert left[step].any()
    assert not left[0].any()
    assert not left[-1].any()


def test_the_costs_are_those_of_a_second_computation(material, measured):
    """From the block stack's own outputs, caught by hooks in a plain pipeline."""
    run, _ = measured
    pipe, start, text = material
    transformer = pipe.transformer
    before, after = [], []
    hooks = [
        transformer.embedding_dropout.register_forward_hook(
            lambda module, args, output: before.append(output[:, 226:])
        ),
        transformer.norm_final.register_forward_pre_hook(
            lambda module, args: after.append(args[0][:, -before[-1].shape[1] :])
        ),
    ]
    loop = sampler.Loop(pipe, start, text, SIZE, STEPS, 6.0)
    predictions = []
    for _ in range(STEPS):
        predictions.append(loop.predict())
        loop.advance(predictions[-1])
    for hook in hooks:
        hook.remove()
    residuals = [b - a for a, b in zip(before, after, strict=True)]

    def predict(step, earlier):
        """Step `step`, its blocks' output replaced by its input and an earlier residual."""
        video = before[step] + residuals[earlier]
        hook = transformer.norm_final.register_forward_pre_hook(
            lambda module, args: torch.cat([args[0][:, : -video.shape[1]], video], 1)
        )
        loop.state = run.states[step]
        try:
            return loop.predict()
        finally:
            hook.remove()

    for earlier, step in ((0, 1), (0, 6), (2, 3), (3, 5), (5, 6)):
        error = (predict(step, earlier) - predictions[step]).square().mean().sqrt().item()
        # In float32, of differences of numbers that are some ten times as large.
        assert run.cost[earlier, step] == pytest.approx(error, rel=1e-4)
    assert np.isinf(run.cost[np.tril_indices(STEPS)]).all()
    norms = [residual.norm(dim=-1).mean().item() for residual in residuals]
    assert run.magnitudes[:-1] == pytest.approx(norms[:-1], rel=1e-4)
    changed = [
        ((b - a).abs().mean() / a.abs().mean()).item()
        for a, b in itertools.pairwise(residuals[:-1])
    ]
    assert run.changes[1:-1] == pytest.approx(changed, rel=1e-4)
    assert np.isnan(run.changes[[0, -1]]).all()


def test_costs_of_several_videos_are_means(measured):
    run, left = measured
    one = measure.costs_of([(run, left)])
    # Reusing one step alone leaves what was measured, to the rounding of double precision.
    for step in range(1, STEPS - 1):
        computed = tuple(sorted(set(range(STEPS)) - {step}))
        rms = left[step].double().square().mean().sqrt().item()
        assert one.error(computed) == pytest.approx(rms, rel=1e-6)
    assert one.sensitivity[0] == one.sensitivity[-1] == 0
    assert np.diagonal(one.alignment)[1:-1] == pytest.approx(np.ones(STEPS - 2))
    larger = run._replace(cost=4 * run.cost)
    both = measure.costs_of([(run, left), (larger, left)])
    inside = np.isfinite(run.cost)
    assert both.cost[inside] == pytest.approx(2 * run.cost[inside])
    assert both.sensitivity == pytest.approx(one.sensitivity / 2)


def test_the_prediction_is_near_what_a_schedule_does(material, measured):
    """Of all schedules of 8 steps with 5 computed: the predicted best is in the best quarter."""
    costs = measure.costs_of([measured])
    full = latents(material, range(STEPS))
    every = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), 3)]
    predicted = [costs.error(steps) for steps in every]
    found = [(latents(material, steps) - full).square().mean().sqrt().item() for steps in every]
    # To first order: of 8 steps, each of them long, not all is that. 0.9 here; 0.95 of 50 steps.
    assert np.corrcoef(np.log(predicted), np.log(found))[0, 1] > 0.8
    assert sorted(found).index(found[int(np.argmin(predicted))]) < len(every) / 4
