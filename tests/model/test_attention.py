"""Attention through diffusers' dispatcher, against the processor that it replaces."""

from __future__ import annotations

import pytest
import torch
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
    use_attention(pipe.transformer, choose_backend("flex", CPU, torch.float32))
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
    assert choose_backend("native", CPU, torch.bfloat16) == "native"
    with pytest.raises(ArgumentError, match=r"diffusers knows .*cudnn.*sage"):
        choose_backend("fastest", CPU, torch.float32)
    for gpu_only in ("cudnn", "flash3", "sage"):
        with pytest.raises(ArgumentError, match=f"--attention {gpu_only} does not work here: .+"):
            choose_backend(gpu_only, CPU, torch.bfloat16)
    assert is_exact("_native_cudnn")
    assert not is_exact("sage_hub")
