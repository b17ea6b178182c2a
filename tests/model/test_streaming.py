"""Blocks streamed from host memory, against the same transformer with all of them in place.

On a CPU the device's memory is the host's, and there is one queue: what is tested here is which
weights are where when, and the numbers. That copies and computation wait for each other on a GPU
is not.
"""

import copy

import pytest
import torch
from support import CPU

from teacache.core.forward import apply_teacache
from teacache.sampling.decoder_memory import Offloaded
from teacache.sampling.streaming import HostWeights, stream_blocks

SHORT = {"steps": 8, "num_frames": 5}


@pytest.fixture
def make_pipe(make_pipe):
    """With weights at addresses of one alignment: of another, a CPU sums up in another order."""

    def make(dtype=torch.float32):
        pipe = make_pipe(dtype)
        pipe.transformer = copy.deepcopy(pipe.transformer)
        return pipe

    return make


@pytest.mark.parametrize(("threshold", "dtype"), [(0.0, torch.bfloat16), (0.3, torch.float32)])
def test_latents_are_the_same_bit_for_bit(make_pipe, sample, dtype, threshold):
    resident, streamed = make_pipe(dtype), make_pipe(dtype)
    stream_blocks(streamed.transformer, CPU)
    with apply_teacache(resident, threshold), apply_teacache(streamed, threshold):
        expected, found = (sample(each, **SHORT) for each in (resident, streamed))
    assert torch.equal(found, expected)


def test_two_blocks_are_there_and_reused_steps_move_none(pipe, sample, monkeypatch):
    stream_blocks(pipe.transformer, CPU)
    blocks = pipe.transformer.transformer_blocks
    moved, come = [], HostWeights.to_device
    monkeypatch.setattr(
        HostWeights,
        "to_device",
        lambda self, buffer=None: (moved.append(self), come(self, buffer))[1],
    )
    with apply_teacache(pipe, 0.3) as handle:
        sample(pipe, **SHORT)
        computed = len(handle.schedule.computed_steps)
    assert len(handle.schedule.reused_steps) > 0
    # Each computed step brings every block once, for itself or, the first two, for the next one.
    assert len(moved) == computed * len(blocks) + 2
    assert len(blocks._slots) == 2


def test_only_a_block_that_is_there_has_weights_on_the_device(pipe):
    names = list(pipe.transformer.state_dict())
    stream_blocks(pipe.transformer, CPU)
    assert list(pipe.transformer.state_dict()) == names
    blocks = pipe.transformer.transformer_blocks
    for block in blocks:
        slots = [slot.buffer.untyped_storage().data_ptr() for slot in blocks._slots]
        there = [
            any(p.untyped_storage().data_ptr() in slots for p in each.parameters())
            for each in blocks._modules.values()
        ]
        assert sum(there) <= 2
        assert there[list(blocks._modules.values()).index(block)]


def test_a_step_that_fails_leaves_the_next_one_right(make_pipe, sample):
    plain, pipe = make_pipe(), make_pipe()
    stream_blocks(pipe.transformer, CPU)
    blocks = list(pipe.transformer.transformer_blocks._modules.values())

    def fail(*_):
        raise RuntimeError("in the middle")

    hook = blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        sample(pipe, steps=2)
    hook.remove()
    assert torch.equal(sample(pipe, steps=2), sample(plain, steps=2))


@pytest.mark.parametrize("streamed", [False, True])
def test_stepping_aside_and_back(make_pipe, sample, streamed):
    plain, pipe = make_pipe(), make_pipe()
    if streamed:
        stream_blocks(pipe.transformer, CPU)
    expected = plain.transformer.state_dict()
    aside = Offloaded(pipe.transformer, CPU)
    for _ in range(2):
        aside.to_host()
        assert all(map(torch.equal, pipe.transformer.state_dict().values(), expected.values()))
        if streamed:
            assert not pipe.transformer.transformer_blocks._slots, "its memory is the decoder's"
        copies = [weights.host.data_ptr() for weights in aside.weights]
        aside.to_device()
    aside.to_host()
    assert [weights.host.data_ptr() for weights in aside.weights] == copies, "copied once"
    whole = sum(each.nbytes for each in expected.values())
    blocks = sum(each.nbytes for each in plain.transformer.transformer_blocks.state_dict().values())
    held = sum(tensor.nbytes for weights in aside.weights for tensor in weights.tensors)
    assert held == whole - (blocks if streamed else 0), "nothing is left behind"
    aside.to_device()
    assert torch.equal(sample(pipe, steps=2), sample(plain, steps=2))
