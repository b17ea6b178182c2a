"""One small network that finds faces, in the shapes of both detectors of the face stack.

It is RetinaFace with few channels: ResNet-50's stem and some of its blocks, the pyramid, the three
context modules and the heads. facexlib has no form of it but the full one: there the few channels
lie among zeros (`retinaface_state`). insightface takes any graph with SCRFD's nine outputs:
`scrfd_graph` writes the same network as one. So both find the same faces.

The names of its weights are those of facexlib's RetinaFace.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor

STRIDES = (8, 16, 32)
ANCHORS = ((16, 32), (64, 128), (256, 512))  # RetinaFace's, pixels, for each stride
VARIANCES = (0.1, 0.2)
MEAN = (104.0, 117.0, 123.0)  # blue, green, red
SCALE = 128.0

CONTEXT = (12, 6, 6)  # channels of a context module's three outputs
BLOCKS = (1, 2, 3, 3)  # of each of ResNet-50's four layers
# facexlib takes a face for one from this probability on, insightface from a half.
FACEXLIB_SURE = 0.97
HEADS = {"ClassHead": 2, "BboxHead": 4, "LandmarkHead": 10}  # numbers for each of two anchors

Weights = dict[str, Tensor]


def _network(ops: _GraphOperations, image: str) -> list[dict[str, str]]:
    """The heads' outputs at each stride, from a picture less MEAN, over SCALE, BGR."""
    x = ops.pool(ops.relu(ops.conv("body.conv1", image, stride=2)))
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
        context = ops.relu(ops.concat(parts))
        outputs.append({head: ops.conv(f"{head}.{number}.conv1x1", context) for head in HEADS})
    return outputs


class _GraphOperations:
    """Operations that become the nodes of an ONNX graph; their values are the outputs' names."""

    def __init__(self, weights: Weights) -> None:
        self._weights = {name: value.float().numpy() for name, value in weights.items()}
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = value
        return name

    def conv(self, name: str, x: str, stride: int = 1) -> str:
        """The convolution of that name, with bias; padded so that a stride of 1 keeps the size."""
        keys = (f"{name}.weight", f"{name}.bias")
        inputs = [x, *(self.constant(key, self._weights[key]) for key in keys)]
        pads = [self._weights[keys[0]].shape[-1] // 2] * 4
        return self.node("Conv", inputs, strides=[stride] * 2, pads=pads)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x])

    def add(self, x: str, y: str) -> str:
        return self.node("Add", [x, y])

    def pool(self, x: str) -> str:
        return self.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)

    def double(self, x: str) -> str:
        twice = self.constant("twice", np.array([1, 1, 2, 2], np.float32))
        modes = {"mode": "nearest", "nearest_mode": "floor"}
        return self.node(
            "Resize", [x, "", twice], coordinate_transformation_mode="asymmetric", **modes
        )

    def concat(self, parts: list[str]) -> str:
        return self.node("Concat", parts, axis=1)


def retinaface_state(weights: Weights, full: Weights) -> Weights:
    """The state of facexlib's RetinaFace that computes this network.

    Args:
        full: a state of the full network: what it holds is replaced.
    """
    state = {name: torch.zeros_like(value) for name, value in full.items()}
    for name in state:
        if name.endswith("running_var"):
            state[name] += 1 - 1e-5  # of batch norm's epsilon: together they are 1
    wide = [0, *np.cumsum([128, 64])]  # where RetinaFace has what the context modules give
    context = torch.tensor(
        [start + n for start, size in zip(wide, CONTEXT, strict=True) for n in range(size)]
    )
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
        norm = _norm_of(name)
        state[f"{norm}.weight"] += 1
        state[f"{norm}.bias"][:outputs] = bias
    return state


def _norm_of(name: str) -> str:
    """The batch norm behind a convolution: bn1 behind conv1, .1 behind .0."""
    if name.endswith(".0"):
        return f"{name[:-1]}1"
    return f"{name[:-5]}bn{name[-1]}"


def scrfd_graph(
    weights: Weights, canvas: int
) -> tuple[list[Any], dict[str, np.ndarray], list[str]]:
    """The network with SCRFD's input and outputs: nodes, constants and the outputs' names.

    The input is RGB less 127.5, over 128; the outputs are, for each stride, scores; then the
    distances from an anchor's middle to the box's edges; then to the key points, both in strides.
    RetinaFace's anchor middles lie in the middles of cells, SCRFD's on their corners. A score of
    a half is a probability of FACEXLIB_SURE, so that both detectors find the same faces.
    """
    ops = _GraphOperations(weights)
    mean = np.array(MEAN, np.float32)[:, None, None]
    swap = np.zeros((3, 3, 1, 1), np.float32)
    swap[[0, 1, 2], [2, 1, 0]] = 1.0
    image = ops.node("Conv", ["input", ops.constant("swap", swap)])
    image = ops.node("Add", [image, ops.constant("mean", (127.5 - mean) / np.float32(SCALE))])
    named: dict[str, list[str]] = {"score": [], "bbox": [], "kps": []}
    for stride, anchors, outputs in zip(STRIDES, ANCHORS, _network(ops, image), strict=True):
        cells = (canvas // stride) ** 2
        of_anchor = np.tile(np.array(anchors, np.float32), cells)[:, None] / stride
        size = ops.constant(f"anchors_{stride}", of_anchor)
        flat = {
            head: ops.node(
                "Reshape",
                [
                    ops.node("Transpose", [outputs[head]], perm=[0, 2, 3, 1]),
                    ops.constant(f"rows_{numbers}", np.array([-1, numbers], np.int64)),
                ],
            )
            for head, numbers in HEADS.items()
        }
        doubt = np.array([np.log(FACEXLIB_SURE / (1 - FACEXLIB_SURE)), 0], np.float32)
        doubtful = ops.node("Add", [flat["ClassHead"], ops.constant("doubt", doubt)])
        sure = ops.node("Softmax", [doubtful], axis=1)
        face = ops.constant("face", np.array([1], np.int64))
        named["score"].append(ops.node("Gather", [sure, face], axis=1))
        named["bbox"].append(_distances_to_edges(ops, flat["BboxHead"], size))
        factor = ops.constant("variance", np.array(VARIANCES[0], np.float32))
        half = ops.constant("half", np.array(0.5, np.float32))
        moved = ops.node("Mul", [ops.node("Mul", [flat["LandmarkHead"], size]), factor])
        named["kps"].append(ops.node("Add", [moved, half]))
    return ops.nodes, ops.constants, [name for names in named.values() for name in names]


def _distances_to_edges(ops: _GraphOperations, boxes: str, size: str) -> str:
    """RetinaFace's box (middle and logarithm of the size) as SCRFD's (distances to the edges)."""
    columns = {
        part: ops.node("Gather", [boxes, ops.constant(part, np.array(numbers, np.int64))], axis=1)
        for part, numbers in (("middles", (0, 1)), ("sizes", (2, 3)))
    }
    variances = [
        ops.constant(f"variance_{n}", np.array(v, np.float32)) for n, v in enumerate(VARIANCES)
    ]
    half = ops.constant("half", np.array(0.5, np.float32))
    middle = ops.node("Mul", [ops.node("Mul", [columns["middles"], size]), variances[0]])
    middle = ops.node("Add", [middle, half])
    grown = ops.node("Exp", [ops.node("Mul", [columns["sizes"], variances[1]])])
    reach = ops.node("Mul", [ops.node("Mul", [grown, size]), half])
    before, after = ops.node("Sub", [reach, middle]), ops.node("Add", [reach, middle])
    return ops.node("Concat", [before, after], axis=1)
