"""Finds LoRAs, checks them against the checkpoint, and fuses them into the transformer's weights.

A fused LoRA adds no cost to sampling, and works with quantization, offloading and compilation.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from teacache.base.errors import CheckpointError, DeviceError, one_line
from teacache.base.quiet import no_progress_bars
from teacache.checkpoint.folder import weight_files, weight_shapes

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline

USUAL_NAME = "pytorch_lora_weights.safetensors"


def lora_file(source: str) -> Path:
    """The file of a LoRA, downloaded if `source` is a repository.

    Raises:
        CheckpointError: if there is no such file or repository.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = path / USUAL_NAME
    if path.is_file():
        return path
    if path.suffix == ".safetensors" or path.parent.is_dir() or source.count("/") != 1:
        raise CheckpointError(f"--lora {source}: there is no such file")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with no_progress_bars():
            return Path(hf_hub_download(source, USUAL_NAME))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"--lora {source} is no file here, and {USUAL_NAME} cannot be downloaded from a "
            f"repository of that name: {one_line(str(error))[:200]}"
        ) from error


def check_lora(source: str, path: Path, checkpoint: Path) -> None:
    """Check by names and shapes of its weights that a LoRA belongs to this transformer.

    A LoRA of diffusers holds transformer.LAYER.lora_A.weight, [rank, inputs], and lora_B.weight,
    [outputs, rank].

    Raises:
        CheckpointError: if it does not. DeviceError: if the package peft is missing.
    """
    if importlib.util.find_spec("peft") is None:
        raise DeviceError("--lora needs the package peft: pip install peft==0.21.2")
    try:
        factors = weight_shapes(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"--lora {source} is no safetensors file: {error}") from error
    layers: dict[str, tuple[int, ...]] = {}
    for file in weight_files(checkpoint / "transformer"):
        layers |= weight_shapes(file)
    if not factors:
        raise CheckpointError(f"--lora {source} holds no weights")
    for name, shape in factors.items():
        layer, _, which = name.removeprefix("transformer.").rpartition(".lora_")
        weight = layers.get(f"{layer}.weight", ())
        fits = {"A.weight": shape[1:] == weight[1:], "B.weight": shape[:1] == weight[:1]}
        if not weight or not fits.get(which):
            raise CheckpointError(
                f"--lora {source} is of another model: it holds {name}, {list(shape)}, and of that "
                f"layer the transformer has {list(weight)}"
            )


def fuse_loras(pipe: ConsisIDPipeline, loras: tuple[tuple[str, float], ...]) -> None:
    """Add LoRAs to the transformer's weights, which stay plain tensors.

    Args:
        loras: source and scale of each.
    """
    for number, (source, scale) in enumerate(loras):
        path = lora_file(source)
        name = f"lora_{number}"
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        pipe.fuse_lora(components=["transformer"], lora_scale=scale, adapter_names=[name])
        pipe.unload_lora_weights()
