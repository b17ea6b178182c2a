"""One handle and whoever calls its transformer: threads, other pipelines, copies, offload hooks."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, ConsisIDPipeline

from teacache.base.errors import ArgumentError
from teacache.core.forward import apply_teacache

STEPS, LISTED = 6, [0, 2, 3, 5]


class Stop(Exception):
    """Ends a video in the middle."""


def stop(pipe, index, timestep, kwargs):
    if index == 2:
        raise Stop
    return {}


def second_pipeline(pipe, kind=CogVideoXDPMScheduler):
    """A pipeline of the same models with a scheduler of its own."""
    scheduler = kind.from_config(pipe.scheduler.config)
    return ConsisIDPipeline(**{**pipe.components, "scheduler": scheduler})


def test_a_second_thread_is_refused_or_samples_its_own_video(pipe, sample):
    """Whatever the threads' turns: what comes out is right, or an error that says why none does."""
    with apply_teacache(pipe, schedule=LISTED):
        expected = {seed: sample(pipe, STEPS, seed) for seed in range(2)}
        found, start = {}, threading.Barrier(2)

        def run(seed):
            start.wait()
            try:
                found[seed] = sample(pipe, STEPS, seed)
            except ArgumentError as error:
                found[seed] = error

        for _ in range(3):
            threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            errors = [each for each in found.values() if isinstance(each, ArgumentError)]
            assert all("one video at a time" in str(error) for error in errors)
            right = [seed for seed in found if not isinstance(found[seed], ArgumentError)]
            assert all(torch.equal(found[seed], expected[seed]) for seed in right)
        assert torch.equal(sample(pipe, STEPS, 1), expected[1]), "the handle is clean again"


def test_a_second_thread_between_two_steps(pipe, sample):
    """The first one's video is lost, in words; the second one's is right."""
    within = []

    def sample_in_another_thread(pipe, index, timestep, kwargs):
        if index == 2 and not within:
            thread = threading.Thread(target=lambda: within.append(sample(pipe, STEPS, 1)))
            thread.start()
            thread.join()
        return {}

    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe, STEPS, 1)
        with pytest.raises(ArgumentError, match="one video at a time"):
            sample(pipe, STEPS, 0, callback_on_step_end=sample_in_another_thread)
        assert torch.equal(within[0], expected)


def test_a_second_thread_within_a_step(pipe, sample):
    refused = []

    def call_again(module, inputs):
        def call():
            try:
                sample(pipe, STEPS, 1)
            except ArgumentError as error:
                refused.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        hook.remove()

    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe, STEPS, 0)
        hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(call_again)
        with pytest.raises(ArgumentError, match="one video at a time"):
            # The second thread has set the scheduler's timesteps: this video goes no further.
            sample(pipe, STEPS, 0)
        assert len(refused) == 1
        assert torch.equal(sample(pipe, STEPS, 0), expected)


@pytest.mark.parametrize(
    ("kind", "steps"), [(CogVideoXDPMScheduler, 9), (CogVideoXDDIMScheduler, 4)]
)
def test_another_pipeline_with_a_scheduler_of_its_own(pipe, sample, kind, steps):
    other = second_pipeline(pipe, kind)
    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe, STEPS)
        with pytest.raises(ArgumentError, match="by the scheduler of the pipeline"):
            sample(other, steps)
        assert torch.equal(sample(pipe, STEPS), expected)


def test_another_pipeline_after_an_interruption(pipe, sample):
    """It takes no residual of the stopped video: its first step is that of a new one."""
    other = second_pipeline(pipe)
    with apply_teacache(other, schedule=LISTED):
        expected = sample(other, STEPS, 1)
    with apply_teacache(pipe, schedule=LISTED):
        with pytest.raises(Stop):
            sample(pipe, STEPS, 0, callback_on_step_end=stop)
        assert torch.equal(sample(other, STEPS, 1), expected)


def test_a_loop_of_ones_own(pipe, sample, identity):
    """Timesteps that are no views of the scheduler's count by their values."""
    plain = pipe.transformer.forward

    def copied(*args, timestep, **kwargs):
        return patched(*args, timestep=timestep.clone(), **kwargs)

    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe, STEPS)
        patched, pipe.transformer.forward = pipe.transformer.forward, copied
        assert torch.equal(sample(pipe, STEPS), expected)
        pipe.transformer.forward = patched
    assert pipe.transformer.forward == plain


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_refused_in_words(pipe, duplicate):
    with apply_teacache(pipe), pytest.raises(ArgumentError, match="apply TeaCache to the copy"):
        duplicate(pipe.transformer)
    duplicate(pipe.transformer)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "kind",
    [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}],
)
def test_group_offload_in_any_order(make_pipe, sample, when, kind):
    """Of diffusers, whose hooks keep the forward elsewhere than accelerate's."""
    plain, pipe = make_pipe(), make_pipe()
    cpu = torch.device("cpu")

    def offload(transformer):
        transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, **kind)

    with apply_teacache(plain, schedule=LISTED):
        expected = sample(plain, STEPS)
    if when == "before":
        offload(pipe.transformer)
    with apply_teacache(pipe, schedule=LISTED) as handle:
        if when == "after":
            offload(pipe.transformer)
        assert torch.equal(sample(pipe, STEPS), expected)
        assert handle.schedule.computed_steps == tuple(LISTED)
        with pytest.raises(ArgumentError, match="already"):
            apply_teacache(pipe)
    assert torch.equal(sample(pipe, STEPS), sample(plain, STEPS)), "undone below the hooks"


def test_a_transformer_compiled_as_a_whole_is_refused(make_pipe):
    wrapped, in_place = make_pipe(), make_pipe()
    wrapped.transformer = torch.compile(wrapped.transformer, backend="eager")
    in_place.transformer.compile(backend="eager")
    for pipe in (wrapped, in_place):
        with pytest.raises(ArgumentError, match=r"compiled as a whole.*block\.compile"):
            apply_teacache(pipe)
