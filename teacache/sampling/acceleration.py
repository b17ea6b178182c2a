"""Faster computed steps: `--compile` and `--quantize`."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from teacache.base.errors import DeviceError, reason
from teacache.base.files import cache_folder

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX, ConsisIDTransformer3DModel

# The decoder's residual blocks have 14 combinations of width, size and previous frames, and each is
# a compilation. By default Dynamo stops after 8.
DECODER_FORMS = 64
# Loading the compiled decoder from disk costs about what compiled decoding saves in this many
# videos.
COMPILED_DECODER_PAYS_FROM = 8
COMPILER_SECONDS = 60  # an empty file takes 0.1 s


def prepare_acceleration(
    compiling: bool, quantize: str | None, offload: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Check the requirements of `--compile` and `--quantize`, and set Inductor's cache folder.

    Call it before diffusers is imported: that import fixes the folder.

    Raises:
        DeviceError: if the machine lacks something, or the flags conflict with `--offload`.
    """
    if (quantize and offload in ("sequential", "blocks")) or (
        compiling and offload == "sequential"
    ):
        flag = f"--quantize {quantize}" if quantize else "--compile"
        raise DeviceError(f"{flag} does not go with --offload {offload}: --offload model does")
    if compiling:
        check_compiler(device)
        # A reboot may clear Inductor's default folder.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    if quantize:
        check_float8(device, dtype)


def check_compiler(device: torch.device) -> None:
    """Raise DeviceError if there is no working compiler: C++ for a CPU, C for CUDA."""
    on_cpu = device.type == "cpu"
    variable, usual = ("CXX", ("g++", "clang++")) if on_cpu else ("CC", ("gcc", "clang"))
    named = shlex.split(os.environ.get(variable, ""))
    candidates = [named] if named else [[name] for name in usual]
    compiler = next((words for words in candidates if shutil.which(words[0])), None)
    if compiler is None:
        raise DeviceError(
            f"--compile needs a compiler, and finds none: install {usual[0]}, or name one in "
            f"{variable}"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise DeviceError(
            "--compile needs Python's headers, which most systems package as python3-dev: "
            f"there is no {header.name} in {header.parent}"
        )
    failure = _compiler_failure(compiler, ".cpp" if on_cpu else ".c")
    if failure:
        raise DeviceError(f"--compile: the compiler {compiler[0]} does not work: {failure}")


def _compiler_failure(compiler: list[str], suffix: str) -> str:
    """Compile an empty file to a shared library; return the reason if that fails, else ""."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / f"empty{suffix}", Path(folder) / "empty.so"
        source.touch()
        try:
            ended = subprocess.run(
                [*compiler, "-shared", "-fPIC", "-o", library, source],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=COMPILER_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"it takes more than {COMPILER_SECONDS} s for an empty file"
        except OSError as error:
            return reason(error)
        if ended.returncode == 0:
            return "" if library.is_file() else "it makes no file"
    lines = ended.stdout.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ends with code {ended.returncode} and does not say why"


def check_float8(device: torch.device, dtype: torch.dtype) -> None:
    """Run a float8 layer; raise DeviceError if it does not work."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        raise DeviceError("--quantize fp8 needs a GPU with float8 matrix units, Hopper or later")
    if importlib.util.find_spec("torchao") is None:
        raise DeviceError("--quantize fp8 needs the package torchao: pip install torchao==0.18.0")
    if dtype != torch.bfloat16:
        raise DeviceError("--quantize fp8 needs --dtype bfloat16")
    try:
        layer = torch.nn.Linear(64, 64, device=device, dtype=dtype)
        _to_float8(layer)
        layer(torch.randn(16, 64, device=device, dtype=dtype))
    except Exception as error:
        # torchao and the packages below it raise errors of many types.
        raise DeviceError(f"--quantize fp8 does not work here: {reason(error)}") from error


def compile_transformer(transformer: ConsisIDTransformer3DModel) -> None:
    """Compile the blocks and the identity cross-attention, each at its first call.

    All blocks share one compilation, and so do all cross-attention layers, because weights are
    inputs of the graph. TeaCache decides outside of these regions, so a new step, threshold or
    video needs no new compilation; another size or batch does. `core.forward.add_face` compiles
    the cross-attention together with the addition of its output.
    """
    for module in (*transformer.transformer_blocks, *transformer.perceiver_cross_attention):
        module.compile(fullgraph=True, dynamic=False)


def compile_decoder(vae: AutoencoderKLCogVideoX) -> None:
    """Compile the residual blocks of the VAE's decoder, each at its first call."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, DECODER_FORMS)
    for module in vae.decoder.modules():
        if isinstance(module, CogVideoXResnetBlock3D):
            module.compile(fullgraph=True, dynamic=False)


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether any module of the model is compiled."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def quantize_fp8(transformer: ConsisIDTransformer3DModel) -> None:
    """Convert the large linear layers of blocks and identity cross-attention to float8, in place.

    Weights are rounded once, with a scale for each row; activations at every call, with a scale for
    each token. Query, key and value are fused into one layer first, so that their input is rounded
    once instead of three times. The small layers stay: the modulations, the face's keys and values.
    """
    for block in transformer.transformer_blocks:
        with torch.no_grad():
            block.attn1.fuse_projections()
        del block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
        _to_float8(block.attn1)
        _to_float8(block.ff)
    for layer in transformer.perceiver_cross_attention:
        _to_float8(layer.to_q)
        _to_float8(layer.to_out)


def _to_float8(module: torch.nn.Module) -> None:
    """Convert a linear layer, or all linear layers within a module, to float8, in place."""
    from torchao import quantization

    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(),
        set_inductor_config=False,  # its settings belong to the whole process
    )
    quantization.quantize_(module, config)
