"""The patched forward, against the plain pipeline and against a naive reuse of the residual."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, ConsisIDTransformer3DModel
from support import SIZE

from teacache.base.errors import ArgumentError
from teacache.core.forward import apply_teacache, embed_video
from teacache.core.rule import Coefficients
from teacache.embedded.build import TRANSFORMER, smooth_time_embedding


class Stop(Exception):
    """Raised in a step's callback, as a user's Ctrl-C would be."""


def stop_after(step: int):
    def callback(pipe, index, timestep, kwargs):
        if index == step:
            raise Stop
        return {}

    return callback


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 1e-9])  # 1e-9: every step is computed, by the rule
def test_every_step_computed_equals_the_plain_pipeline(make_pipe, sample, threshold, dtype):
    pipe = make_pipe(dtype)
    plain = sample(pipe, steps=8)
    with apply_teacache(pipe, threshold) as handle:
        assert torch.equal(sample(pipe, steps=8), plain)
    assert handle.schedule.computed_steps == tuple(range(8))


def test_a_face_that_counts_for_less(make_pipe, sample):
    pipe = make_pipe(torch.bfloat16)
    usual = sample(pipe, steps=2)
    pipe.transformer.local_face_scale = 0.7
    plain = sample(pipe, steps=2)
    assert not torch.equal(plain, usual)
    with apply_teacache(pipe, 0.0):
        assert torch.equal(sample(pipe, steps=2), plain)


def test_frames_at_threshold_0_equal_the_plain_pipeline(pipe, sample):
    plain = sample(pipe, output_type="np")
    assert plain.shape == (1, SIZE.num_frames, SIZE.height, SIZE.width, 3)
    assert plain.std() > 0.05, "a flat video would prove nothing"
    with apply_teacache(pipe, 0.0):
        assert np.array_equal(sample(pipe, output_type="np"), plain)


@pytest.mark.parametrize("threshold", [0.15, 0.2, 0.3])
def test_frames_equal_a_naive_reuse(make_pipe, sample, published_schedule, threshold):
    naive, ours = make_pipe(), make_pipe()
    computed = published_schedule(naive, 20, threshold)
    NaiveReuse(naive.transformer, computed)
    expected = sample(naive, steps=20, output_type="np")
    with apply_teacache(ours, threshold) as handle:
        assert np.array_equal(sample(ours, steps=20, output_type="np"), expected)
    assert handle.schedule.computed_steps == tuple(computed)
    assert 2 < len(computed) < 20


def test_latents_equal_a_naive_reuse_in_bfloat16(make_pipe, sample, published_schedule):
    naive, ours = make_pipe(torch.bfloat16), make_pipe(torch.bfloat16)
    NaiveReuse(naive.transformer, published_schedule(naive, 12, 0.2))
    expected = sample(naive, num_frames=5)
    with apply_teacache(ours, 0.2) as handle:
        assert torch.equal(sample(ours, num_frames=5), expected)
    assert handle.schedule.reused_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("changed", "latent_frames", "height"),
    [
        ({}, 7, 12),
        ({}, 5, 12),
        ({"use_learned_positional_embeddings": False}, 7, 12),
        (
            {
                "use_learned_positional_embeddings": False,
                "use_rotary_positional_embeddings": False,
            },
            5,
            8,
        ),
    ],
)
def test_a_reused_step_embeds_the_video_as_the_patch_embedding_does(
    changed, latent_frames, height, dtype
):
    patch_embed = other_transformer(**changed).patch_embed.to(dtype)
    if changed.get("use_learned_positional_embeddings", True):
        torch.nn.init.normal_(patch_embed.pos_embedding)
    text = torch.randn(2, 226, TRANSFORMER["text_embed_dim"], dtype=dtype)
    video = torch.randn(2, latent_frames, 32, height, 14, dtype=dtype)
    expected = patch_embed(text, video)[:, 226:]
    assert torch.equal(embed_video(patch_embed, video), expected)


def test_identity_cross_attention_and_face_extractor_calls(pipe, sample):
    calls = {"cross": 0, "face": 0, "block": 0}

    def count(name):
        def hook(module, args, output):
            calls[name] += 1

        return hook

    transformer = pipe.transformer
    for module in transformer.perceiver_cross_attention:
        module.register_forward_hook(count("cross"))
    for module in transformer.transformer_blocks:
        module.register_forward_hook(count("block"))
    transformer.local_facial_extractor.register_forward_hook(count("face"))

    sample(pipe, steps=4)
    plain_cross, plain_blocks = calls["cross"] / 4, calls["block"] / 4
    assert (plain_cross, plain_blocks) == (2, 4)

    calls.update(cross=0, face=0, block=0)
    with apply_teacache(pipe, 0.15) as handle:
        sample(pipe, steps=50)
        computed = len(handle.schedule.computed_steps)
        assert 0 < computed < 50
        assert calls == {
            "cross": plain_cross * computed,
            "block": plain_blocks * computed,
            "face": 1,
        }
        sample(pipe, steps=10)
        assert calls["face"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheduler", [CogVideoXDPMScheduler, CogVideoXDDIMScheduler])
def test_schedule_of_the_tiny_checkpoint(make_pipe, sample, published_schedule, scheduler, dtype):
    """The sampler's schedule equals one computed from the embeddings alone."""
    pipe = make_pipe(dtype)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    counts = set()
    with apply_teacache(pipe) as handle:
        for threshold in (0.1, 0.15, 0.2):
            expected = published_schedule(pipe, 50, threshold)
            counts.add(len(expected))
            if dtype == torch.bfloat16 and threshold != 0.15:
                continue  # slow on a CPU, and one is as good as three
            handle.rel_l1_thresh = threshold
            sample(pipe, steps=50, num_frames=1)
            assert handle.schedule.computed_steps == tuple(expected)
            assert not handle.schedule.extrapolated_steps
    assert len(counts) == 3, "each threshold computes another number of steps"


STEPS, THRESHOLD = 14, 0.15


@pytest.mark.parametrize(
    "earlier",
    [
        pytest.param({}, id="back to back"),
        pytest.param({"steps": 9}, id="other number of steps"),
        pytest.param({"steps": 1}, id="one step"),
        pytest.param({"rel_l1_thresh": 0.3}, id="other threshold"),
        pytest.param({"rel_l1_thresh": 0.0}, id="threshold 0"),
        pytest.param({"num_frames": 9}, id="other size"),
        pytest.param({"guidance_scale": 1.0}, id="no guidance"),
        pytest.param({"prompt": ["a man", "a girl"], "image": 2}, id="other batch"),
        pytest.param({"seed": 7}, id="other seed"),
        *(
            pytest.param({"callback_on_step_end": stop_after(step)}, id=f"stopped after {step}")
            for step in (0, 1, 5, STEPS - 2, STEPS - 1)
        ),
        pytest.param(
            {"callback_on_step_end": stop_after(5), "num_frames": 9}, id="stopped at another size"
        ),
    ],
)
def test_every_video_starts_clean(make_pipe, sample, identity, earlier):
    """What came before, and how it ended, shows neither in the schedule nor in the latents."""
    fresh, used = make_pipe(), make_pipe()
    with apply_teacache(fresh, THRESHOLD) as handle:
        expected, schedule = sample(fresh, steps=STEPS), handle.schedule
    assert 0 < len(schedule.reused_steps) < STEPS

    earlier = {"steps": STEPS, **earlier}
    if "image" in earlier:
        earlier["image"] = [identity.face] * earlier["image"]
    with apply_teacache(used, earlier.pop("rel_l1_thresh", THRESHOLD)) as handle:
        if "callback_on_step_end" in earlier:
            with pytest.raises(Stop):
                sample(used, **earlier)
        else:
            sample(used, **earlier)
        handle.rel_l1_thresh = THRESHOLD
        assert torch.equal(sample(used, steps=STEPS), expected)
    assert handle.schedule == schedule


def test_a_video_after_one_stopped_within_its_first_step(make_pipe, sample):
    fresh, used = make_pipe(), make_pipe()
    with apply_teacache(fresh, THRESHOLD):
        expected = sample(fresh, steps=STEPS)

    def fail(module, args):
        raise Stop

    with apply_teacache(used, THRESHOLD):
        hook = used.transformer.transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            sample(used, steps=STEPS)
        hook.remove()
        assert torch.equal(sample(used, steps=STEPS), expected)


@pytest.mark.parametrize("changed", [{"width": 96, "height": 144}, {"width": 176}])
def test_other_sizes_where_the_model_allows_them(make_pipe, sample, changed):
    """Without learned positional embeddings width and height are free."""
    transformer = other_transformer(use_learned_positional_embeddings=False)
    fresh, used = make_pipe(), make_pipe()
    fresh.transformer, used.transformer = transformer, transformer
    plain = sample(fresh, steps=6, **changed)
    with apply_teacache(used, 0.0) as handle:
        sample(used, steps=6)
        assert torch.equal(sample(used, steps=6, **changed), plain)
        handle.rel_l1_thresh = 0.2
        sample(used, steps=12)
        reusing = sample(used, steps=12, **changed)
        assert handle.schedule.reused_steps
    with apply_teacache(fresh, 0.2):
        assert torch.equal(sample(fresh, steps=12, **changed), reusing)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_few_steps(pipe, sample, steps):
    plain = sample(pipe, steps=steps)
    with apply_teacache(pipe, 0.0):
        assert torch.equal(sample(pipe, steps=steps), plain)
    # Two or three steps lie far apart, outside the range of the published coefficients.
    anything = Coefficients((0.0, 0.0, 0.0, 1.0, 0.0), (0.0, 10.0), "p(x) = x")
    with apply_teacache(pipe, 100.0, coefficients=anything) as handle:
        sample(pipe, steps=steps)
    assert handle.schedule.computed_steps == tuple(sorted({0, steps - 1}))


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("is_kps", [False, True])
@pytest.mark.parametrize("ddim", [False, True])
def test_schedulers_key_points_and_guidance(pipe, make_pipe, sample, ddim, is_kps, guidance_scale):
    naive = make_pipe()
    for each in (pipe, naive):
        each.transformer = other_transformer(is_kps=is_kps)
        if ddim:
            each.scheduler = CogVideoXDDIMScheduler.from_config(each.scheduler.config)
    plain = sample(pipe, guidance_scale=guidance_scale)
    with apply_teacache(pipe, 0.0) as handle:
        assert torch.equal(sample(pipe, guidance_scale=guidance_scale), plain)
        handle.rel_l1_thresh = 0.15
        ours = sample(pipe, guidance_scale=guidance_scale)
    assert handle.schedule.reused_steps
    NaiveReuse(naive.transformer, handle.schedule.computed_steps)
    assert torch.equal(ours, sample(naive, guidance_scale=guidance_scale))


def test_lora_scale(pipe, sample):
    """The scale in `attention_kwargs` reaches LoRA layers as in the plain forward."""
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    plain = {s: sample(pipe, steps=4, attention_kwargs={"scale": s}) for s in (0.0, 0.5, 1.0)}
    assert not torch.equal(plain[0.5], plain[1.0])
    with apply_teacache(pipe, 0.0):
        for scale, expected in plain.items():
            assert torch.equal(sample(pipe, steps=4, attention_kwargs={"scale": scale}), expected)


def hook_model(transformer):
    cpu_offload_with_hook(transformer, "cpu")


def hook_layers(transformer):
    cpu_offload(transformer, torch.device("cpu"))


@pytest.mark.parametrize("hook", [hook_model, hook_layers])
@pytest.mark.parametrize("hooked_first", [True, False])
def test_offload_hooks(make_pipe, sample, hook, hooked_first):
    fresh, pipe = make_pipe(), make_pipe()
    with apply_teacache(fresh, THRESHOLD):
        expected = sample(fresh, steps=STEPS)
    plain = sample(fresh, steps=4)

    if hooked_first:
        hook(pipe.transformer)
        handle = apply_teacache(pipe, THRESHOLD)
    else:
        handle = apply_teacache(pipe, THRESHOLD)
        hook(pipe.transformer)
    loads = []
    pre_forward = pipe.transformer._hf_hook.pre_forward
    pipe.transformer._hf_hook.pre_forward = lambda *a, **k: loads.append(1) or pre_forward(*a, **k)
    assert torch.equal(sample(pipe, steps=STEPS), expected)
    assert len(loads) == STEPS, "the hook around the forward still runs at every step"
    assert handle.schedule.reused_steps
    handle.remove()
    assert torch.equal(sample(pipe, steps=4), plain)
    remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(sample(pipe, steps=4), plain)


def test_hooks_that_go_while_teacache_stays(make_pipe, sample):
    fresh, pipe = make_pipe(), make_pipe()
    with apply_teacache(fresh, THRESHOLD):
        expected = sample(fresh, steps=STEPS)
    hook_model(pipe.transformer)
    with apply_teacache(pipe, THRESHOLD):
        remove_hook_from_module(pipe.transformer)
        assert torch.equal(sample(pipe, steps=STEPS), expected)
    assert "forward" not in vars(pipe.transformer)


def test_undone_to_the_byte(pipe, sample):
    transformer = pipe.transformer
    before, attributes = sample(pipe, steps=6), dict(vars(transformer))
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    with apply_teacache(pipe, 0.2):
        sample(pipe, steps=12)
        assert vars(transformer).keys() - attributes.keys() == {"forward"}
    assert vars(transformer) == attributes
    assert transformer.forward.__func__ is ConsisIDTransformer3DModel.forward
    assert all(torch.equal(weights[n], t) for n, t in transformer.state_dict().items())
    assert torch.equal(sample(pipe, steps=6), before)


def test_removed_under_a_later_wrapper(pipe, sample):
    """What wrapped the forward later keeps calling ours; removed, ours calls the plain one."""
    from diffusers.hooks import HookRegistry, ModelHook

    plain = sample(pipe, steps=6)
    handle = apply_teacache(pipe, 0.3)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(ModelHook(), "later")
    sample(pipe, steps=12)
    assert handle.schedule.reused_steps
    handle.remove()
    followed = handle.schedule
    assert torch.equal(sample(pipe, steps=6), plain)
    assert handle.schedule == followed, "nothing is counted any more"


def test_removing_twice_and_applying_again(pipe, sample):
    handle = apply_teacache(pipe, 0.2)
    handle.remove()
    again = apply_teacache(pipe, 0.2)
    handle.remove()  # the first handle has no say over the second
    sample(pipe, steps=12)
    assert again.schedule.reused_steps
    again.remove()


def test_two_pipelines_do_not_meet(make_pipe, sample):
    """A whole video on one pipeline, in the middle of a video on the other."""
    alone = {}
    for threshold in (0.15, 0.3):
        pipe = make_pipe()
        with apply_teacache(pipe, threshold):
            alone[threshold] = sample(pipe, steps=STEPS)
    outer, inner = make_pipe(), make_pipe()
    within = []

    def sample_the_other(pipe, index, timestep, kwargs):
        if index == 5:
            within.append(sample(inner, steps=STEPS))
        return {}

    with apply_teacache(outer, 0.15), apply_teacache(inner, 0.3):
        result = sample(outer, steps=STEPS, callback_on_step_end=sample_the_other)
    assert torch.equal(result, alone[0.15])
    assert torch.equal(within[0], alone[0.3])


def test_a_transformer_on_its_own(make_pipe, sample):
    fresh, pipe = make_pipe(), make_pipe()
    with apply_teacache(fresh, THRESHOLD):
        expected = sample(fresh, steps=STEPS)
    with apply_teacache(pipe.transformer, THRESHOLD, scheduler=pipe.scheduler):
        with pytest.raises(Stop):
            sample(pipe, steps=STEPS, callback_on_step_end=stop_after(5))
        for _ in range(2):
            assert torch.equal(sample(pipe, steps=STEPS), expected)


def test_a_schedule_in_place_of_a_threshold(make_pipe, sample):
    """A list of steps computes the same as the threshold that it comes from; so does its plan."""
    pipe, naive = make_pipe(), make_pipe()
    with apply_teacache(pipe, THRESHOLD) as handle:
        expected, planned = sample(pipe, steps=STEPS), handle.schedule
        assert planned.reused_steps
        handle.follow(planned.computed_steps)
        assert torch.equal(sample(pipe, steps=STEPS), expected)
        assert handle.schedule == replace(planned, rel_l1_thresh=None)
        handle.follow(planned)
        assert torch.equal(sample(pipe, steps=STEPS), expected)
        assert handle.schedule == planned
        with pytest.raises(ArgumentError, match="a schedule of 14 steps cannot be followed in 5"):
            sample(pipe, steps=5)
        handle.follow(None)
        assert torch.equal(sample(pipe, steps=STEPS), expected)
    with apply_teacache(pipe, schedule=[2, 3, 7]) as handle:
        ours = sample(pipe)
        assert handle.schedule.computed_steps == (0, 2, 3, 7, 11)
        with pytest.raises(ArgumentError, match="step 7 cannot be computed"):
            sample(pipe, steps=4)
    NaiveReuse(naive.transformer, handle.schedule.computed_steps)
    assert not torch.equal(ours, expected)
    assert torch.equal(ours, sample(naive))


def test_a_video_that_is_stopped_records_what_was_done(make_pipe, sample):
    pipe = make_pipe()
    with apply_teacache(pipe, THRESHOLD) as handle:
        assert handle.schedule is None
        sample(pipe, steps=STEPS)
        whole = handle.schedule
        with pytest.raises(Stop):
            sample(pipe, steps=STEPS, callback_on_step_end=stop_after(5))
        assert handle.schedule == whole.until(6)
        assert handle.schedule.num_steps == 6
    assert handle.schedule == whole.until(6), "known also when TeaCache has gone"


def test_another_face_in_the_middle_of_a_video_is_seen(pipe, sample, identity):
    """A caller that changes the identity between steps gets what the plain forward gives."""

    def sample_with_two_faces():
        other = [hidden + 1 for hidden in identity.id_vit_hidden]
        given = list(identity.id_vit_hidden)

        def change(pipe, index, timestep, kwargs):
            if index == 1:
                given[:] = other
            return {}

        return sample(pipe, steps=4, id_vit_hidden=given, callback_on_step_end=change)

    plain = sample_with_two_faces()
    assert not torch.equal(plain, sample(pipe, steps=4))
    with apply_teacache(pipe, 0.0):
        assert torch.equal(sample_with_two_faces(), plain)


def test_leaves_no_memory_behind(pipe, sample):
    with apply_teacache(pipe, 0.2) as handle:
        sample(pipe, steps=12)
        assert handle.video.residual is None
        assert handle.video.face is None


def test_refuses_what_it_cannot_patch(pipe):
    with pytest.raises(ArgumentError, match="AutoencoderKLCogVideoX"):
        apply_teacache(pipe.vae)
    with pytest.raises(ArgumentError, match="a scheduler is needed"):
        apply_teacache(pipe.transformer)
    with pytest.raises(ArgumentError, match="rel_l1_thresh"):
        apply_teacache(pipe, -1.0)
    with pytest.raises(ArgumentError, match="a pipeline has its own"):
        apply_teacache(pipe, scheduler=pipe.scheduler)
    with apply_teacache(pipe), pytest.raises(ArgumentError, match="already"):
        apply_teacache(pipe)
    hook_model(pipe.transformer)
    with apply_teacache(pipe), pytest.raises(ArgumentError, match="already"):
        apply_teacache(pipe.transformer, scheduler=pipe.scheduler)


def test_refuses_a_forward_that_something_else_wraps(pipe):
    plain = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(ArgumentError, match="first"):
        apply_teacache(pipe)


def test_tells_once_of_distances_that_the_coefficients_do_not_cover(pipe, sample, caplog):
    torch.nn.init.normal_(pipe.transformer.time_embedding.linear_1.weight)
    with apply_teacache(pipe, 0.2) as handle:
        sample(pipe, steps=8)
        sample(pipe, steps=8)
    told = [record for record in caplog.records if record.name == "teacache.core.handle"]
    assert len(told) == 1
    assert "do not cover" in told[0].getMessage()
    assert handle.schedule.computed_steps == tuple(range(8))
    assert "cover" in handle.schedule.why_nothing_was_reused()
