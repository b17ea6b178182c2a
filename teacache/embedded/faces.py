"""The face models of the embedded checkpoint, in the files that the upstream face stack reads.

Both detectors are one small network that was trained (`detector`). All else is random, from seeds:
the recogniser and EVA-CLIP tell faces apart by their pixels, the parser calls nearly everything
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

    Args:
        detector: weights of the trained network, see `detector`.
        vit_dim: width of the EVA-CLIP vision tower, which the transformer's `LFE_vit_dim` equals.
    """
    models = folder / "models" / "antelopev2"
    models.mkdir(parents=True)
    torch.save(_retinaface(detector), folder / "detection_Resnet50_Final.pth")
    bisenet = BiSeNet(num_class=19)
    fill(bisenet, SEED)
    torch.save(_half(_keep_skin(bisenet)), folder / "parsing_bisenet.pth")
    parsenet = ParseNet(in_size=512, out_size=512, parsing_ch=19)
    fill(parsenet, SEED)
    torch.save(_half(parsenet.state_dict()), folder / "parsing_parsenet.pth")
    _write_eva_clip(folder, vit_dim)
    _write_scrfd(models / "scrfd_10g_bnkps.onnx", detector)
    _write_arcface(models / "glintr100.onnx")


def _half(state: Weights) -> Weights:
    # Random weights lose nothing by it, and the folder is half as large; loading widens again.
    return {name: t.half() if t.is_floating_point() else t for name, t in state.items()}


def _retinaface(detector: Weights) -> Weights:
    full = RetinaFace(network_name="resnet50", device="cpu").state_dict()
    return _half(retinaface_state(detector, full))


def _keep_skin(model: BiSeNet) -> dict[str, torch.Tensor]:
    """BiSeNet that calls nearly everything skin, class 1, so that the aligned face is kept."""
    with torch.no_grad():
        weight = model.conv_out.conv_out.weight  # [classes, features, 1, 1]; features are >= 0
        weight[1] = weight.abs().max()
    return model.state_dict()


def _write_eva_clip(folder: Path, width: int) -> None:
    """An EVA-CLIP of the name that ConsisID loads, 24 layers as there, on a small width."""
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
    torch.save(_half(model.state_dict()), folder / "EVA02_CLIP_L_336_psz14_s6B.pt")


def _write_scrfd(path: Path, detector: Weights) -> None:
    nodes, constants, outputs = scrfd_graph(detector, SCRFD_CANVAS)
    graph = helper.make_graph(
        nodes,
        "scrfd",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, *[SCRFD_CANVAS] * 2])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
            for name, width in zip(outputs, np.repeat([1, 4, 10], 3).tolist(), strict=True)
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    _save(graph, path)


def _write_arcface(path: Path) -> None:
    """ArcFace's interface, a 112x112 face to 512 numbers, by one random layer on its pixels."""
    pooled = 16 * 16 * 3
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(pooled, 512, generator=generator).numpy() / np.sqrt(pooled)
    graph = helper.make_graph(
        [
            helper.make_node(
                "AveragePool", ["input"], ["pooled"], kernel_shape=[7, 7], strides=[7, 7]
            ),
            helper.make_node("Flatten", ["pooled"], ["pixels"]),
            helper.make_node("MatMul", ["pixels", "weight"], ["embedding"]),
        ],
        "arcface",
        [
            helper.make_tensor_value_info(
                "input", TensorProto.FLOAT, [None, 3, ARCFACE_SIZE, ARCFACE_SIZE]
            )
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [None, 512])],
        [numpy_helper.from_array(weight.astype(np.float32), "weight")],
    )
    _save(graph, path)


def _save(graph: object, path: Path) -> None:
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    onnx.save(model, path)
