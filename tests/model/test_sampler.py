"""The sampler's own loop, against `ConsisIDPipeline.__call__`."""

import copy

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, ConsisIDTransformer3DModel
from support import CPU, PROMPT, SIZE
from torch.utils._python_dispatch import TorchDispatchMode

from teacache.base import device as devices
from teacache.checkpoint.size import VideoSize
from teacache.core.forward import apply_teacache
from teacache.embedded.build import TRANSFORMER
from teacache.inputs.text import Text, embed_text
from teacache.sampling import sampler
from teacache.sampling.decoder_memory import DecoderMemory, Offloaded
from teacache.sampling.streaming import stream_blocks

SMALL = SIZE._replace(num_frames=5)
FREE = dict.fromkeys(
    ("use_rotary_positional_embeddings", "use_learned_positional_embeddings"), False
)


def embedded(pipe, guidance_scale=6.0, negative=""):
    without = embed_text(pipe, negative).embeds if guidance_scale > 1 else None
    return Text(embed_text(pipe, PROMPT).embeds, without)


@pytest.fixture(scope="module")
def sample(sample):
    """3 steps of 5 frames unless it says otherwise."""
    return lambda pipe, **changed: sample(pipe, **{"steps": 3, "num_frames": 5, **changed})


def by_the_sampler(pipe, identity, size=SMALL, steps=3, seed=42, guidance_scale=6.0, negative=""):
    prompt = embedded(pipe, guidance_scale, negative)
    start = sampler.prepare(pipe, identity, size, seed)
    return sampler.denoise(
        pipe, start, prompt, size, num_infer_steps=steps, guidance_scale=guidance_scale
    ).latents


@pytest.mark.parametrize(
    ("dtype", "ddim", "changed", "size", "guidance_scale"),
    [
        (torch.float32, False, {}, SIZE, 6.0),
        (torch.bfloat16, True, {}, SMALL, 6.0),
        (torch.float32, True, {"is_kps": True}, SMALL, 1.0),
        (torch.float32, False, FREE, VideoSize(width=96, height=64, num_frames=9), 6.0),
    ],
)
def test_latents_equal_the_pipelines(
    make_pipe, identity, sample, dtype, ddim, changed, size, guidance_scale
):
    pipe = make_pipe(dtype)
    if changed:
        torch.manual_seed(1)
        pipe.transformer = ConsisIDTransformer3DModel(**{**TRANSFORMER, **changed}).eval()
    if ddim:
        pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    expected = sample(pipe, negative_prompt="rain", guidance_scale=guidance_scale, **size._asdict())
    identity = identity._replace(
        id_cond=identity.id_cond.to(dtype),
        id_vit_hidden=[hidden.to(dtype) for hidden in identity.id_vit_hidden],
    )
    found = by_the_sampler(pipe, identity, size, guidance_scale=guidance_scale, negative="rain")
    assert torch.equal(found, expected)


def test_frames_equal_the_pipelines(pipe, identity, sample):
    """Also with TeaCache, at threshold 0."""
    expected = sample(pipe, output_type="pil")[0]
    assert np.std(expected) > 12, "a flat video would prove nothing"
    with apply_teacache(pipe, 0.0):
        frames = sampler.decode(pipe, by_the_sampler(pipe, identity))
    assert [frame.tobytes() for frame in frames] == [frame.tobytes() for frame in expected]


def test_several_videos_from_one_start(pipe, identity, sample):
    """The start, and the generator's state in it, survive the videos that are sampled from it."""
    prompt = embedded(pipe)
    start = sampler.prepare(pipe, identity, SMALL, seed=7)
    for steps in (2, 3, 2):
        found = sampler.denoise(pipe, start, prompt, SMALL, num_infer_steps=steps)
        assert len(found.step_seconds) == steps
        assert torch.equal(found.latents, sample(pipe, steps=steps, seed=7))


class Reads(TorchDispatchMode):
    """Counts how often a tensor's value is wanted by the host, which a GPU makes it wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ddim", [False, True])
def test_no_step_waits_for_the_device(pipe, identity, sample, ddim):
    if ddim:
        pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    prompt = embedded(pipe)
    start = sampler.prepare(pipe, identity, SMALL, seed=7)
    reads = {}
    with apply_teacache(pipe, 0.2) as handle:
        for steps in (8, 12):
            with Reads() as mode:
                sampler.denoise(pipe, start, prompt, SMALL, num_infer_steps=steps)
            reads[steps] = mode.count
            assert handle.schedule.reused_steps
    assert reads[8] == reads[12] <= 2, "once a video, not once a step"
    with Reads() as mode:
        sample(pipe, steps=4)
    assert mode.count >= 4, "the pipeline's own loop is one that waits"


def places(pipe) -> set[str]:
    """The kinds of device that the transformer's weights are on."""
    return {parameter.device.type for parameter in pipe.transformer.parameters()}


def test_a_cpu_has_no_room_to_make_but_after_the_last_video(pipe, sample):
    before = sample(pipe, steps=2)
    with DecoderMemory(pipe, SIZE, "none").to_decode(last=False):
        assert places(pipe) == {"cpu"}
    assert torch.equal(sample(pipe, steps=2), before)
    with DecoderMemory(pipe, SIZE, "model").to_decode(last=True):
        assert places(pipe) == {"cpu"}, "offloading has its own way"
    with DecoderMemory(pipe, SIZE, "none").to_decode(last=True):
        assert places(pipe) == {"meta"}


def test_the_transformer_steps_aside_where_both_do_not_fit(pipe, sample, monkeypatch):
    """As on a GPU with too little memory; here it moves within the host's."""
    pipe.transformer = copy.deepcopy(pipe.transformer)  # at addresses that a CPU sums up alike
    stream_blocks(pipe.transformer, CPU)
    before = sample(pipe, steps=2)
    room = DecoderMemory(pipe, SIZE, "blocks")
    monkeypatch.setattr(DecoderMemory, "_both_fit", lambda self, device: False)
    moves = []
    for name in ("to_host", "to_device"):
        move = getattr(Offloaded, name)
        monkeypatch.setattr(
            Offloaded, name, lambda self, m=move: (moves.append(m.__name__), m(self))
        )
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), room.to_decode(last=False):
            raise ZeroDivisionError
        assert torch.equal(sample(pipe, steps=2), before)
    assert moves == ["to_host", "to_device"] * 2
    with room.to_decode(last=True):
        assert places(pipe) == {"meta"}


@pytest.mark.parametrize(("tiled", "needed"), [(True, 4 * 2**30), (False, 34 * 1024 * 720 * 480)])
def test_what_has_to_be_free_for_both(pipe, monkeypatch, tiled, needed):
    if tiled:
        pipe.vae.enable_tiling()
    room = DecoderMemory(pipe, VideoSize(720, 480, 49), "none")
    for more, stays in ((1, True), (0, False)):
        monkeypatch.setattr(devices, "free_memory_bytes", lambda device, m=more: needed + m)
        assert room._both_fit(torch.device("cuda")) is stays
