"""The face models of the synthetic checkpoint, in the files that the upstream face stack reads.

Both detectors know one photograph, scikit-image's astronaut (NASA, public domain). SCRFD, which is
a small graph of ours, finds her face wherever it is in a picture. RetinaFace is the real network
on random weights: it takes everything for a face such as hers, every 32 pixels one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from teacache.base.quiet import import_eva_clip
from teacache.inputs.identity import EVA_CLIP

if TYPE_CHECKING:
    import torch
    from facexlib.parsing import BiSeNet

# In pixels of the 512x512 photograph: left, top, right, bottom; then both eyes, the nose, and both
# corners of the mouth, the picture's left one first.
FACE_BOX = (180, 70, 272, 180)
FACE_KPS = ((204, 101), (246, 103), (225, 126), (204, 140), (243, 141))

SCRFD_CANVAS = 640
CELL, CELLS = 8, 17  # pixels of the canvas in one cell; cells across the template of her face
ARCFACE_SIZE = 112
OPSET = 17
IR_VERSION = 8


def write_face_encoder(folder: Path, vit_dim: int) -> None:
    """Write every file that `prepare_face_models` of diffusers reads below `folder`.

    Args:
        vit_dim: width of the EVA-CLIP vision tower, which the transformer's `LFE_vit_dim` equals.
    """
    import torch
    from facexlib.parsing import BiSeNet, ParseNet

    models = folder / "models" / "antelopev2"
    models.mkdir(parents=True)
    torch.save(_retinaface(), folder / "detection_Resnet50_Final.pth")
    torch.save(_half(_keep_skin(BiSeNet(num_class=19))), folder / "parsing_bisenet.pth")
    parsenet = ParseNet(in_size=512, out_size=512, parsing_ch=19)
    torch.save(_half(parsenet.state_dict()), folder / "parsing_parsenet.pth")
    _write_eva_clip(folder, vit_dim)
    _write_scrfd(models / "scrfd_10g_bnkps.onnx")
    _write_arcface(models / "glintr100.onnx")


def _half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # Random weights lose nothing by it, and the folder is half as large; loading widens again.
    return {name: t.half() if t.is_floating_point() else t for name, t in state.items()}


def _retinaface() -> dict[str, torch.Tensor]:
    """RetinaFace that sees a face at every 256-pixel anchor of stride 32, and nowhere else.

    In her photograph the anchor at (240, 112) sees hers.
    """
    import torch
    from facexlib.detection.retinaface import RetinaFace

    model = RetinaFace(network_name="resnet50", device="cpu")
    anchor, size, variance = np.array([240.0, 112.0]), 256.0, (0.1, 0.2)
    # Boxes of 70 pixels every 32 overlap by less than non-maximum suppression removes.
    middle = (np.array(FACE_BOX[:2]) + FACE_BOX[2:]) / 2
    shift = (middle - anchor) / size / variance[0]
    box = [*shift, *[np.log(70 / size) / variance[1]] * 2]
    kps = (np.array(FACE_KPS) - anchor) / size / variance[0]
    with torch.no_grad():
        for head in (*model.ClassHead, *model.BboxHead, *model.LandmarkHead):
            head.conv1x1.weight.zero_()
            head.conv1x1.bias.zero_()
        for head in model.ClassHead:  # two anchors, each (background, face)
            head.conv1x1.bias.copy_(torch.tensor([5.0, -5.0, 5.0, -5.0]))
        model.ClassHead[2].conv1x1.bias[:2] = torch.tensor([-5.0, 5.0])
        model.BboxHead[2].conv1x1.bias[:4] = torch.tensor(box)
        model.LandmarkHead[2].conv1x1.bias[:10] = torch.tensor(kps.flatten())
    heads = ("ClassHead", "BboxHead", "LandmarkHead")
    state = model.state_dict()
    return {
        **_half({k: v for k, v in state.items() if not k.startswith(heads)}),
        **{k: v for k, v in state.items() if k.startswith(heads)},
    }


def _keep_skin(model: BiSeNet) -> dict[str, torch.Tensor]:
    """BiSeNet that calls nearly everything skin, class 1, so that the aligned face is kept."""
    import torch

    with torch.no_grad():
        weight = model.conv_out.conv_out.weight  # [classes, features, 1, 1]; features are >= 0
        weight[1] = weight.abs().max()
    return model.state_dict()


def _write_eva_clip(folder: Path, width: int) -> None:
    """An EVA-CLIP of the name that ConsisID loads, 24 layers as there, on a small width."""
    import torch

    consisid_eva_clip = import_eva_clip()
    config = consisid_eva_clip.get_model_config(EVA_CLIP)
    config["vision_cfg"].update(width=width, head_width=64, mlp_ratio=2.0)
    config["text_cfg"].update(width=64, heads=1, layers=1, vocab_size=1000)
    path = folder / f"{EVA_CLIP}.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    consisid_eva_clip.add_model_config(path)
    model = consisid_eva_clip.create_model(EVA_CLIP, force_custom_clip=True)
    torch.save(_half(model.state_dict()), folder / "EVA02_CLIP_L_336_psz14_s6B.pt")


def _astronaut_template() -> np.ndarray:
    """[1, 1, CELLS, CELLS]: her face in grey on SCRFD's canvas, zero mean and unit norm."""
    import cv2
    import skimage.data

    photograph = cv2.resize(skimage.data.astronaut(), (SCRFD_CANVAS, SCRFD_CANVAS))
    grey = photograph.astype(np.float32).mean(axis=2)
    pooled = grey.reshape(SCRFD_CANVAS // CELL, CELL, -1, CELL).mean(axis=(1, 3))
    column, row = ((centre / CELL).astype(int) - CELLS // 2 for centre in _face_centre())
    template = pooled[row : row + CELLS, column : column + CELLS]
    template = template - template.mean()
    return (template / np.linalg.norm(template))[None, None].astype(np.float32)


def _face_centre() -> np.ndarray:
    """(x, y) of the middle of the face, in pixels of SCRFD's canvas."""
    left, top, right, bottom = np.array(FACE_BOX) * SCRFD_CANVAS / 512
    return np.array([(left + right) / 2, (top + bottom) / 2])


def _write_scrfd(path: Path) -> None:
    """SCRFD's nine outputs, by normalised cross-correlation with the template, at stride 8."""
    from onnx import TensorProto, helper, numpy_helper

    outputs = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in (8, 16, 32)]
    widths = {"score": 1, "bbox": 4, "kps": 10}
    graph = helper.make_graph(
        # A graph's output must be computed: constants pass through unchanged.
        [*_correlation(), *(helper.make_node("Identity", [n], [f"{n}_out"]) for n in outputs)],
        "scrfd",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, *[SCRFD_CANVAS] * 2])],
        [
            helper.make_tensor_value_info(
                f"{name}_out", TensorProto.FLOAT, [None, widths[name.split("_")[0]]]
            )
            for name in outputs
        ],
        [numpy_helper.from_array(value, name) for name, value in _scrfd_constants().items()],
    )
    _save(graph, path)


def _correlation() -> list:
    """The nodes from `input` to `score_8`.

    With g the grey picture in cells of 8x8 pixels and T the template of n x n cells, zero mean and
    unit norm, the correlation at a cell is sum(T g) / (n std(g)), with std over the n x n cells
    around it; the score is a steep sigmoid that passes one half at 0.7.
    """
    from onnx import helper

    node = helper.make_node
    around = [CELLS // 2] * 4
    window = {"kernel_shape": [CELLS] * 2, "pads": around, "count_include_pad": 1}
    return [
        node("Conv", ["input", "grey"], ["g"], strides=[CELL, CELL]),
        node("Conv", ["g", "template"], ["match"], pads=around),
        node("AveragePool", ["g"], ["mean"], **window),
        node("Mul", ["g", "g"], ["g2"]),
        node("AveragePool", ["g2"], ["mean_g2"], **window),
        node("Mul", ["mean", "mean"], ["mean2"]),
        node("Sub", ["mean_g2", "mean2"], ["variance"]),
        node("Max", ["variance", "epsilon"], ["some_variance"]),
        node("Sqrt", ["some_variance"], ["std"]),
        node("Mul", ["std", "cells"], ["norm"]),
        node("Div", ["match", "norm"], ["correlation"]),
        node("Sub", ["correlation", "threshold"], ["above"]),
        node("Mul", ["above", "steepness"], ["logit"]),
        node("Sigmoid", ["logit"], ["score"]),
        node("Reshape", ["score", "column"], ["first_anchor"]),
        # Two anchors a cell: the second one never fires.
        node("Concat", ["first_anchor", "never"], ["anchors"], axis=1),
        node("Reshape", ["anchors", "interleave"], ["score_8"]),
    ]


def _scrfd_constants() -> dict[str, np.ndarray]:
    """The graph's constants: kernels, shapes, and a box and key points around whatever fires."""
    side = SCRFD_CANVAS // CELL
    constants = {
        "grey": np.full((1, 3, CELL, CELL), 1 / (3 * CELL * CELL), np.float32),
        "template": _astronaut_template(),
        "epsilon": np.array(1e-6, np.float32),
        "cells": np.array(CELLS, np.float32),
        "threshold": np.array(0.7, np.float32),
        "steepness": np.array(40.0, np.float32),
        "column": np.array([side * side, 1], np.int64),
        "interleave": np.array([-1, 1], np.int64),
        "never": np.zeros((side * side, 1), np.float32),
        "score_16": np.zeros((2 * (side // 2) ** 2, 1), np.float32),
        "score_32": np.zeros((2 * (side // 4) ** 2, 1), np.float32),
    }
    # Distances from the cell that fires, in strides.
    to_canvas = SCRFD_CANVAS / 512
    x, y = (_face_centre() / CELL).astype(int) * CELL
    left, top, right, bottom = np.array(FACE_BOX) * to_canvas
    box = np.array([x - left, y - top, right - x, bottom - y])
    kps = (np.array(FACE_KPS) * to_canvas - (x, y)).flatten()
    for stride in (8, 16, 32):
        count = 2 * (SCRFD_CANVAS // stride) ** 2
        constants[f"bbox_{stride}"] = np.tile(box / stride, (count, 1)).astype(np.float32)
        constants[f"kps_{stride}"] = np.tile(kps / stride, (count, 1)).astype(np.float32)
    return constants


def _write_arcface(path: Path) -> None:
    """ArcFace's interface, a 112x112 face to 512 numbers, by one random layer on its pixels."""
    import torch
    from onnx import TensorProto, helper, numpy_helper

    pooled = 16 * 16 * 3
    weight = torch.randn(pooled, 512).numpy() / np.sqrt(pooled)
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
    import onnx

    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
