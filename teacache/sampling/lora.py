"""LoRAs in the transformer's weights: read, checked against the checkpoint, and fused.

Fused they cost nothing at sampling, and whatever works on the weights works with them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.errors import CheckpointError, DeviceError, one_line
from teacache.base.quiet import no_progress_bars
from teacache.checkpoint.folder import weight_shapes

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline

USUAL_NAME = "pytorch_lora_weights.safetensors"
# As diffusers and peft write them: transformer.transformer_blocks.0.attn1.to_q.lora_A.weight
FACTOR = re.compile(r"transformer\.(?P<layer>.+)\.lora_(?P<which>[AB])\.weight")


def lora_file(source: str) -> Path:
    """The file of a LoRA, downloaded where it is not here.

    Raises:
        CheckpointError: where there is none.
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
    """See from the names and shapes in its file that a LoRA is one of this transformer.

    Raises:
        CheckpointError: where it is not. DeviceError: where a package is missing.
    """
    from safetensors import SafetensorError

    if importlib.util.find_spec("peft") is None:
        raise DeviceError("--lora needs the package peft: pip install peft==0.21.2")
    try:
        shapes = weight_shapes(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"--lora {source} is no safetensors file: {error}") from error
    layers: dict[str, tuple[int, ...]] = {}
    for file in sorted((checkpoint / "transformer").glob("*.safetensors")):
        layers |= weight_shapes(file)
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        found = FACTOR.fullmatch(name)
        if found is None:
            raise CheckpointError(
                f"--lora {source} holds {name}, and diffusers' LoRAs of this transformer hold "
                "transformer.LAYER.lora_A.weight and lora_B.weight alone"
            )
        factors.setdefault(found["layer"], {})[found["which"]] = shape
    if not factors:
        raise CheckpointError(f"--lora {source} holds no weights")
    for layer, pair in factors.items():
        weight = layers.get(f"{layer}.weight")
        if weight is None:
            raise CheckpointError(f"--lora {source}: the transformer has no layer {layer}")
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"--lora {source} lacks a half of {layer}")
        if (pair["B"][0], pair["A"][1]) != weight[:2] or pair["A"][0] != pair["B"][1]:
            raise CheckpointError(
                f"--lora {source} is of another size: {layer} is {list(weight)}, and its factors "
                f"are {list(pair['B'])} and {list(pair['A'])}"
            )


def fuse_loras(pipe: ConsisIDPipeline, loras: tuple[tuple[str, float], ...]) -> None:
    """Add LoRAs to the transformer's weights, which stay plain weights.

    Args:
        loras: the source of each, and how much of it is added.
    """
    for number, (source, scale) in enumerate(loras):
        path = lora_file(source)
        name = f"lora_{number}"
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
        pipe.fuse_lora(components=["transformer"], lora_scale=scale, adapter_names=[name])
        pipe.unload_lora_weights()
