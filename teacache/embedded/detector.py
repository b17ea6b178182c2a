"""One small face detector in the formats of both detectors that ConsisID uses.

It is RetinaFace with few channels: the stem and some blocks of ResNet-50, the feature pyramid,
three context modules and the heads. facexlib can only run the full RetinaFace, so there the other
channels are zero (`retinaface_state`). insightface runs any ONNX graph with SCRFD's nine outputs
(`scrfd_graph`). So both detect the same faces.

The names of the weights are those of facexlib's RetinaFace.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor

STRIDES = (8, 16, 32)
ANCHORS = ((16, 32), (64, 128), (256, 512))  # RetinaFace's, in pixels, for each stride
VARIANCES = (0.1, 0.2)
MEAN = (104.0, 117.0, 123.0)  # blue, green, red
SCALE = 128.0

CONTEXT = (12, 6, 6)  # channels of the three outputs of a context module
CONTEXT_STARTS = (0, 128, 192)  # the places of these channels in the full RetinaFace
BLOCKS = (1, 2, 3, 3)  # in each of the four layers of ResNet-50
FACEXLIB_SURE = 0.97  # facexlib's lowest probability of a face; insightface's is a half
HEADS = {"ClassHead": 2, "BboxHead": 4, "LandmarkHead": 10}  # numbers for each of two anchors

Weights = dict[str, Tensor]


def _network(ops: _GraphOperations, image: str) -> list[dict[str, str]]:
    """The outputs of the heads at each stride. The image is BGR, (pixels - MEAN) / SCALE."""
    x = ops.relu(ops.conv("body.conv1", image, stride=2))
    x = ops.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    levels = []
    for layer, blocks in enumerate(BLOCKS, 1):
        for block in range(blocks):
            name, stride = f"body.layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            inner = ops.relu(ops.conv(f"{name}.conv1", x))
            inner = ops.relu(ops.conv(f"{name}.conv2", inner, stride))
            shortcut = ops.conv(f"{name}.downsample.0", x, stride) if block == 0 else x
            x = ops.relu(ops.add(ops.conv(f"{name}.conv3", inner), shortcut))
        levels.append(x)
    one, two, three = (
        ops.relu(ops.conv(f"fpn.output{number}.0", level))
        for number, level in enumerate(levels[1:], 1)
    )
    two = ops.relu(ops.conv("fpn.merge2.0", ops.add(two, ops.double(three))))
    one = ops.relu(ops.conv("fpn.merge1.0", ops.add(one, ops.double(two))))
    outputs = []
    for number, level in enumerate((one, two, three)):
        name = f"ssh{number + 1}"
        middle = ops.relu(ops.conv(f"{name}.conv5X5_1.0", level))
        wide = ops.relu(ops.conv(f"{name}.conv7X7_2.0", middle))
        parts = [
            ops.conv(f"{name}.conv3X3.0", level),
            ops.conv(f"{name}.conv5X5_2.0", middle),
            ops.conv(f"{name}.conv7x7_3.0", wide),
        ]
        context = ops.relu(ops.node("Concat", parts, axis=1))
        outputs.append({head: ops.conv(f"{head}.{number}.conv1x1", context) for head in HEADS})
    return outputs


class _GraphOperations:
    """Builds an ONNX graph. Each operation adds a node and returns the name of its output."""

    def __init__(self, weights: Weights) -> None:
        self._weights = {name: value.float().numpy() for name, value in weights.items()}
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        array = np.asarray(value)
        self.constants[name] = array.astype(np.float32) if array.dtype == np.float64 else array
        return name

    def conv(self, name: str, x: str, stride: int = 1) -> str:
        """A convolution with bias. The padding is that of a kernel that keeps the size."""
        keys = (f"{name}.weight", f"{name}.bias")
        inputs = [x, *(self.constant(key, self._weights[key]) for key in keys)]
        pads = [self._weights[keys[0]].shape[-1] // 2] * 4
        return self.node("Conv", inputs, strides=[stride] * 2, pads=pads)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x])

    def add(self, x: str, y: str) -> str:
        return self.node("Add", [x, y])

    def mul(self, x: str, y: str) -> str:
        return self.node("Mul", [x, y])

    def double(self, x: str) -> str:
        twice = self.constant("twice", [1.0, 1.0, 2.0, 2.0])
        modes = {"mode": "nearest", "nearest_mode": "floor"}
        return self.node(
            "Resize", [x, "", twice], coordinate_transformation_mode="asymmetric", **modes
        )


def retinaface_state(weights: Weights, full: Weights) -> Weights:
    """The state of facexlib's RetinaFace that computes this network, with the shapes of `full`."""
    state = {name: torch.zeros_like(value) for name, value in full.items()}
    for name, value in state.items():
        if name.endswith("running_var"):
            value += 1 - 1e-5  # batch norm adds its epsilon, 1e-5
    starts = zip(CONTEXT_STARTS, CONTEXT, strict=True)
    context = torch.cat([torch.arange(start, start + size) for start, size in starts])
    for name in dict.fromkeys(key.rpartition(".")[0] for key in weights):
        weight, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
        if name == "body.conv1":
            weight = weight / SCALE
        outputs, inputs = weight.shape[:2]
        if "Head" in name:
            state[f"{name}.weight"][:, context] = weight
            state[f"{name}.bias"][:] = bias
            continue
        state[f"{name}.weight"][:outputs, :inputs] = weight
        # The batch norm after the convolution: bn1 after conv1, .1 after .0.
        norm = f"{name[:-1]}1" if name.endswith(".0") else name.replace("conv", "bn")
        state[f"{norm}.weight"] += 1
        state[f"{norm}.bias"][:outputs] = bias
    return state


def scrfd_graph(
    weights: Weights, canvas: int
) -> tuple[list[Any], dict[str, np.ndarray], list[str]]:
    """The network with SCRFD's input and outputs: nodes, constants and names of outputs.

    The input is RGB, canvas x canvas, (pixels - 127.5) / 128. The outputs, each for all strides,
    are: scores; distances from the anchor's middle to the edges of the box; and to the key points;
    both in strides. RetinaFace's anchors are in the middle of a cell, SCRFD's at its corner. The
    score is a half where the probability is FACEXLIB_SURE, so that both detect the same faces.
    """
    ops = _GraphOperations(weights)
    mean = np.array(MEAN)[:, None, None]
    swap = np.eye(3)[::-1].reshape(3, 3, 1, 1)  # RGB to BGR
    image = ops.node("Conv", ["input", ops.constant("swap", swap)])
    image = ops.add(image, ops.constant("mean", (127.5 - mean) / SCALE))
    doubt = ops.constant("doubt", [np.log(FACEXLIB_SURE / (1 - FACEXLIB_SURE)), 0])
    face = ops.constant("face", [1])
    factor, half = ops.constant("variance", VARIANCES[0]), ops.constant("half", 0.5)
    scores, boxes, points = [], [], []
    for stride, anchors, outputs in zip(STRIDES, ANCHORS, _network(ops, image), strict=True):
        of_anchor = np.tile(anchors, (canvas // stride) ** 2)[:, None] / stride
        size = ops.constant(f"anchors_{stride}", of_anchor)
        flat = {}
        for head, numbers in HEADS.items():
            last = ops.node("Transpose", [outputs[head]], perm=[0, 2, 3, 1])
            shape = ops.constant(f"rows_{numbers}", [-1, numbers])
            flat[head] = ops.node("Reshape", [last, shape])
        sure = ops.node("Softmax", [ops.add(flat["ClassHead"], doubt)], axis=1)
        scores.append(ops.node("Gather", [sure, face], axis=1))
        boxes.append(_distances_to_edges(ops, flat["BboxHead"], size))
        points.append(ops.add(ops.mul(ops.mul(flat["LandmarkHead"], size), factor), half))
    return ops.nodes, ops.constants, [*scores, *boxes, *points]


def _distances_to_edges(ops: _GraphOperations, boxes: str, size: str) -> str:
    """SCRFD's boxes (distances to the edges) from RetinaFace's (middle and log of the size)."""
    columns = [
        ops.node("Gather", [boxes, ops.constant(name, numbers)], axis=1)
        for name, numbers in (("middles", [0, 1]), ("sizes", [2, 3]))
    ]
    variances = [ops.constant(f"variance_{n}", value) for n, value in enumerate(VARIANCES)]
    half = ops.constant("half", 0.5)
    middle = ops.add(ops.mul(ops.mul(columns[0], size), variances[0]), half)
    grown = ops.node("Exp", [ops.mul(columns[1], variances[1])])
    reach = ops.mul(ops.mul(grown, size), half)
    before, after = ops.node("Sub", [reach, middle]), ops.add(reach, middle)
    return ops.node("Concat", [before, after], axis=1)
