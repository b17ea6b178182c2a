"""Checks a checkpoint folder, without loading a model or importing torch."""

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from teacache.base.errors import CheckpointError, reason
from teacache.base.files import is_lfs_pointer

# The files below `face_encoder/` that diffusers' face models read. They would download the first
# three, where one is missing, in the middle of a run.
FACE_FILES = (
    "detection_Resnet50_Final.pth",
    "parsing_bisenet.pth",
    "parsing_parsenet.pth",
    "EVA02_CLIP_L_336_psz14_s6B.pt",
    "models/antelopev2/glintr100.onnx",
    "models/antelopev2/scrfd_10g_bnkps.onnx",
)
MODELS = ("text_encoder", "transformer", "vae")
# The classes that sampling loads, whatever model_index.json has.
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


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless a folder has every file of a ConsisID that sampling reads.

    The libraries find other damage when they read the files, see
    `teacache.checkpoint.loading.reading`.
    """
    try:
        _check_files(folder)
        _check_models(folder)
    except (OSError, AttributeError, TypeError) as error:  # JSON of an unexpected form
        raise CheckpointError(f"{folder} cannot be read: {reason(error)}") from error


def _check_files(folder: Path) -> None:
    """Raise CheckpointError unless each file is there and, as far as one sees, whole."""
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json: it holds {_describe_content(folder)}"
        )
    if pointers := _lfs_pointers(folder):
        raise CheckpointError(
            f"{folder} was cloned without git-lfs: run `git lfs pull` in it. Pointers are in place "
            f"of {', '.join(pointers)}"
        )
    kind = read_json(folder / "model_index.json").get("_class_name")
    if kind != "ConsisIDPipeline":
        raise CheckpointError(f"{folder} holds a {kind}, not a ConsisIDPipeline")
    missing = lacking(folder)
    whole = [name for name in _needed(folder) if name not in missing]
    others = _other_weights(folder, missing)
    faults = {
        "missing or empty": missing,
        "cut short or damaged": [name for name in whole if not _is_whole(folder / name)],
        "of a variant, such as fp16, or pickled, and not read": others,
    }
    if listed := [f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names]:
        if others:
            listed.append("a variant is read once its index, or its one file, has the plain name")
        raise CheckpointError(f"{folder} is not whole, {'; '.join(listed)}")


def _check_models(folder: Path) -> None:
    """Raise CheckpointError where a model's kind is not that of ConsisID-preview's."""
    index = read_json(folder / "model_index.json")
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
            "and diffusers loads only ConsisID on CogVideoX-5B"
        )
    if not config.get("is_train_face"):
        raise CheckpointError(f"{path}: is_train_face is not true: such a model takes no face")


def lacking(folder: Path) -> list[str]:
    """The files for sampling that are missing or empty.

    The names of shards are known only where their index is there.
    """
    paths = {name: folder / name for name in _needed(folder)}
    return [name for name, path in paths.items() if not (path.is_file() and path.stat().st_size)]


def _lfs_pointers(folder: Path) -> list[str]:
    """The files to be read that are pointers. Weights that are not read may be, as of a variant."""
    weights = [path for name in MODELS for path in (folder / name).glob("*.safetensors")]
    read = [
        *(path for pattern in ("*.json", "*/*.json") for path in folder.glob(pattern)),
        folder / _tokenizer_file(folder),
        *(folder / "face_encoder").rglob("*"),
        *(path for path in weights if len(path.suffixes) == 1),
    ]
    return sorted({str(path.relative_to(folder)) for path in read if is_lfs_pointer(path)})


def _other_weights(folder: Path, missing: list[str]) -> list[str]:
    """The weights that are there for models whose own are missing: a variant's, or pickled ones."""
    needed = _needed(folder)
    models = {Path(name).parent.name for name in missing if Path(name).name != "config.json"}
    paths = [path for name in models.intersection(MODELS) for path in (folder / name).glob("*.*")]
    weights = [str(p.relative_to(folder)) for p in paths if p.suffix in (".safetensors", ".bin")]
    return sorted(name for name in weights if name not in needed)


def _tokenizer_file(folder: Path) -> str:
    """The tokenizer's file: of `save_pretrained`, which transformers prefers, or the original."""
    saved = "tokenizer/tokenizer.json"
    return saved if (folder / saved).is_file() else "tokenizer/spiece.model"


def _needed(folder: Path) -> list[str]:
    """The files that sampling reads, as paths below the checkpoint."""
    models = [folder / name for name in MODELS]
    weights = [str(path.relative_to(folder)) for model in models for path in weight_files(model)]
    return [
        "model_index.json",
        "scheduler/scheduler_config.json",
        _tokenizer_file(folder),
        *(f"face_encoder/{name}" for name in FACE_FILES),
        *(f"{model.name}/config.json" for model in models),
        *weights,
    ]


def _is_whole(path: Path) -> bool:
    """Whether a file has all of its content, where its format shows that without reading it all.

    Raises:
        OSError: where the file cannot be opened.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if path.suffix in (".pth", ".pt") and start == b"PK":
        return zipfile.is_zipfile(path)
    try:
        if path.suffix == ".json":
            read_json(path)
        return path.suffix != ".safetensors" or bool(weight_shapes(path))
    except (CheckpointError, SafetensorError):
        return False


def _describe_content(folder: Path) -> str:
    """The content, in a few words, of a folder that is not a pipeline."""
    names = {path.name for path in folder.iterdir()}
    if "snapshots" in names:
        return "a repository of the hub's cache: name one of its snapshots, or owner/name"
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
    """Whether the weights are too large to sample on a CPU in reasonable time."""
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    return sum(path.stat().st_size for path in files) > 4 * 2**30  # ConsisID-preview has 23 GB


def weight_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors in a safetensors file."""
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of a model: the shards in its index, or a single file."""
    for index in component.glob("*.safetensors.index.json"):
        shards = set(read_json(index).get("weight_map", {}).values())
        return [component / shard for shard in sorted(shards)]
    single = "model" if component.name == "text_encoder" else "diffusion_pytorch_model"
    return [component / f"{single}.safetensors"]


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of a checkpoint.

    Raises:
        CheckpointError: where it cannot be read.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    return content
