"""What the JSON files of a checkpoint may say, as far as that can be known without its models.

diffusers takes some of it unseen, and fails in the middle of a run, or builds for ever; some it
ignores, and makes another video than the checkpoint was trained for.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Collection
from pathlib import Path

from teacache.base.errors import CheckpointError

# The classes that sampling loads, whatever model_index.json says: another one is another model.
CLASSES = {
    "transformer": ("ConsisIDTransformer3DModel",),
    "vae": ("AutoencoderKLCogVideoX",),
    "scheduler": ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler"),
}
EVA_CLIP = "EVA02-CLIP-L-14-336"  # the model, and with .json its description in `face_encoder/`
# What both schedulers of diffusers 0.42.1 know.
SCHEDULER_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
}
# Of each model, the numbers of layers: the configuration's entry, what diffusers or transformers
# takes where there is none, and which weights are those of layer N.
LAYERS = {
    "transformer": (
        ("num_layers", 30, r"transformer_blocks\.(\d+)\."),
        ("LFE_depth", 10, r"local_facial_extractor\.layers\.(\d+)\."),
    ),
    "vae": (("layers_per_block", 3, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),),
    "text_encoder": (("num_layers", 6, r"encoder\.block\.(\d+)\."),),
}
# One after each `cross_attn_interval` blocks.
CROSS_ATTENTION = r"perceiver_cross_attention\.(\d+)\."
# With what else than a number above 0 in these, a model is built, and fails once it computes.
POSITIVE = {"transformer": ("local_face_scale", "norm_eps"), "vae": ("norm_eps", "scaling_factor")}
# Whose weights only a package of its own can read: `quant_method`, and what is imported for it.
QUANTIZERS = {
    "auto-round": "auto_round",
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "gguf": "gguf",
    "gptq": "optimum",
    "modelopt": "modelopt",
    "quanto": "optimum",
    "torchao": "torchao",
}


def check_classes(path: Path, index: dict) -> None:
    """Raise CheckpointError where a pipeline is made of other classes than sampling loads.

    Args:
        path: of its model_index.json, for the error; index: what that holds.
    """
    for name, known in CLASSES.items():
        entry = index.get(name)
        found = entry[-1] if isinstance(entry, list) and entry else entry
        if found not in known:
            raise CheckpointError(f"{path} names {found!r} as {name}, not {' or '.join(known)}")


def check_scheduler(path: Path) -> None:
    """Raise CheckpointError where a scheduler_config.json asks for what its class does not know."""
    config = read_json(path, "no scheduler")
    for name, known in SCHEDULER_CHOICES.items():
        if name in config and config[name] not in known:
            raise CheckpointError(f"{path}: {name} is {config[name]!r}, none of {', '.join(known)}")
    steps = whole_number(path, config, "num_train_timesteps", 1000)
    betas = config.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and len(betas) == steps):
        raise CheckpointError(f"{path}: trained_betas is no list of {steps} numbers")


def check_eva_clip(path: Path) -> None:
    """Raise CheckpointError where a file is there, and describes no EVA-CLIP."""
    if not path.is_file():
        return  # the package brings the usual one
    config = read_json(path, "no EVA-CLIP")
    if not all(isinstance(config.get(name), dict) for name in ("vision_cfg", "text_cfg")):
        raise CheckpointError(f"{path} describes no EVA-CLIP: it lacks vision_cfg or text_cfg")
    whole_number(path, config, "embed_dim", 0)


def check_model(component: Path, weights: Collection[str]) -> None:
    """Raise CheckpointError where a config.json describes another model than the weights are of.

    Args:
        component: the folder of transformer, VAE or text encoder.
        weights: their names.
    """
    path = component / "config.json"
    config = read_json(path, "no model")
    _check_quantization(path, config)
    expected = {}
    for name, default, pattern in LAYERS[component.name]:
        number = whole_number(path, config, name, default)
        expected[f"{name} is {number}"] = (number, pattern)
    if component.name == "transformer":
        for key in ("patch_size_t", "ofs_embed_dim"):
            if config.get(key) is not None:
                raise CheckpointError(
                    f"{path}: {key} is {config[key]!r}, as of a model on CogVideoX1.5, and "
                    "diffusers loads ConsisID on CogVideoX-5B alone"
                )
        interval, number = _cross_attention(path, config)
        expected[f"cross_attn_interval is {interval}"] = (number, CROSS_ATTENTION)
    for what, (number, pattern) in expected.items():
        found = {match[1] for match in map(re.compile(pattern).match, weights) if match}
        if len(found) != number:
            raise CheckpointError(
                f"{path}: {what}, which makes {number} layers, and the weights beside it have "
                f"{len(found)}"
            )
    for name in POSITIVE.get(component.name, ()):
        value = config.get(name, 1.0)
        if not _is_number(value) or not 0 < value < math.inf:
            raise CheckpointError(f"{path}: {name} is {value!r}, no number above 0")


def _cross_attention(path: Path, config: dict) -> tuple[int, int]:
    """After how many blocks there is an identity cross-attention, and how many there are."""
    if not config.get("is_train_face"):
        raise CheckpointError(f"{path}: is_train_face is not true: such a model takes no face")
    interval = whole_number(path, config, "cross_attn_interval", 2)
    blocks = whole_number(path, config, "num_layers", 30)
    if blocks % interval:  # diffusers would look for one more than it makes
        raise CheckpointError(
            f"{path}: cross_attn_interval is {interval}, which does not divide {blocks} layers"
        )
    return interval, blocks // interval


def _check_quantization(path: Path, config: dict) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    package = QUANTIZERS.get(method) if isinstance(method, str) else None
    if package and importlib.util.find_spec(package) is None:
        raise CheckpointError(f"{path}: quantized with {method}, whose package is not installed")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole_number(path: Path, config: dict, name: str, default: int, least: int = 1) -> int:
    """An entry of a configuration; JSON may write 4 as 4.0.

    Args:
        path: where the configuration comes from, for the error.

    Raises:
        CheckpointError: where it is no whole number, or less than `least`.
    """
    value = config.get(name, default)
    if not (_is_number(value) and least <= value < 2**31 and value == int(value)):
        raise CheckpointError(f"{path}: {name} is {value!r}, no whole number from {least} on")
    return int(value)


def read_json(path: Path, otherwise: str) -> dict:
    """What a JSON file of the checkpoint holds.

    Args:
        otherwise: what its folder is, where the file is missing.

    Raises:
        CheckpointError: where it is missing, or no JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {path.parent} is {otherwise}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return found
