"""Finds LoRAs, checks them against the checkpoint, and fuses them into the transformer's weights.

A fused LoRA adds no cost to sampling, and works with quantization, offloading and compilation.
"""

import importlib.util
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers import ConsisIDPipeline, ConsisIDTransformer3DModel
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open

from teacache.base.errors import CheckpointError, DeviceError
from teacache.base.files import is_lfs_pointer
from teacache.base.quiet import no_progress_bars
from teacache.checkpoint.download import hub_message
from teacache.checkpoint.find import cached_snapshot
from teacache.checkpoint.folder import read_json
from teacache.checkpoint.loading import reading

logger = logging.getLogger(__name__)

USUAL_NAME = "pytorch_lora_weights.safetensors"
PICKLED = (".bin", ".pt", ".pth")
# Before the names of layers in files of a diffusers pipeline, and of peft. Files of a diffusers
# model have nothing there.
OF_PIPELINE, OF_PEFT = "transformer.", "base_model.model."


# LAYER.lora_A.weight, [rank, inputs], LAYER.lora_B.weight, [outputs, rank], and what else peft has;
# and peft's configuration. Without one each alpha is the rank.
Lora = tuple[dict[str, torch.Tensor], dict[str, Any]]


def lora_file(source: str) -> Path:
    """The file of a LoRA, downloaded if `source` is a repository.

    Raises:
        CheckpointError: if there is no such file or repository, or several files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path / _file_in(source, [file.name for file in path.iterdir()])
    if path.is_file():
        return path
    if path.suffix in (".safetensors", *PICKLED) or source.count("/") != 1:
        raise CheckpointError(f"--lora {source}: there is no such file")
    from huggingface_hub import HfApi, hf_hub_download

    try:
        with no_progress_bars():
            info = HfApi().model_info(source, revision="main")
            name = _file_in(source, [file.rfilename for file in info.siblings or ()])
            return Path(hf_hub_download(source, name, revision=info.sha))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's, its HTTP client's, the system's
        if snapshot := cached_snapshot(source, whole=False):
            return snapshot / _file_in(source, [file.name for file in snapshot.iterdir()])
        raise CheckpointError(
            f"--lora {source} is no file here, and no repository of that name can be read: "
            f"{hub_message(error)[:200]}"
        ) from error


def _file_in(source: str, names: list[str]) -> str:
    """The name of the LoRA's file in a folder: the usual one, or the only one.

    Raises:
        CheckpointError: if there is none or several.
    """
    if USUAL_NAME in names:
        return USUAL_NAME
    names = sorted(name for name in names if "/" not in name and name[0] != ".")
    for endings in (".safetensors", PICKLED):
        files = [name for name in names if name.endswith(endings)]
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"--lora {source}: name one of its files: {', '.join(files)}")
    raise CheckpointError(f"--lora {source} holds no LoRA: there is no .safetensors file in it")


def read_lora(source: str, path: Path) -> Lora:
    """Read a LoRA of diffusers or peft, from safetensors or from pickled weights.

    Raises:
        CheckpointError: if it is damaged, holds more than weights, or its metadata cannot be read.
    """
    if is_lfs_pointer(path):
        raise CheckpointError(f"--lora {source} is a pointer: run `git lfs pull` in its folder")
    with reading(f"--lora {source}"):
        tensors, config = _content(path)
        weights = tensors.values() if isinstance(tensors, dict) else ()
        if not weights or not all(map(torch.is_tensor, weights)):
            raise ValueError("it holds no weights, or not only weights")
        if not isinstance(config, dict):
            raise ValueError("its lora_adapter_metadata is no JSON object")
        for name, tensor in tensors.items():
            if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
                raise ValueError(f"{name} has NaN, infinite or whole numbers")
        if any(name.startswith(OF_PEFT) for name in tensors):
            config = read_json(path.with_name("adapter_config.json"))
        factors = {n.removeprefix(OF_PIPELINE).removeprefix(OF_PEFT): t for n, t in tensors.items()}
        config = {name.removeprefix(OF_PIPELINE): value for name, value in config.items()}
        config = {name: value for name, value in config.items() if "." not in name}  # only its own
        return convert_unet_state_dict_to_peft(factors), config  # from names of older versions


def _content(path: Path) -> tuple[Any, Any]:
    """The tensors in a file, whatever its name is, and the configuration in its metadata."""
    with path.open("rb") as opened:
        if opened.read(2) == b"PK":  # as torch writes
            opened.seek(0)
            try:
                return torch.load(opened, map_location="cpu", weights_only=True), {}
            except pickle.UnpicklingError as error:
                raise ValueError("it holds more than weights, which might run code") from error
    with safe_open(path, framework="pt") as file:
        config = (file.metadata() or {}).get("lora_adapter_metadata") or "{}"
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(config)  # noqa: SIM118


def check_lora(source: str, path: Path, checkpoint: Path) -> None:
    """Check that a LoRA can be fused into this transformer, by doing it without values.

    Raises:
        CheckpointError: if it cannot. DeviceError: if the package peft is missing.
    """
    if importlib.util.find_spec("peft") is None:
        raise DeviceError("--lora needs the package peft: pip install peft==0.21.2")
    from peft import LoraConfig, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    factors, config = read_lora(source, path)
    known = LoraConfig.__dataclass_fields__
    if later := [name for name, value in config.items() if value and name not in known]:
        logger.warning("--lora %s: this peft ignores its %s", source, ", ".join(later))
    with reading(checkpoint / "transformer"), torch.device("meta"):
        size = read_json(checkpoint / "transformer" / "config.json")
        transformer = ConsisIDTransformer3DModel.from_config(size)
    layers = dict(transformer.named_modules())
    for name, factor in factors.items():
        if not hasattr(layers.get(name.rpartition(".lora_")[0]), "weight"):
            raise CheckpointError(
                f"--lora {source} is of another model or another tool: it holds {name}, "
                f"{list(factor.shape)}, and the transformer has no such layer"
            )
    with reading(f"--lora {source}"):
        without_values = {name: factor.to("meta") for name, factor in factors.items()}
        # PiSSA and others change the transformer's own weights first: without values that fails.
        _attach(transformer, (without_values, config), "lora", initialise=True)
        attached = get_peft_model_state_dict(transformer, adapter_name="lora")
        if differing := sorted(attached.keys() ^ factors.keys()):
            what = "is not used" if differing[0] in factors else "is missing"
            raise ValueError(f"{differing[0]} {what}")
        scales = [m.scaling["lora"] for m in transformer.modules() if isinstance(m, LoraLayer)]
        if not all(map(math.isfinite, scales)):
            raise ValueError("its alpha is NaN or infinite")
        transformer.fuse_lora(adapter_names=["lora"])


def fuse_loras(pipe: ConsisIDPipeline, loras: tuple[tuple[str, float], ...]) -> None:
    """Add LoRAs, each a source and a scale, to the transformer's weights, which stay plain tensors.

    Raises:
        CheckpointError: if the sum is too large for the transformer's dtype.
    """
    for number, (source, scale) in enumerate(loras):
        name, lora = f"lora_{number}", read_lora(source, lora_file(source))
        with reading(f"--lora {source}:{scale:g}"):
            _attach(pipe.transformer, lora, name)
            pipe.transformer.fuse_lora(scale, safe_fusing=True, adapter_names=[name])
            pipe.transformer.unload_lora()


def _attach(
    transformer: ConsisIDTransformer3DModel, lora: Lora, name: str, initialise: bool = False
) -> None:
    """Add the layers of a LoRA to the transformer's, before they are fused.

    initialise: do what the configuration says of new layers, before they get their values.
    """
    from peft import LoraConfig

    factors, config = lora
    known = {n: value for n, value in config.items() if n in LoraConfig.__dataclass_fields__}
    layers = sorted({factor.rpartition(".lora_")[0] for factor in factors})
    transformer.load_lora_adapter(
        dict(factors),
        prefix=None,
        adapter_name=name,
        metadata={**known, "target_modules": layers} if known else None,
        low_cpu_mem_usage=not initialise,
    )
