"""`teacache.fit`: how far residuals move, the polynomial for that, and a sampler that takes it."""

import datetime
import itertools
import json

import numpy as np
import pytest
import torch
from support import SIZE, handlers_given_back, main

from teacache.base.errors import SamplingError
from teacache.core.forward import apply_teacache
from teacache.fit.__main__ import POOR
from teacache.fit.__main__ import main as fit_command
from teacache.fit.residuals import fit, residual_changes
from teacache.inputs.text import Text, embed_text
from teacache.sampling import sampler

STEPS = 8
SMALL = ("--ckpts_path", "tiny", "--num_infer_steps", str(STEPS), "--num_frames", "1")


def fitted(*arguments: object) -> int:
    with handlers_given_back():
        return fit_command([str(argument) for argument in (*SMALL, *arguments)])


def test_a_fit_on_two_videos_then_a_plan_and_a_video_with_it(capsys, tmp_path):
    path = tmp_path / "fit" / "own.json"
    assert fitted("--seed", 1, 2, "--output", path) == 0
    output, error = capsys.readouterr()
    data = json.loads(path.read_text())
    assert output.splitlines()[-1] == f"coefficients {path}, R2 {data['r2']:.2f}"
    assert POOR < data["r2"] < 1
    assert "R2 is" not in error
    assert len(data["values"]) == 5
    low, high = data["fitted_range"]
    assert 0 < low < high
    assert data["source"] == "fitted on tiny at 8 steps"
    assert (data["videos"], data["checkpoint"], data["num_infer_steps"]) == (2, "tiny", STEPS)
    assert data["scheduler"] == "CogVideoXDPMScheduler"
    assert data["versions"].keys() == {"teacache", "torch", "diffusers", "transformers"}
    assert datetime.date.fromisoformat(data["date"])
    assert list(path.parent.iterdir()) == [path]

    code, output, _ = main(capsys, *SMALL, "--coefficients", path, "--plan")
    assert code == 0
    assert output.count(" of 8") == 4
    out = tmp_path / "out"
    code, _, _ = main(capsys, *SMALL, "--coefficients", path, "--output_path", out)
    assert code == 0
    record = json.loads((out / "42_0.1_0000.json").read_text())
    assert record["coefficients"] == {key: data[key] for key in record["coefficients"]}
    assert record["checkpoint_sha256"] == data["checkpoint_sha256"]


def test_a_poor_fit_is_warned_of(capsys, tmp_path, monkeypatch):
    """Where no R2 is good enough."""
    monkeypatch.setattr("teacache.fit.__main__.POOR", 2.0)
    assert fitted("--output", tmp_path / "own.json") == 0
    assert "says little about this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--num_infer_steps", 7), "a fit needs one number, 8 or more: found 7"),
        (("--jobs", "JOBS"), "a fit needs one number, 8 or more: found 8, 9"),
        (("--output", "a.txt"), ".json"),
    ],
)
def test_refused_before_loading(capsys, tmp_path, arguments, complaint):
    (tmp_path / "jobs.jsonl").write_text('{"num_infer_steps": 8}\n{"num_infer_steps": 9}\n')
    words = [tmp_path / "jobs.jsonl" if word == "JOBS" else word for word in arguments]
    try:
        code = fitted("--output", tmp_path / "own.json", *words)
    except SystemExit as end:
        code = end.code
    output, error = capsys.readouterr()
    assert (code, error.count("\n")) == (2, 1)
    assert complaint in error
    assert "loading" not in output
    assert not (tmp_path / "own.json").exists()


def test_the_changes_are_those_of_a_second_computation(pipe, identity):
    """From the block stack's own outputs, caught by hooks in a plain pipeline.

    Of two videos in a row on one handle: each one's latents are the plain pipeline's, bit for bit.
    """
    texts = [embed_text(pipe, prompt).embeds for prompt in ("a red wall", "")]
    size = SIZE._replace(num_frames=5)
    start, text = sampler.prepare(pipe, identity, size, seed=7), Text(*texts)
    measured = []
    with apply_teacache(pipe, 0.0):
        for _ in range(2):
            loop, done = sampler.Loop(pipe, start, text, size, STEPS, 6.0), []
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
    plain = sampler.denoise(pipe, start, text, size, num_infer_steps=STEPS).latents
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
