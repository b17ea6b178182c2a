"""Writes the face models of the embedded checkpoint, in the formats of facexlib and insightface.

Both detectors are one small trained network (`detector`). The others are random, from seeds: the
outputs of recogniser and EVA-CLIP depend on the pixels, and the parser labels nearly all of them
skin.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import torch
from facexlib.detection.retinaface import RetinaFace
from facexlib.parsing import BiSeNet, ParseNet
from onnx import TensorProto, helper, numpy_helper

from teacache.base.quiet import import_eva_clip
from teacache.embedded.configuration import SEED, fill
from teacache.embedded.detector import Weights, retinaface_state, scrfd_graph
from teacache.inputs.identity import EVA_CLIP

SCRFD_CANVAS = 640
ARCFACE_SIZE = 112
OPSET = 17
IR_VERSION = 8


def write_face_encoder(folder: Path, vit_dim: int, detector: Weights) -> None:
    """Write every file that `prepare_face_models` of diffusers reads below `folder`.

    vit_dim: width of EVA-CLIP's vision tower. detector: weights of the trained network.
    """
    models = folder / "models" / "antelopev2"
    models.mkdir(parents=True)
    full = RetinaFace(network_name="resnet50", device="cpu").state_dict()
    _save_half(retinaface_state(detector, full), folder / "detection_Resnet50_Final.pth")
    bisenet = BiSeNet(num_class=19)
    fill(bisenet, SEED)
    with torch.no_grad():  # label nearly everything skin, class 1: other classes are masked
        weight = bisenet.conv_out.conv_out.weight  # [classes, features, 1, 1]; features are >= 0
        weight[1] = weight.abs().max()
    _save_half(bisenet.state_dict(), folder / "parsing_bisenet.pth")
    parsenet = ParseNet(in_size=512, out_size=512, parsing_ch=19)
    fill(parsenet, SEED)
    _save_half(parsenet.state_dict(), folder / "parsing_parsenet.pth")
    write_eva_clip(folder, vit_dim)
    _write_scrfd(models / "scrfd_10g_bnkps.onnx", detector)
    _write_arcface(models / "glintr100.onnx")


def _save_half(state: Weights, path: Path) -> None:
    """Save in half precision, for half the size: loading converts to float32 again."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    torch.save(half, path)


def write_eva_clip(folder: Path, width: int) -> None:
    """Write the EVA-CLIP that ConsisID loads, with 24 layers but a small width."""
    consisid_eva_clip = import_eva_clip()
    config = consisid_eva_clip.get_model_config(EVA_CLIP)
    config["vision_cfg"].update(width=width, head_width=64, mlp_ratio=2.0)
    config["text_cfg"].update(width=64, heads=1, layers=1, vocab_size=1000)
    path = folder / f"{EVA_CLIP}.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    consisid_eva_clip.add_model_config(path)
    model = consisid_eva_clip.create_model(EVA_CLIP, force_custom_clip=True)
    fill(model.visual, SEED)
    fill(model.text, SEED)
    _save_half(model.state_dict(), folder / "EVA02_CLIP_L_336_psz14_s6B.pt")


def _write_scrfd(path: Path, detector: Weights) -> None:
    nodes, constants, names = scrfd_graph(detector, SCRFD_CANVAS)
    widths = np.repeat([1, 4, 10], 3).tolist()
    outputs = [_tensor(name, None, width) for name, width in zip(names, widths, strict=True)]
    inputs = [_tensor("input", 1, 3, SCRFD_CANVAS, SCRFD_CANVAS)]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    _save(helper.make_graph(nodes, "scrfd", inputs, outputs, initializers), path)


def _write_arcface(path: Path) -> None:
    """Write a model with ArcFace's interface: 512 numbers of a 112x112 face, by a random layer."""
    pooled = 16 * 16 * 3
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(pooled, 512, generator=generator).numpy() / np.sqrt(pooled)
    pool = {"kernel_shape": [7, 7], "strides": [7, 7]}
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], **pool),
        helper.make_node("Flatten", ["pooled"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "weight"], ["embedding"]),
    ]
    inputs = [_tensor("input", None, 3, ARCFACE_SIZE, ARCFACE_SIZE)]
    outputs = [_tensor("embedding", None, 512)]
    initializers = [numpy_helper.from_array(weight.astype(np.float32), "weight")]
    _save(helper.make_graph(nodes, "arcface", inputs, outputs, initializers), path)


def _tensor(name: str, *shape: int | None) -> object:
    """The description of a float tensor; None stands for any length."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _save(graph: object, path: Path) -> None:
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, path)
