"""How far residuals move, as `teacache.fit` measures it, and the polynomial that is fitted."""

import itertools

import numpy as np
import pytest
import torch
from support import SIZE

from teacache.base.errors import SamplingError
from teacache.core.forward import apply_teacache
from teacache.fit.residuals import fit, residual_changes
from teacache.inputs.text import Text, embed_text
from teacache.sampling import sampler

STEPS = 6


def test_the_changes_are_those_of_a_second_computation(pipe, identity):
    """From the block stack's own outputs, caught by hooks in a plain pipeline.

    Of two videos in a row on one handle: each one's latents are the plain pipeline's, bit for bit.
    """
    texts = [embed_text(pipe, prompt).embeds for prompt in ("a red wall", "")]
    start, text = sampler.prepare(pipe, identity, SIZE, seed=7), Text(*texts)
    measured = []
    with apply_teacache(pipe, 0.0):
        for _ in range(2):
            loop, done = sampler.Loop(pipe, start, text, SIZE, STEPS, 6.0), []
            changes = residual_changes(
                pipe.transformer, loop, STEPS, lambda done=done: done.append(1)
            )
            assert len(done) == STEPS
            measured.append((changes, loop.latents))

    before, after = [], []
    pipe.transformer.embedding_dropout.register_forward_hook(
        lambda module, args, output: before.append(output[:, 226:])
    )
    pipe.transformer.norm_final.register_forward_pre_hook(
        lambda module, args: after.append(args[0][:, -before[-1].shape[1] :])
    )
    plain = sampler.denoise(pipe, start, text, SIZE, num_infer_steps=STEPS).latents
    residuals = [b - a for a, b in zip(before, after, strict=True)]
    assert len(residuals) == STEPS
    changed = [
        ((b - a).abs().mean() / a.abs().mean()).item() for a, b in itertools.pairwise(residuals)
    ]
    for changes, latents in measured:
        assert torch.equal(latents, plain)
        # In float32, of differences of numbers that are some ten times as large.
        assert changes[1:] == pytest.approx(changed, rel=1e-4)
        assert np.isnan(changes[0])


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
