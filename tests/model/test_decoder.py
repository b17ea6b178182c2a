"""The decoder with less memory, against diffusers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from teacache.benchmark.random_weights import FULL_VAE
from teacache.sampling.decoder import use_lean_decoder

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiled", [False, True])
def test_it_equals_diffusers_bit_for_bit(narrow, dtype, tiled):
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
