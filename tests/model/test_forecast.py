"""The forecast on the embedded checkpoint, through the pipeline."""

import math

import pytest
import torch
from support import Stop, stop_after

from teacache.base.errors import ArgumentError
from teacache.checkpoint.distances import load_scheduler
from teacache.core.forward import apply_teacache
from teacache.core.rule import Limits, spread_steps

STEPS, COUNT = 12, 5
COMPUTED = spread_steps(STEPS, COUNT, Limits())


def psnr(latents, reference) -> float:
    error = (latents - reference).square().mean().item()
    return 10 * math.log10((reference.max() - reference.min()).item() ** 2 / error)


@pytest.fixture
def make(tiny, make_pipe):
    """A pipeline with a scheduler by its name."""

    def make(scheduler=None, dtype=torch.float32):
        pipe = make_pipe(dtype)
        pipe.scheduler = load_scheduler(tiny, scheduler)
        return pipe

    return make


@pytest.fixture
def latents(sample):
    """Of one frame, 12 steps: what differs here does so in any number of frames."""
    return lambda pipe, **changed: sample(pipe, **{"steps": STEPS, "num_frames": 1, **changed})


@pytest.mark.parametrize(("scheduler", "dtype"), [("dpm", torch.float32), ("ddim", torch.bfloat16)])
def test_every_step_computed_equals_the_plain_pipeline(make, latents, scheduler, dtype):
    pipe = make(scheduler, dtype)
    plain = latents(pipe, steps=5)
    with apply_teacache(pipe, computed_steps=5) as handle:
        assert torch.equal(latents(pipe, steps=5), plain)
    assert handle.schedule.computed_steps == tuple(range(5))
    with apply_teacache(pipe, 0.0, reuse="forecast"):
        assert torch.equal(latents(pipe, steps=5), plain)


@pytest.mark.parametrize(("scheduler", "count"), [("dpm", 16), ("ddim", 12)])
def test_nearer_to_every_step_computed_than_more_published_steps(make, latents, scheduler, count):
    """Than the residual's 23 steps of 50, with fewer.

    With the scheduler that draws noise 12 of 50 are no better than those 23.
    """
    pipe = make(scheduler)
    every = latents(pipe, steps=50)
    found = []
    for asked in ({"computed_steps": count}, {"rel_l1_thresh": 0.15}):
        with apply_teacache(pipe, **asked) as handle:
            found.append(psnr(latents(pipe, steps=50), every))
            assert len(handle.schedule.computed_steps) == asked.get("computed_steps", 23)
    assert found[0] > found[1] + 1


@pytest.mark.parametrize(
    ("scheduler", "guidance_scale", "dtype"),
    [("dpm", 1.0, torch.float32), ("ddim", 6.0, torch.bfloat16)],
)
def test_nearer_than_the_residual_with_the_same_steps(
    make, latents, scheduler, guidance_scale, dtype
):
    pipe = make(scheduler, dtype)
    every = latents(pipe, guidance_scale=guidance_scale).float()
    found = {}
    for reuse in ("forecast", "residual"):
        with apply_teacache(pipe, computed_steps=COUNT, reuse=reuse) as handle:
            ours = latents(pipe, guidance_scale=guidance_scale)
            assert ours.dtype == dtype
            assert handle.schedule.computed_steps == COMPUTED
            assert handle.schedule.reuse == reuse
        found[reuse] = psnr(ours.float(), every)
    assert found["forecast"] > found["residual"]


def test_nothing_is_carried_over(tiny, make, latents):
    """Into a video with the same or another scheduler, also after one that was stopped."""
    expected = {}
    for name in ("dpm", "ddim"):
        pipe = make(name)
        with apply_teacache(pipe, computed_steps=COUNT):
            expected[name] = latents(pipe)
    assert not torch.equal(expected["dpm"], expected["ddim"])
    with apply_teacache(pipe, computed_steps=COUNT) as handle:
        for name in ("ddim", "dpm", "dpm", "ddim"):
            pipe.scheduler = load_scheduler(tiny, name)
            assert torch.equal(latents(pipe), expected[name])
            with pytest.raises(Stop):
                latents(pipe, seed=7, callback_on_step_end=stop_after(6))
            assert handle.video.forecast is not None
        assert torch.equal(latents(pipe), expected["ddim"])
        assert handle.schedule.computed_steps == COMPUTED
        assert handle.video.forecast is None, "leaves no memory behind"


def test_the_steps_may_come_from_anywhere(make, latents):
    """A count, a list, a threshold or a plan: the same steps are the same video."""
    pipe = make()
    with apply_teacache(pipe, computed_steps=COUNT) as handle:
        expected, plan = latents(pipe), handle.schedule
    for given in (plan, COMPUTED):
        with apply_teacache(pipe, schedule=given, reuse="forecast"):
            assert torch.equal(latents(pipe), expected)
    with apply_teacache(pipe, 0.2, reuse="forecast") as handle:
        by_threshold, plan = latents(pipe), handle.schedule
    assert plan.reused_steps
    assert (plan.rel_l1_thresh, plan.reuse) == (0.2, "forecast")
    with apply_teacache(pipe, schedule=plan.computed_steps, reuse="forecast"):
        assert torch.equal(latents(pipe), by_threshold)
    with apply_teacache(pipe, 0.2):
        assert not torch.equal(latents(pipe), by_threshold)


def test_a_reused_step_calls_no_layer(make, latents):
    pipe = make()
    called = {}
    for name, module in pipe.transformer.named_modules():
        if name:
            module.register_forward_hook(
                lambda *_, name=name: called.update({name: called.get(name, 0) + 1})
            )
    with apply_teacache(pipe, computed_steps=COUNT):
        latents(pipe)
    # The plan embeds every timestep; each computed step embeds its own again.
    assert called["time_embedding"] == STEPS + COUNT
    for name in ("transformer_blocks.0", "patch_embed", "patch_embed.proj", "norm_out", "proj_out"):
        assert called[name] == COUNT
    assert called["local_facial_extractor"] == 1


def test_refusals(make, latents):
    pipe = make()
    with pytest.raises(ArgumentError, match="residual, forecast: found 'nonsense'"):
        apply_teacache(pipe, reuse="nonsense")
    with pytest.raises(ArgumentError, match="give one"):
        apply_teacache(pipe, computed_steps=5, schedule=[1])
    with apply_teacache(pipe, computed_steps=COUNT):
        with pytest.raises(ArgumentError, match="of 4 steps has 2 to 4 computed ones"):
            latents(pipe, steps=4)
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, prediction_type="epsilon"
        )
        with pytest.raises(ArgumentError, match="found epsilon"):
            latents(pipe)
