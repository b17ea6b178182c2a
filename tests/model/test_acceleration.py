"""Compiled regions and float8 layers: what they compute, and how often they are compiled."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from support import CPU, main, refused
from torch._dynamo.utils import counters

from teacache.base.errors import DeviceError
from teacache.core.forward import apply_teacache
from teacache.embedded.build import VAE
from teacache.sampling import acceleration
from teacache.sampling.attention import use_attention
from teacache.sampling.blocks import use_lean_blocks
from teacache.sampling.decoder import use_lean_decoder

HEADER = Path(sysconfig.get_paths()["include"]) / "Python.h"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not HEADER.is_file(),
    reason="Inductor compiles C++ on a CPU, against Python's headers",
)

# Inductor's kernels sum up in another order than eager ones, in float32, over a few steps.
ROUNDING = 1e-4


@pytest.fixture
def strict_dynamo():
    """Counts from zero, and an error where something is compiled that should not be."""
    torch._dynamo.reset()
    counters.clear()
    yield torch._dynamo.config
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


# All tests compile for the same shapes, of which one finds what another has compiled.
@pytest.fixture(scope="module")
def sample(sample):
    return lambda pipe, steps, **changed: sample(pipe, steps=steps, num_frames=5, **changed)


@needs_compiler
def test_one_compilation_serves_layers_steps_thresholds_and_videos(
    make_pipe, sample, strict_dynamo
):
    pipe, eager = make_pipe(), make_pipe()
    for each in (pipe, eager):
        use_attention(each.transformer, "native")
        use_lean_blocks(each.transformer)
    acceleration.compile_transformer(pipe.transformer)
    with apply_teacache(pipe, 0.0) as ours, apply_teacache(eager, 0.0) as theirs:
        sample(pipe, steps=2)
        strict_dynamo.error_on_recompile = True
        for threshold, steps, seed in ((0.0, 3, 42), (0.5, 9, 7)):
            ours.rel_l1_thresh = theirs.rel_l1_thresh = threshold
            found, expected = (sample(each, steps=steps, seed=seed) for each in (pipe, eager))
            assert (found - expected).abs().max() < ROUNDING * expected.abs().max()
            assert ours.schedule == theirs.schedule, "what is decided is not compiled"
    assert counters["stats"]["unique_graphs"] == 2, "a block and a cross-attention layer"
    assert not counters["graph_break"]


@needs_compiler
def test_the_decoder_in_regions(strict_dynamo):
    torch.manual_seed(0)
    level = {
        "block_out_channels": (16,),
        "down_block_types": ("CogVideoXDownBlock3D",),
        "up_block_types": ("CogVideoXUpBlock3D",),
    }
    vae = AutoencoderKLCogVideoX(**{**VAE, **level}).eval()
    latents = torch.randn(1, 16, 5, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        use_lean_decoder(vae)
        acceleration.compile_decoder(vae)
        assert acceleration.is_compiled(vae)
        first = vae.decode(latents).sample
        strict_dynamo.error_on_recompile = True
        again = vae.decode(latents).sample
    assert not counters["graph_break"]
    assert (first - expected).abs().max() < ROUNDING * expected.abs().max()
    assert torch.equal(again, first)


def test_float8_layers(make_pipe, sample, monkeypatch):
    """The real float8 layers; only torchao's question after the GPU is answered for it.

    A float8 of four exponent and three mantissa bits is off by up to 1/16 for each factor of a
    product; the tolerance on the latents, a tenth, is what such errors leave of two steps. Without
    guidance, which multiplies them by its factor.
    """
    monkeypatch.setattr(
        "torchao.quantization.quant_api._check_hardware_support", lambda granularity: None
    )
    plain, float8 = make_pipe(torch.bfloat16), make_pipe(torch.bfloat16)
    acceleration.quantize_fp8(float8.transformer)
    use_attention(float8.transformer, "native")
    dtypes = [
        layer.weight.qdata.dtype if hasattr(layer.weight, "qdata") else layer.weight.dtype
        for layer in float8.transformer.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    # Of each of 4 blocks: query, key and value in one, output, two of the feed-forward; of each
    # of 2 cross-attention layers: queries and output.
    assert dtypes.count(torch.float8_e4m3fn) == 4 * 4 + 2 * 2
    with apply_teacache(plain, 0.0), apply_teacache(float8, 0.0):
        expected, found = (
            sample(pipe, steps=2, guidance_scale=1.0).float() for pipe in (plain, float8)
        )
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_float8_is_tried_out_before_anything_is_loaded(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(DeviceError, match="Hopper or later"):
        acceleration.check_float8(gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(DeviceError, match="needs --dtype bfloat16"):
        acceleration.check_float8(gpu, torch.float16)
    with pytest.raises(DeviceError, match=r"does not work here: .+"):  # there is no GPU to try
        acceleration.check_float8(gpu, torch.bfloat16)


def test_what_a_machine_lacks_is_said_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for given, expected in (
        (("--compile",), "--compile needs a compiler, and finds none: install g++"),
        (("--quantize", "fp8"), "--quantize fp8 needs a GPU with float8 matrix units"),
        (("--attention", "cudnn"), "--attention cudnn does not work here"),
        (("--attention", "fast"), "--attention fast: diffusers knows aiter_fa2_hub, cudnn"),
    ):
        error = refused(capsys, "--ckpts_path", "tiny", *given, "--output_path", tmp_path)
        assert error.startswith(f"error: {expected}")
    for given in ({"compiling": True, "quantize": None}, {"compiling": False, "quantize": "fp8"}):
        with pytest.raises(DeviceError, match="does not go with --offload sequential"):
            acceleration.prepare_acceleration(
                **given, offload="sequential", device=CPU, dtype=torch.bfloat16
            )


@needs_compiler
def test_a_compiled_run(tmp_path, capsys):
    asked = ("--ckpts_path", "tiny", "--num_infer_steps", 1, "--num_frames", 5, "--compile")
    code, output, _ = main(capsys, *asked, "--output_path", tmp_path)
    assert code == 0
    assert output.index("loading") < output.index("compiling") < output.index("encoding")
    assert (tmp_path / "42_0.1_0000.mp4").is_file()
