"""Attention through diffusers' dispatcher, against the processor that it replaces."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from support import CPU

from teacache.base.errors import ArgumentError
from teacache.core.forward import apply_teacache
from teacache.sampling import attention
from teacache.sampling.attention import (
    ConsisIDAttnProcessor,
    apply_rotary_,
    choose_backend,
    is_exact,
    use_attention,
)

SHORT = {"steps": 8, "num_frames": 5}
SIZE = (333, 64)  # tokens and head dim: not a multiple of a kernel's tile


@pytest.mark.parametrize(("threshold", "dtype"), [(0.0, torch.bfloat16), (0.3, torch.float32)])
def test_native_equals_the_processor_it_replaces(make_pipe, sample, threshold, dtype):
    theirs, ours = make_pipe(dtype), make_pipe(dtype)
    use_attention(ours.transformer, "native")
    with apply_teacache(theirs, threshold), apply_teacache(ours, threshold) as handle:
        assert torch.equal(sample(ours, **SHORT), sample(theirs, **SHORT))
    assert bool(handle.schedule.reused_steps) == (threshold > 0)
    for pipe, kind in ((theirs, CogVideoXAttnProcessor2_0), (ours, ConsisIDAttnProcessor)):
        assert {type(each) for each in pipe.transformer.attn_processors.values()} == {kind}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rotary_embedding_is_diffusers_bit_for_bit(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 7 + 300, 6, 64, generator=generator).to(dtype)
    angles = torch.rand(300, 64, generator=generator) * 7
    rotary = angles.cos(), angles.sin()
    expected = apply_rotary_emb(tokens[:, 7:], rotary, sequence_dim=1)
    text = tokens[:, :7].clone()
    for at_once in (1, 2 * 6 * 64 * 70, 2**24):  # a token, 70 of them, all of them
        monkeypatch.setattr(attention, "ROTARY_CHUNK", at_once)
        turned = tokens.clone()
        apply_rotary_(turned[:, 7:], rotary)
        assert torch.equal(turned[:, 7:], expected)
        assert torch.equal(turned[:, :7], text)
    assert torch.equal(rotary[1], angles.sin()), "another layer reads them again"


def test_exact_backends_differ_in_rounding_alone(make_pipe, sample):
    """Flex attention is another kernel: in float32 the latents agree to rounding, not to the bit.

    Three steps of four layers; float32 has 24 bits, and 1e-4 of the largest latent leaves ten of
    them for what piles up on the way.
    """
    pipe = make_pipe()
    expected = sample(pipe, steps=3, num_frames=5)
    use_attention(pipe.transformer, choose_backend("flex", CPU, torch.float32, *SIZE))
    found = sample(pipe, steps=3, num_frames=5)
    assert not torch.equal(found, expected), "the backend is the one that was asked for"
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    pipe.transformer.set_attention_backend("native")  # diffusers' own call
    assert torch.equal(sample(pipe, steps=3, num_frames=5), expected)


def test_fused_projections_are_used(pipe, sample):
    use_attention(pipe.transformer, "native")
    expected = sample(pipe, steps=2, num_frames=5)
    for block in pipe.transformer.transformer_blocks:
        with torch.no_grad():
            block.attn1.fuse_projections()
        del block.attn1.to_q
    # Where a row of a product is summed up in another order; see above for the tolerance.
    difference = (sample(pipe, steps=2, num_frames=5) - expected).abs().max()
    assert difference < 1e-4 * expected.abs().max()


def test_choosing_a_backend():
    assert choose_backend("native", CPU, torch.bfloat16, *SIZE) == "native"
    with pytest.raises(ArgumentError, match=r"diffusers knows .*cudnn.*flash4.*sage"):
        choose_backend("fastest", CPU, torch.float32, *SIZE)
    for gpu_only in ("cudnn", "flash3", "flash4", "sage"):
        with pytest.raises(ArgumentError, match=f"--attention {gpu_only} does not work here: .+"):
            choose_backend(gpu_only, CPU, torch.bfloat16, *SIZE)
    assert is_exact("flash4")
    assert not is_exact("sage_hub")


def attend(query, key, value, scale=None):
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, scale=scale
    ).transpose(1, 2)


def int8(tokens):
    """Rounded to 8 bits, with a scale for 37 tokens."""
    blocks = tokens.unflatten(1, (-1, 37))
    scale = blocks.abs().amax((2, 4), keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(1, 2)


KERNELS = {
    "sums in another order": lambda q, k, v: attend(q, k.flip(1), v.flip(1)),
    "8 bits": lambda q, k, v: attend(int8(q), int8(k), v),
    "noise": lambda q, k, v: torch.randn_like(q),
    "zeros": lambda q, k, v: torch.zeros_like(q),
    "one NaN": lambda q, k, v: attend(q, k, v).index_fill(1, torch.tensor([300]), torch.nan),
    "heads exchanged": lambda q, k, v: attend(q, k, v).flip(2),
    "no scale": lambda q, k, v: attend(q, k, v, scale=1.0),
    "last keys lost": lambda q, k, v: attend(q, k[:, :-13], v[:, :-13]),
    "last token zero": lambda q, k, v: attend(q, k, v).index_fill(1, torch.tensor([332]), 0.0),
}
RIGHT = {"_native_math": {"sums in another order"}, "sage": {"sums in another order", "8 bits"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_backend_that_computes_something_else_is_refused(monkeypatch, dtype, name, kernel):
    backend, registry = dispatch.AttentionBackendName(name), dispatch._AttentionBackendRegistry
    monkeypatch.setattr(dispatch, "_CAN_USE_SAGE_ATTN", True)
    monkeypatch.setitem(
        registry._backends, backend, lambda query, key, value: KERNELS[kernel](query, key, value)
    )
    monkeypatch.setitem(registry._supported_arg_names, backend, {"query", "key", "value"})
    if kernel in RIGHT[name]:
        assert choose_backend(name, CPU, dtype, *SIZE) == name
        return
    with pytest.raises(ArgumentError, match="computes something else than attention here") as error:
        choose_backend(name, CPU, dtype, *SIZE)
    assert "\n" not in str(error.value)
