"""The benchmark of schedules, on few steps."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.hooks.sea_cache import _apply_sea_filter

from teacache.benchmark import adaptive, schedules
from teacache.checkpoint.pipeline import load_pipeline
from teacache.inputs.identity import load_face_models

STEPS = 8


@pytest.fixture(scope="module")
def video(tiny):
    """A pipeline, and a video to sample with it."""
    device, dtype = torch.device("cpu"), torch.float32
    pipe = load_pipeline(tiny, device, dtype)
    [case] = schedules._held_out(pipe, load_face_models(tiny, device, dtype), 1)
    return pipe, case


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(schedules, "STEPS", STEPS)


@pytest.mark.parametrize("scheduler", schedules.SCHEDULERS)
def test_every_rule_is_measured(capsys, tiny, monkeypatch, short, scheduler):
    monkeypatch.setattr(adaptive, "HALVINGS", 4)
    monkeypatch.setattr(schedules, "COMPUTED", (6, 4))
    schedules.compare(scheduler, videos=1, calibrated_on=1)
    output = capsys.readouterr().out
    for computed in (6, 4):
        steps = re.search(rf"calibrated, {computed}: ([\d ]+)", output)[1].split()
        assert len(steps) == computed
        assert (steps[0], steps[-1]) == ("0", "7")
    table = output[output.index(scheduler) :]
    for name in ("even, last 2", "calibrated", "SeaCache", "DBCache"):
        line = next(line for line in table.splitlines() if line.strip().startswith(name))
        means = [float(value) for value in re.findall(r"(\d+\.\d), \d+\.\d", line)]
        assert len(means) == 2
        assert 10 < means[1] <= means[0] < 80, "more steps, nearer"


def test_the_table_says_how_sure_a_difference_is():
    figure = schedules.Figure
    found = {
        ("published rule", 22): [figure(40.0, 22), figure(44.0, 22)],
        ("SeaCache", 22): [figure(41.0, 22), figure(47.0, 21)],
        ("published rule", 30): [figure(50.0, 30), figure(52.0, 30)],
        ("SeaCache", 30): [figure(50.0, 30)],  # the second video has none of 30 steps
    }
    found |= {("published rule", computed): [figure(1.0, computed)] * 2 for computed in (16, 12)}
    heads, published, sea = schedules.table(found).splitlines()
    assert heads.split() == ["30", "22", "16", "12"]
    assert published.split("  ")[0] == "published rule"
    # The differences are 1 and 3: 2 on average, with a deviation of sqrt(2) over sqrt(2).
    assert "44.0, 41.0 +2.0 +- 1.0 (21.5)" in sea
    assert sea.split().count("-") == 3


@pytest.mark.parametrize("alpha_cumprod", [0.999, 0.5, 0.001, 0.0])
def test_what_sea_cache_compares_is_what_its_hook_would(alpha_cumprod):
    latents = torch.randn(1, 5, 16, 12, 14, generator=torch.Generator().manual_seed(0))
    signal, noise = alpha_cumprod**0.5, (1 - alpha_cumprod) ** 0.5
    hooks = _apply_sea_filter(latents[0].movedim(1, -1), noise / (signal + noise), power_exp=3.0)
    torch.testing.assert_close(adaptive._signal(latents, alpha_cumprod), hooks)


@pytest.mark.parametrize("order", [0, 1])
def test_sea_cache_that_reuses_nothing_changes_nothing(short, video, order):
    pipe, case = video
    sampled = adaptive.sea_cache(pipe, schedules._loop(pipe, case), 0.0, order=order)
    assert sampled.computed_steps == tuple(range(STEPS))
    assert torch.equal(sampled.latents, schedules._denoised(pipe, case))


def test_sea_cache_without_extrapolation_is_a_schedule(short, video):
    pipe, case = video
    sampled = adaptive.sea_cache(pipe, schedules._loop(pipe, case), 3.0, order=0)
    assert sampled.computed_steps == (0, 3, 6, 7), "no more than two in a row are reused"
    assert torch.equal(sampled.latents, schedules._latents(pipe, case, sampled.computed_steps))
    extrapolated = adaptive.sea_cache(pipe, schedules._loop(pipe, case), 3.0, order=1)
    assert extrapolated.computed_steps == (0, 3, 6, 7)
    assert not torch.equal(sampled.latents, extrapolated.latents)
    ours = schedules._latents(pipe, case, extrapolated.computed_steps, extrapolate=True)
    assert torch.equal(ours, extrapolated.latents), "here and there, computed by itself"


def test_db_cache_drops_identity_layers_and_leaves_the_model_as_it_was(short, video):
    pipe, case = video
    calls = []
    layers = pipe.transformer.perceiver_cross_attention
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, layer in enumerate(layers)
    ]

    def latents():
        calls.clear()
        return schedules._denoised(pipe, case)

    plain = latents()
    assert set(calls) == set(range(len(layers)))
    sampled = adaptive.db_cache(pipe.transformer, latents, STEPS, 0.0)
    assert set(calls) == {0}, "the blocks are run as one, with one layer before them"
    assert sampled.computed_steps == tuple(range(STEPS))
    assert not torch.equal(sampled.latents, plain)
    assert torch.equal(latents(), plain)
    for hook in hooks:
        hook.remove()


def test_a_threshold_is_searched_for():
    def sample(threshold):
        return adaptive.Sampled(torch.tensor(threshold), tuple(range(round(10 / threshold))))

    assert len(adaptive.with_computed(sample, 22).computed_steps) == 22
    assert adaptive.with_computed(sample, 2) is None, "3.3 at the largest threshold"
