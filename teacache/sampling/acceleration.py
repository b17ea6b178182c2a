"""Compiled regions and float8 layers: what makes a computed step cheaper, other than attention."""

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

# The decoder's residual blocks come in as many forms as it has widths and sizes, each with and
# without frames before it: 14 for the usual four levels. Dynamo gives up after 8 unless told.
DECODER_FORMS = 64
# Reading the decoder's compiled forms from disk costs as much as compiled decoding gains in
# about this many videos.
COMPILED_DECODER_PAYS_FROM = 8
# The first CUDA capability with matrix units for float8 of the kind that pays here: Hopper.
FLOAT8_CAPABILITY = (9, 0)
COMPILER_SECONDS = 60  # A compiler takes a tenth of one for an empty file.


def prepare_acceleration(
    compiling: bool, quantize: str | None, offload: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Check for what `--compile` and `--quantize` need, and have compilations kept for later runs.

    To be called before diffusers is imported: with it Inductor settles on its folder.

    Raises:
        DeviceError: where the machine lacks something, or the two do not go with `--offload`.
    """
    if offload == "sequential" and (compiling or quantize):
        option = "--compile" if compiling else f"--quantize {quantize}"
        raise DeviceError(
            f"{option} does not go with --offload sequential, which exchanges the weights under "
            "it: --offload model does"
        )
    if offload == "blocks" and quantize:
        raise DeviceError(
            f"--quantize {quantize} does not go with --offload blocks, which moves plain weights: "
            "--offload model does"
        )
    if compiling:
        check_compiler(device)
        # Where a reboot does not clear it, as it may Inductor's own choice.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    if quantize:
        check_float8(device, dtype)


def check_compiler(device: torch.device) -> None:
    """Raise DeviceError where no compiler works."""
    # Inductor's own on a CPU, Triton's on a GPU.
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
    failure = _what_fails(compiler, ".cpp" if on_cpu else ".c")
    if failure:
        raise DeviceError(f"--compile: the compiler {compiler[0]} does not work: {failure}")


def _what_fails(compiler: list[str], suffix: str) -> str:
    """Why a compiler makes no shared library of an empty source; "" where it makes one.

    Args:
        compiler: its name and the arguments that go with it.
    """
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
    """Raise DeviceError where float8 layers do not run, by running one."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        raise DeviceError("--quantize fp8 needs a GPU with float8 matrix units, Hopper or later")
    if importlib.util.find_spec("torchao") is None:
        raise DeviceError("--quantize fp8 needs the package torchao: pip install torchao==0.18.0")
    if dtype != torch.bfloat16:
        raise DeviceError("--quantize fp8 needs --dtype bfloat16, from which it rounds")
    try:
        layer = torch.nn.Linear(64, 64, device=device, dtype=dtype)
        _to_float8(layer)
        layer(torch.randn(16, 64, device=device, dtype=dtype))
    except Exception as error:
        # What torchao lacks, it asserts, and so do the packages below it, each in its own way.
        raise DeviceError(f"--quantize fp8 does not work here: {reason(error)}") from error


def compile_transformer(transformer: ConsisIDTransformer3DModel) -> None:
    """Compile the blocks and the identity cross-attention, each at its first call.

    Of the cross-attention it is `core.forward.add_face` that makes a region, the addition in it.
    All blocks share one compilation, and so do all cross-attention layers: weights are inputs of
    the graph. What TeaCache decides lies outside of them, so that neither step nor threshold nor
    video brings a new one; another size or batch does.
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
    """Whether regions of the model are compiled."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def quantize_fp8(transformer: ConsisIDTransformer3DModel) -> None:
    """Turn the blocks' and the identity cross-attention's wide linear layers to float8, in place.

    Weights are rounded once, a scale for each row, and activations at every call, a scale for each
    token. Query, key and value become one layer first, so that the tokens they share are rounded
    once instead of three times. What is left as it was works on a few numbers a step: the
    modulations, the face's keys and values.
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
    """Turn a linear layer, or all those within a module, to float8, in place."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        quantize_,
    )

    # Inductor's settings are for the whole process, and stay as they are.
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), set_inductor_config=False
    )
    quantize_(module, config)
