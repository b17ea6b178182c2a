"""The patched forward, against the plain pipeline and against a naive reuse of the residual."""

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import CogVideoXDDIMScheduler, ConsisIDTransformer3DModel
from support import CPU, Stop, stop_after

from teacache.base.errors import ArgumentError
from teacache.core.forward import apply_teacache, embed_video
from teacache.embedded.build import TRANSFORMER, smooth_time_embedding

# Reuses steps 1 and 5 of 8, at every size.
STEPS, THRESHOLD = 8, 0.3
F32, BF16 = torch.float32, torch.bfloat16
FREE = {"use_learned_positional_embeddings": False}


def other_transformer(**changed) -> ConsisIDTransformer3DModel:
    torch.manual_seed(7)
    transformer = ConsisIDTransformer3DModel(**{**TRANSFORMER, **changed}).eval()
    smooth_time_embedding(transformer)
    return transformer


class NaiveReuse:
    """Reuse by brute force: every block runs at every step, and at a reused step what comes out of
    the stack is thrown away for what went into it plus the residual of the last computed step.

    It works through hooks on the plain forward, and knows the schedule beforehand.
    """

    def __init__(self, transformer, computed_steps):
        self.step = -1
        self.computed_steps = computed_steps
        self.handles = [
            transformer.register_forward_pre_hook(self.next_step),
            transformer.embedding_dropout.register_forward_hook(self.into_the_stack),
            transformer.norm_final.register_forward_pre_hook(self.out_of_the_stack),
        ]

    def next_step(self, module, args):
        self.step += 1

    def into_the_stack(self, module, args, output):
        self.before = output.clone()

    def out_of_the_stack(self, module, args):
        if self.step in self.computed_steps:
            self.residual = args[0] - self.before
            return None
        return (self.before + self.residual,)


@pytest.fixture(scope="module")
def sample(sample):
    """8 steps and 1 frame unless it says otherwise."""
    return lambda pipe, **changed: sample(pipe, **{"steps": STEPS, "num_frames": 1, **changed})


@pytest.fixture(scope="module")
def plain(make_pipe, sample):
    """Latents of a plain pipeline: sampled once, whoever asks."""
    pipes = {dtype: make_pipe(dtype) for dtype in (F32, BF16)}
    return functools.cache(lambda dtype=F32, **changed: sample(pipes[dtype], **changed))


@pytest.fixture(scope="module")
def fresh(make_pipe, sample):
    """Latents and schedule at a threshold, of a pipeline that has sampled nothing else."""

    @functools.cache
    def first(threshold=THRESHOLD):
        pipe = make_pipe()
        with apply_teacache(pipe, threshold) as handle:
            latents = sample(pipe)
        assert handle.schedule.reused_steps
        return latents, handle.schedule

    return first


@pytest.mark.parametrize(
    ("threshold", "dtype"),
    [(0.0, F32), (0.0, BF16), (1e-9, F32)],  # 1e-9: every step is computed, by the rule
)
def test_every_step_computed_equals_the_plain_pipeline(make_pipe, sample, plain, threshold, dtype):
    pipe = make_pipe(dtype)
    with apply_teacache(pipe, threshold) as handle:
        assert torch.equal(sample(pipe, num_frames=5), plain(dtype, num_frames=5))
    assert handle.schedule.computed_steps == tuple(range(STEPS))


@pytest.mark.parametrize(
    ("threshold", "dtype", "ddim", "is_kps", "guidance_scale"),
    [
        *((0.15, F32, False, False, 6.0), (0.2, BF16, False, False, 6.0)),
        *((0.3, F32, False, True, 1.0), (0.3, F32, True, True, 6.0)),
    ],
)
def test_latents_equal_a_naive_reuse(
    make_pipe, sample, published_schedule, threshold, dtype, ddim, is_kps, guidance_scale
):
    """Where key points are used, the face counts for less than it usually does."""
    naive, ours = make_pipe(dtype), make_pipe(dtype)
    for pipe in (naive, ours):
        if is_kps:
            pipe.transformer = other_transformer(is_kps=True)
            pipe.transformer.local_face_scale = 0.7
        if ddim:
            pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    guided = {"guidance_scale": guidance_scale, "num_frames": 5}
    computed = published_schedule(naive, 12, threshold)
    assert 2 < len(computed) < 12
    with apply_teacache(ours, 0.0) as handle:
        assert torch.equal(sample(ours, steps=2, **guided), sample(naive, steps=2, **guided))
        handle.rel_l1_thresh = threshold
        reusing = sample(ours, steps=12, **guided)
        assert handle.schedule.computed_steps == tuple(computed)
    NaiveReuse(naive.transformer, computed)
    assert torch.equal(reusing, sample(naive, steps=12, **guided))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("changed", "latent_frames", "height"),
    [
        *(({}, 7, 12), ({}, 5, 12), (FREE, 7, 12)),
        ({**FREE, "use_rotary_positional_embeddings": False}, 5, 8),
    ],
)
def test_a_reused_step_embeds_the_video_as_the_patch_embedding_does(
    changed, latent_frames, height, dtype
):
    patch_embed = other_transformer(**changed).patch_embed.to(dtype)
    if not changed:
        torch.nn.init.normal_(patch_embed.pos_embedding)
    text = torch.randn(2, 226, TRANSFORMER["text_embed_dim"], dtype=dtype)
    video = torch.randn(2, latent_frames, 32, height, 14, dtype=dtype)
    expected = patch_embed(text, video)[:, 226:]
    assert torch.equal(embed_video(patch_embed, video), expected)


def test_identity_cross_attention_and_face_extractor_calls(pipe, sample):
    calls = Counter()
    transformer = pipe.transformer
    for name, modules in (
        ("cross", transformer.perceiver_cross_attention),
        ("block", transformer.transformer_blocks),
        ("face", [transformer.local_facial_extractor]),
    ):
        for module in modules:
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with apply_teacache(pipe, THRESHOLD) as handle:
        sample(pipe)
        computed = len(handle.schedule.computed_steps)
        assert 0 < computed < STEPS
        assert calls == {"cross": 2 * computed, "block": 4 * computed, "face": 1}
        sample(pipe, steps=2)
        assert calls["face"] == 2


@pytest.mark.parametrize(
    "earlier",
    [
        *({}, {"steps": 3}, {"threshold": 0.5, "seed": 7}, {"guidance_scale": 1.0}),
        {"prompt": ["a man", "a girl"]},
        *({"stop": 0}, {"stop": 5}, {"stop": STEPS - 1}, {"stop": 5, "num_frames": 9}),
    ],
    ids=lambda earlier: ", ".join(f"{key} {value}" for key, value in earlier.items()) or "the same",
)
def test_every_video_starts_clean(pipe, sample, identity, fresh, earlier):
    """What came before, and how it ended, shows neither in the schedule nor in the latents.

    Of one that is stopped the schedule says what was done.
    """
    expected, schedule = fresh()
    earlier = dict(earlier)
    stop, threshold = earlier.pop("stop", None), earlier.pop("threshold", THRESHOLD)
    if "prompt" in earlier:
        earlier["image"] = [identity.face] * len(earlier["prompt"])
    with apply_teacache(pipe, threshold) as handle:
        assert handle.schedule is None
        if stop is None:
            sample(pipe, **earlier)
        else:
            with pytest.raises(Stop):
                sample(pipe, callback_on_step_end=stop_after(stop), **earlier)
            assert handle.schedule == schedule.until(stop + 1)
        handle.rel_l1_thresh = THRESHOLD
        assert torch.equal(sample(pipe), expected)
    assert handle.schedule == schedule, "known also when TeaCache has gone"


def test_lora_scale(pipe, sample):
    """The scale in `attention_kwargs` reaches LoRA layers as in the plain forward."""
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    scaled = {s: sample(pipe, steps=1, attention_kwargs={"scale": s}) for s in (0.5, 1.0)}
    assert not torch.equal(scaled[0.5], scaled[1.0])
    with apply_teacache(pipe, 0.0):
        for scale, expected in scaled.items():
            assert torch.equal(sample(pipe, steps=1, attention_kwargs={"scale": scale}), expected)


@pytest.mark.parametrize(
    "hook",
    [
        lambda transformer: cpu_offload_with_hook(transformer, "cpu"),
        lambda transformer: cpu_offload(transformer, CPU),
        # Hooks of diffusers keep the forward elsewhere than accelerate's.
        lambda transformer: transformer.enable_group_offload(CPU, num_blocks_per_group=1),
        lambda transformer: transformer.enable_group_offload(CPU, offload_type="leaf_level"),
    ],
)
@pytest.mark.parametrize("hooked_first", [True, False])
def test_offload_hooks_in_any_order(pipe, sample, plain, fresh, hook, hooked_first):
    if hooked_first:
        hook(pipe.transformer)
    handle = apply_teacache(pipe, THRESHOLD)
    if not hooked_first:
        hook(pipe.transformer)
    of_accelerate = getattr(pipe.transformer, "_hf_hook", None)
    if of_accelerate:
        loads, load = [], of_accelerate.pre_forward
        of_accelerate.pre_forward = lambda *a, **k: loads.append(1) or load(*a, **k)
    assert torch.equal(sample(pipe), fresh()[0])
    assert handle.schedule.reused_steps
    assert not of_accelerate or len(loads) == STEPS, "it still runs at every step"
    with pytest.raises(ArgumentError, match="already"):
        apply_teacache(pipe)
    handle.remove()
    assert torch.equal(sample(pipe, steps=2), plain(steps=2)), "undone below the hooks"
    if of_accelerate and hooked_first:
        with apply_teacache(pipe, THRESHOLD):
            remove_hook_from_module(pipe.transformer, recurse=True)
            assert torch.equal(sample(pipe), fresh()[0]), "hooks may go while TeaCache stays"
        assert "forward" not in vars(pipe.transformer)
        assert torch.equal(sample(pipe, steps=2), plain(steps=2))


def test_undone_to_the_byte(pipe, sample, plain):
    transformer = pipe.transformer
    attributes = dict(vars(transformer))
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    with apply_teacache(pipe, THRESHOLD) as handle:
        sample(pipe)
        assert vars(transformer).keys() - attributes.keys() == {"forward"}
        assert handle.video.residual is None, "leaves no memory behind"
        assert handle.video.face is None
    assert vars(transformer) == attributes
    assert transformer.forward.__func__ is ConsisIDTransformer3DModel.forward
    assert all(torch.equal(weights[n], t) for n, t in transformer.state_dict().items())
    assert torch.equal(sample(pipe, steps=2), plain(steps=2))


def test_two_pipelines_do_not_meet(make_pipe, sample, fresh):
    """A whole video on one pipeline, in the middle of a video on the other."""
    outer, inner = make_pipe(), make_pipe()
    within = []

    def sample_the_other(pipe, index, timestep, kwargs):
        if index == 4:
            within.append(sample(inner))
        return {}

    with apply_teacache(outer, THRESHOLD), apply_teacache(inner, 0.5):
        result = sample(outer, callback_on_step_end=sample_the_other)
    assert torch.equal(result, fresh()[0])
    assert torch.equal(within[0], fresh(0.5)[0])


def test_a_transformer_on_its_own(pipe, sample, fresh):
    """Its first video is stopped within the first step."""

    def fail(module, args):
        raise Stop

    with apply_teacache(pipe.transformer, THRESHOLD, scheduler=pipe.scheduler):
        hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            sample(pipe)
        hook.remove()
        for _ in range(2):
            assert torch.equal(sample(pipe), fresh()[0])


def test_a_schedule_in_place_of_a_threshold(pipe, sample, fresh):
    """A list of steps computes the same as the threshold that it comes from; so does its plan."""
    expected, planned = fresh()
    with apply_teacache(pipe, THRESHOLD) as handle:
        handle.follow(planned.computed_steps)
        assert torch.equal(sample(pipe), expected)
        assert handle.schedule == replace(planned, rel_l1_thresh=None)
        handle.follow(planned)
        assert torch.equal(sample(pipe), expected)
        assert handle.schedule == planned
        with pytest.raises(ArgumentError, match="a schedule of 8 steps cannot be followed in 5"):
            sample(pipe, steps=5)
    with apply_teacache(pipe, schedule=[2, 3, 5]) as handle:
        ours = sample(pipe)
        assert handle.schedule.computed_steps == (0, 2, 3, 5, 7)
        with pytest.raises(ArgumentError, match="step 5 cannot be computed"):
            sample(pipe, steps=4)
    NaiveReuse(pipe.transformer, (0, 2, 3, 5, 7))
    assert torch.equal(ours, sample(pipe))


def test_another_face_in_the_middle_of_a_video_is_seen(pipe, sample, plain, identity):
    """A caller that changes the identity between steps gets what the plain forward gives."""

    def sample_with_two_faces():
        other = [hidden + 1 for hidden in identity.id_vit_hidden]
        given = list(identity.id_vit_hidden)

        def change(pipe, index, timestep, kwargs):
            if index == 1:
                given[:] = other
            return {}

        return sample(pipe, steps=4, id_vit_hidden=given, callback_on_step_end=change)

    expected = sample_with_two_faces()
    assert not torch.equal(expected, plain(steps=4))
    with apply_teacache(pipe, 0.0):
        assert torch.equal(sample_with_two_faces(), expected)


def test_refuses_what_it_cannot_patch(pipe):
    for what, arguments, complaint in (
        (pipe.vae, {}, "AutoencoderKLCogVideoX"),
        (pipe.transformer, {}, "a scheduler is needed"),
        (pipe, {"rel_l1_thresh": -1.0}, "rel_l1_thresh"),
        (pipe, {"scheduler": pipe.scheduler}, "a pipeline has its own"),
    ):
        with pytest.raises(ArgumentError, match=complaint):
            apply_teacache(what, **arguments)
    removed = apply_teacache(pipe)
    removed.remove()
    with apply_teacache(pipe):
        removed.remove()  # which has no say over the second handle
        with pytest.raises(ArgumentError, match="already"):
            apply_teacache(pipe.transformer, scheduler=pipe.scheduler)
    plain = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(ArgumentError, match="first"):
        apply_teacache(pipe)
