"""One handle and whoever calls its transformer: threads, other pipelines, copies."""

import copy
import io
import threading

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, ConsisIDPipeline
from support import Stop, stop_after

from teacache.base.errors import ArgumentError
from teacache.core.forward import apply_teacache

STEPS, LISTED = 6, [0, 2, 3, 5]


def second_pipeline(pipe, kind=CogVideoXDPMScheduler):
    """A pipeline of the same models with a scheduler of its own."""
    scheduler = kind.from_config(pipe.scheduler.config)
    return ConsisIDPipeline(**{**pipe.components, "scheduler": scheduler})


def in_another_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.fixture(scope="module")
def sample(sample):
    """5 frames."""
    return lambda pipe, steps=STEPS, seed=42, **changed: sample(
        pipe, steps, seed, num_frames=5, **changed
    )


def test_a_second_thread_between_two_steps(pipe, sample):
    """The first one's video is lost, in words; the second one's is right."""
    within = []

    def sample_in_another_thread(pipe, index, timestep, kwargs):
        if index == 2 and not within:
            in_another_thread(lambda: within.append(sample(pipe, seed=1)))
        return {}

    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe, seed=1)
        with pytest.raises(ArgumentError, match="one video at a time"):
            sample(pipe, callback_on_step_end=sample_in_another_thread)
        assert torch.equal(within[0], expected)


def test_a_second_thread_within_a_step(pipe, sample):
    refused = []

    def call():
        with pytest.raises(ArgumentError, match="one video at a time"):
            sample(pipe, seed=1)
        refused.append(1)

    def call_again(module, inputs):
        in_another_thread(call)
        hook.remove()

    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe)
        hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(call_again)
        with pytest.raises(ArgumentError, match="one video at a time"):
            # The second thread has set the scheduler's timesteps: this video goes no further.
            sample(pipe)
        assert refused
        assert torch.equal(sample(pipe), expected)


@pytest.mark.parametrize(
    ("kind", "steps"), [(CogVideoXDPMScheduler, 9), (CogVideoXDDIMScheduler, 4)]
)
def test_another_pipeline_with_a_scheduler_of_its_own(pipe, sample, kind, steps):
    other = second_pipeline(pipe, kind)
    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe)
        with pytest.raises(ArgumentError, match="by the scheduler of the pipeline"):
            sample(other, steps)
        assert torch.equal(sample(pipe), expected)


def test_another_pipeline_after_an_interruption(pipe, sample):
    """It takes no residual of the stopped video: its first step is that of a new one."""
    other = second_pipeline(pipe)
    with apply_teacache(other, schedule=LISTED):
        expected = sample(other, seed=1)
    with apply_teacache(pipe, schedule=LISTED):
        with pytest.raises(Stop):
            sample(pipe, callback_on_step_end=stop_after(2))
        assert torch.equal(sample(other, seed=1), expected)


def test_a_loop_of_ones_own(pipe, sample):
    """Timesteps that are no views of the scheduler's count by their values."""
    plain = pipe.transformer.forward

    def copied(*args, timestep, **kwargs):
        return patched(*args, timestep=timestep.clone(), **kwargs)

    with apply_teacache(pipe, schedule=LISTED):
        expected = sample(pipe)
        patched, pipe.transformer.forward = pipe.transformer.forward, copied
        assert torch.equal(sample(pipe), expected)
        pipe.transformer.forward = patched
    assert pipe.transformer.forward == plain


def test_steps_that_are_no_whole_numbers_are_refused_at_once(pipe):
    """And nothing is patched: the second one is not refused as such."""
    for steps in ({"schedule": [1.5]}, {"computed_steps": 12.5}):
        with pytest.raises(ArgumentError, match="must be a whole number: found 1"):
            apply_teacache(pipe, **steps)


def test_a_copy_is_refused_in_words(pipe):
    for duplicate in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
        with apply_teacache(pipe), pytest.raises(ArgumentError, match="apply TeaCache to the copy"):
            duplicate(pipe.transformer)
        duplicate(pipe.transformer)


def test_a_transformer_compiled_as_a_whole_is_refused(make_pipe):
    wrapped, in_place = make_pipe(), make_pipe()
    wrapped.transformer = torch.compile(wrapped.transformer, backend="eager")
    in_place.transformer.compile(backend="eager")
    for pipe in (wrapped, in_place):
        with pytest.raises(ArgumentError, match=r"compiled as a whole.*block\.compile"):
            apply_teacache(pipe)
