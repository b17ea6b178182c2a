"""Finding and checking a checkpoint folder. Nothing here loads a model, or imports torch."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from teacache.base.errors import CheckpointError, reason

# What the face stack of diffusers reads below `face_encoder/`. What is missing of the first three
# it would fetch from the network, unasked, in the middle of a run.
FACE_FILES = (
    "detection_Resnet50_Final.pth",
    "parsing_bisenet.pth",
    "parsing_parsenet.pth",
    "EVA02_CLIP_L_336_psz14_s6B.pt",
    "models/antelopev2/glintr100.onnx",
    "models/antelopev2/scrfd_10g_bnkps.onnx",
)
MODELS = ("text_encoder", "transformer", "vae")
# The classes that sampling loads, whatever model_index.json names.
CLASSES = {
    "transformer": ("ConsisIDTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "scheduler": ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler"),
}
# The packages that read quantized weights, by `quant_method`.
QUANTIZERS = {
    **{name: name for name in ("awq", "bitsandbytes", "gguf", "modelopt", "torchao")},
    **dict.fromkeys(("gptq", "quanto"), "optimum"),
}
# Weights of more than this are not sampled with on a CPU by mistake. ConsisID-preview has 23 GB.
FULL_SIZE_BYTES = 4 * 2**30


def local_checkpoint(name: str) -> Path | None:
    """The folder that a name means, or None where it has to be downloaded first.

    Args:
        name: a folder, or a Hugging Face repository, `owner/name`.

    Raises:
        CheckpointError: where it is none of these.
    """
    folder = Path(name)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise CheckpointError(f"--ckpts_path {name[:80]}: {error.strerror}") from error
    if folder.exists():
        single = (
            " with weights" if folder.suffix in (".safetensors", ".ckpt", ".pt", ".bin") else ""
        )
        raise CheckpointError(
            f"--ckpts_path {name} is a single file{single}: a checkpoint is a folder with a "
            "model_index.json"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(("./", "../")):
        raise CheckpointError(
            f"--ckpts_path {name}: there is no such folder. "
            "Name one, or a Hugging Face repository as owner/name, or tiny"
        )
    return None


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless `folder` holds a whole ConsisID, with every file for sampling.

    What is wrong within its files the libraries say as they read them, see
    `teacache.checkpoint.loading.reading`.
    """
    try:
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(
                f"{folder} has no model_index.json: it holds {_what_instead(folder)}"
            )
        index = read_json(folder / "model_index.json")
        kind = index.get("_class_name")
        if kind != "ConsisIDPipeline":
            raise CheckpointError(f"{folder} holds a {kind}, not a ConsisIDPipeline")
        needed = _needed(folder)
        missing = [name for name in needed if _is_missing(folder / name)]
        short = [name for name in needed if name not in missing and not _is_whole(folder / name)]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {reason(error)}") from error
    if missing or short:
        complaints = [
            f"{what}: {', '.join(names)}"
            for what, names in (("missing or empty", missing), ("cut short or damaged", short))
            if names
        ]
        raise CheckpointError(f"{folder} is not whole, {'; '.join(complaints)}")
    _check_models(folder, index)


def _check_models(folder: Path, index: dict[str, Any]) -> None:
    """Raise CheckpointError where the models are of other kinds than those of ConsisID-preview.

    Args:
        index: what model_index.json holds.
    """
    for name, classes in CLASSES.items():
        kind = (index.get(name) or [None])[-1]
        if kind not in classes:
            path = folder / "model_index.json"
            raise CheckpointError(f"{path} names {kind} as {name}, not {' or '.join(classes)}")
    for name in MODELS:
        path = folder / name / "config.json"
        method = (read_json(path).get("quantization_config") or {}).get("quant_method")
        package = QUANTIZERS.get(str(method))
        if package and importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"{path}: quantized with {method}, and the package {package} is not installed"
            )
    path = folder / "transformer" / "config.json"
    config = read_json(path)
    if config.get("patch_size_t") is not None:
        raise CheckpointError(
            f"{path}: patch_size_t is {config['patch_size_t']}, as of a model on CogVideoX1.5, "
            "and diffusers loads ConsisID on CogVideoX-5B alone"
        )
    if not config.get("is_train_face"):
        raise CheckpointError(f"{path}: is_train_face is not true: such a model takes no face")


def lacking(folder: Path) -> list[str]:
    """The files that sampling reads and the folder does not have, or has empty.

    Of weights in shards, their names are known once their index is there.
    """
    return [name for name in _needed(folder) if _is_missing(folder / name)]


def _is_missing(path: Path) -> bool:
    return not path.is_file() or path.stat().st_size == 0


def _needed(folder: Path) -> list[str]:
    """All that sampling reads of a checkpoint, as paths below it."""
    models = [folder / name for name in MODELS]
    weights = [str(path.relative_to(folder)) for model in models for path in weight_files(model)]
    return [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/spiece.model",
        *(f"face_encoder/{name}" for name in FACE_FILES),
        *(f"{model.name}/config.json" for model in models),
        *weights,
    ]


def _is_whole(path: Path) -> bool:
    """Whether a file that is there has all of its content, as far as its kind lets that be seen."""
    return is_whole_safetensors(path) if path.suffix == ".safetensors" else _is_whole_archive(path)


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its safetensors header says, without reading the weights.

    Raises:
        OSError: where the system does not let it be read.
    """
    path.open("rb").close()  # the library calls a file missing that may not be read
    try:
        with safe_open(path, framework="np") as file:
            return bool(file.keys())
    except SafetensorError:
        return False


def _is_whole_archive(path: Path) -> bool:
    """Whether a file that torch has saved as a zip archive still has the end of one."""
    with path.open("rb") as file:
        is_archive = path.suffix in (".pth", ".pt") and file.read(2) == b"PK"
    return not is_archive or zipfile.is_zipfile(path)


def _what_instead(folder: Path) -> str:
    """What a folder that is no pipeline holds, in a few words."""
    names = {path.name for path in folder.iterdir()}
    if names & {"pytorch_lora_weights.safetensors", "adapter_config.json"}:
        return "a LoRA, which goes with a checkpoint"
    if "config.json" in names:
        kind = read_json(folder / "config.json").get("_class_name", "of transformers")
        return f"one model, {kind}, where a checkpoint has several"
    files = sorted(name for name in names if name.endswith((".safetensors", ".ckpt", ".pt")))
    if files:
        return f"single files such as {files[0]}, where a checkpoint has a folder for each model"
    return "nothing of a checkpoint" if names else "nothing"


def is_full_size(folder: Path) -> bool:
    """Whether the weights are of a size that nobody wants to sample with on a CPU by mistake."""
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    return sum(path.stat().st_size for path in files) > FULL_SIZE_BYTES


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file, without the weights."""
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of one model: its shards where there is an index, else the one file."""
    for index in component.glob("*.safetensors.index.json"):
        shards = set(read_json(index)["weight_map"].values())
        return [component / shard for shard in sorted(shards)]
    single = "model" if component.name == "text_encoder" else "diffusion_pytorch_model"
    return [component / f"{single}.safetensors"]


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file of a checkpoint holds.

    Raises:
        CheckpointError: where it cannot be read as one.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    return content
