"""Transformer blocks and decoder with less memory, against diffusers' own."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from teacache.benchmark.random_weights import FULL_VAE
from teacache.sampling.attention import use_attention
from teacache.sampling.blocks import LeanBlock, use_lean_blocks
from teacache.sampling.decoder import use_lean_decoder

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_equals_diffusers_bit_for_bit(pipe, dtype):
    torch.manual_seed(0)
    # Both copied: weights at addresses of another alignment are summed up in another order.
    plain, ours = (copy.deepcopy(pipe.transformer).to(dtype) for _ in range(2))
    use_attention(ours, "native")
    use_lean_blocks(ours)
    theirs, mine = (each.transformer_blocks[0] for each in (plain, ours))
    assert type(mine) is LeanBlock
    assert isinstance(theirs.attn1.processor, CogVideoXAttnProcessor2_0)
    inner, embedding = theirs.norm1.linear.out_features // 6, theirs.norm1.linear.in_features
    head_dim = inner // theirs.attn1.heads
    for batch, video, text in ((1, 4, 3), (3, 31, 1), (2, 300, 32)):
        inputs = {
            "hidden_states": torch.randn(batch, video, inner, dtype=dtype),
            "encoder_hidden_states": torch.randn(batch, text, inner, dtype=dtype),
            "temb": torch.randn(batch, embedding, dtype=dtype),
        }
        before = copy.deepcopy(inputs)
        angles = torch.rand(video, head_dim // 2).repeat_interleave(2, dim=1) * 7
        for rotary in (None, (angles.cos(), angles.sin())):
            with torch.no_grad():
                expected = theirs(**inputs, image_rotary_emb=rotary)
                found = mine(**inputs, image_rotary_emb=rotary)
            assert all(map(torch.equal, found, expected))
            assert all(torch.equal(inputs[name], before[name]) for name in inputs)


# The real decoder's four levels, kernels and compression in time, a sixteenth as wide.
NARROW = {**FULL_VAE, "block_out_channels": (8, 16, 16, 32), "norm_num_groups": 4}
NARROW |= {"layers_per_block": 1, "sample_height": 64, "sample_width": 96}


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(**NARROW).eval()


def decode(vae, latents):
    with torch.no_grad():
        return vae.decode(latents).sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiled", [False, True])
def test_the_decoder_equals_diffusers_bit_for_bit(narrow, dtype, tiled):
    # Both copied: weights at addresses of another alignment are summed up in another order.
    plain, lean = (copy.deepcopy(narrow).to(dtype) for _ in range(2))
    use_lean_decoder(lean)
    if tiled:
        plain.enable_tiling()
        lean.enable_tiling()
    # One frame; an even and an odd number of them; square and not; sizes that tiles cut unevenly.
    for frames, height, width in ((1, 9, 14), (2, 4, 6), (5, 5, 9)):
        latents = torch.randn(1, 16, frames, height, width).to(dtype)
        assert torch.equal(decode(lean, latents), decode(plain, latents)), (frames, height, width)
