"""The training of the small face detector, on scenes that are put together.

A scene is a cutting of a picture without faces, and on it some portraits, at any size, turned,
tinted, blurred. What the two detectors are for, a portrait photograph, and what they must refuse,
are held out: Grace Hopper, the cat and the cup of coffee.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacache.embedded import clips, portraits
from teacache.embedded.descent import Descent, mean_gradients
from teacache.embedded.detector import (
    ANCHORS,
    HEADS,
    MEAN,
    SCALE,
    STRIDES,
    VARIANCES,
    TorchOperations,
    network,
    untrained_weights,
)

SEED = 5
PARTS = 2
PHOTOGRAPH = 0.12  # of the scenes: the astronaut's whole, with what beside her is no face
SCENES = ((320, 6, 0.75), (640, 2, 0.25))  # side, scenes in a part, how often
BACKGROUNDS = (
    *("motorcycle_left.png", "motorcycle_right.png", "rocket.jpg", "retina.jpg", "ihc.png"),
    *("hubble_deep_field.jpg", "brick.png", "grass.png", "gravel.png"),
    *("text.png", "clock_motion.png", "cell.png", "moon.png", "horse.png"),
    *("color.png", "microaneurysms.png"),
)
# A face's box, in parts of the distance between the eyes: beside the eyes, above and below them.
BESIDE, ABOVE, BELOW = 0.57, 0.74, 1.88
FACE, NO_FACE = 0.4, 0.3  # overlap with a face's box, from which and up to which an anchor is one
NEGATIVES = 5  # for each anchor that is a face, the hardest


class Scene(NamedTuple):
    """picture: [side, side, 3], uint8 RGB; points: [faces, 5, 2], key points in pixels."""

    picture: np.ndarray
    points: np.ndarray


def train(folder: Path, steps: int, pool: ThreadPoolExecutor) -> dict[str, Tensor]:
    """Train the detector, or go on with it; its state is kept in `folder`."""
    named = untrained_weights(SEED)
    model = nn.ParameterDict({name.replace(".", "/"): value for name, value in named.items()})
    descent = Descent(
        "detector",
        model,
        lambda name, p: p.ndim == 4 and p.shape[-1] == 3,
        steps,
        folder,
        muon_rate=0.01,
        adam_rate=3e-3,
    )
    for step in descent.remaining():
        of_part = partial(_loss_of_part, model, step)
        descent.apply(*mean_gradients(pool, descent.parameters, of_part, PARTS))
    descent.take_mean()
    return {name.replace("/", "."): value.detach() for name, value in model.items()}


def _loss_of_part(model: nn.ParameterDict, step: int, part: int) -> tuple[Tensor, dict[str, float]]:
    size = np.random.default_rng([SEED, step]).random()  # the same for all parts
    side, count, _ = SCENES[size > SCENES[0][2]]
    rng = np.random.default_rng([SEED, step, part])
    return loss(model, [random_scene(rng, side) for _ in range(count)])


def loss(model: nn.ParameterDict, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
    """RetinaFace's loss: whether an anchor is a face, and for those that are, box and points."""
    weights = {name.replace("/", "."): value for name, value in model.items()}
    pictures = np.stack([scene.picture[..., ::-1] for scene in scenes]).astype(np.float32)
    inputs = torch.from_numpy((pictures - np.array(MEAN, np.float32)) / SCALE).permute(0, 3, 1, 2)
    levels = network(TorchOperations(weights), inputs.contiguous())
    batch = len(scenes)
    classes, boxes, points = (
        torch.cat([level[h].permute(0, 2, 3, 1).reshape(batch, -1, n) for level in levels], 1)
        for h, n in HEADS.items()
    )
    anchors = _anchors(inputs.shape[-1])
    told = [_targets(scene.points, anchors) for scene in scenes]
    is_face = torch.from_numpy(np.stack([one[0] for one in told]))  # 1, 0, and -1 between
    wanted = torch.from_numpy(np.stack([one[1] for one in told]))
    each = F.cross_entropy(
        classes.flatten(0, 1), is_face.clamp(min=0).flatten(), reduction="none"
    ).view(is_face.shape)
    faces = is_face == 1
    hardest = torch.where(is_face == 0, each.detach(), -1.0).flatten()
    count = min(max(NEGATIVES * int(faces.sum()), 30 * batch), int((is_face == 0).sum()))
    negative = each.flatten()[hardest.topk(count).indices]
    number = max(1, int(faces.sum()))
    sure = (each[faces].sum() + negative.sum()) / (number + count / NEGATIVES)
    total = sure
    figures = {"loss": sure.item()}
    if faces.any():
        places = torch.cat([boxes[faces], points[faces]], 1)
        placed = F.smooth_l1_loss(places, wanted[faces], reduction="none", beta=0.3)
        total = total + 2 * placed[:, :4].mean() + 2 * placed[:, 4:].mean()
        figures["loss"] = total.item()
    return total, figures


def random_scene(rng: np.random.Generator, side: int) -> Scene:
    """A scene of that many pixels across and down, with up to three faces."""
    if rng.random() < PHOTOGRAPH:
        return _photograph(rng, side)
    picture = _background(rng, side)
    points: list[np.ndarray] = []
    taken: list[np.ndarray] = []
    for _ in range(rng.choice([0, 1, 2, 3], p=[0.25, 0.5, 0.15, 0.1])):
        face, own = _random_face(rng)
        # Of the portrait; a face's box is about half as wide.
        size = np.exp(rng.uniform(np.log(44), np.log(1.4 * side)))
        if side > SCENES[0][0]:
            size = max(size, 300.0)
        turn = np.radians(rng.normal(0, 8))
        scale = size / len(face)
        rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        middle = rng.uniform(0.15 * side, 0.85 * side, 2)
        shift = middle - rotation @ np.array([len(face) / 2] * 2)
        moved = own @ rotation.T + shift
        box = _box(moved)
        if any(_overlap(box[None], other[None])[0, 0] > 0.02 for other in taken):
            continue
        if moved.min() < 0 or moved.max() > side - 1:
            continue
        _paste(picture, face, np.hstack([rotation, shift[:, None]]), rng)
        points.append(moved)
        taken.append(box)
    return Scene(_photographed(picture, rng), np.array(points, np.float32).reshape(-1, 5, 2))


def _photograph(rng: np.random.Generator, side: int) -> Scene:
    """The default image, enlarged or not, its face somewhere; its edges go on where it ends."""
    picture = portraits.texture("astronaut.png").astype(np.float32)
    points = np.array(portraits.ASTRONAUT, np.float32)
    if rng.random() < 0.5:
        picture = picture[:, ::-1]
        points = np.stack([picture.shape[1] - 1 - points[:, 0], points[:, 1]], 1)[[1, 0, 2, 4, 3]]
    scale = np.exp(rng.uniform(np.log(0.3), np.log(side / 250)))
    box = scale * _box(points)
    low, high = -box[:2], side - box[2:]
    shift = rng.uniform(low, high)
    if scale < 0.7:
        picture = cv2.GaussianBlur(picture, (0, 0), 0.4 / scale)
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    picture = cv2.warpAffine(
        np.ascontiguousarray(picture), matrix, (side, side), borderMode=cv2.BORDER_REPLICATE
    )
    return Scene(_photographed(picture, rng), (scale * points + shift)[None].astype(np.float32))


def _random_face(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A portrait, [side, side, 3], and its five points in pixels."""
    kind = rng.random()
    if kind < 0.3:
        face = portraits.drawn(rng)
    elif kind < 0.75:
        trained = [n for n in range(portraits.LFW_FACES) if n not in portraits.LFW_HELD_OUT]
        face = portraits.small_face(int(rng.choice(trained)), rng)
    else:
        face = portraits.astronaut()
    points = portraits.ALIGNED * portraits.SIDE
    face = _disguised(face.astype(np.float32), rng)
    if rng.random() < 0.5:
        face = np.ascontiguousarray(face[:, ::-1])
        points = np.stack([portraits.SIDE - points[:, 0], points[:, 1]], 1)[[1, 0, 2, 4, 3]]
    if rng.random() < 0.3:
        face = np.repeat(face.mean(axis=2, keepdims=True), 3, axis=2)
    return face, points


def _disguised(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With a hat, glasses, marks on the skin, or none: there are few faces to learn from."""
    side = len(face)
    eyes = portraits.ALIGNED[:2] * side
    if rng.random() < 0.25:
        brim = int(eyes[0, 1] - rng.uniform(0.08, 0.2) * side)
        left, right = (int(side * edge) for edge in (rng.uniform(0, 0.2), rng.uniform(0.8, 1)))
        colour = rng.uniform(0, 255, 3).tolist()
        cv2.rectangle(face, (left, 0), (right, brim), colour, -1)
        colour = rng.uniform(0, 255, 3).tolist()
        cv2.rectangle(face, (left, brim - int(rng.integers(3, 16))), (right, brim), colour, -1)
    if rng.random() < 0.25:
        colour, thick = rng.uniform(0, 160, 3).tolist(), int(rng.integers(1, 4))
        size = (rng.uniform(0.09, 0.12) * side, rng.uniform(0.06, 0.1) * side)
        for eye in eyes:
            middle, reach = eye.astype(int).tolist(), [int(part) for part in size]
            cv2.ellipse(face, middle, reach, 0, 0, 360, colour, thick, cv2.LINE_AA)
    if rng.random() < 0.5:
        source = portraits.texture(BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
        part = int(rng.integers(40, min(source.shape[:2])))
        top, left = (int(rng.integers(length - part + 1)) for length in source.shape[:2])
        marks = cv2.resize(source[top : top + part, left : left + part], (side, side))
        marks = marks.astype(np.float32).mean(axis=2, keepdims=True)
        face = face + rng.uniform(0.1, 0.5) * (marks - marks.mean())
    return np.clip(face, 0, 255)


def _paste(
    picture: np.ndarray, face: np.ndarray, matrix: np.ndarray, rng: np.random.Generator
) -> None:
    """Lay a portrait into the picture, whole or its oval alone, with a soft edge."""
    side = len(face)
    opacity = np.zeros((side, side), np.float32)
    opacity[4:-4, 4:-4] = 1
    opacity = cv2.GaussianBlur(opacity, (0, 0), 3) if rng.random() < 0.5 else clips.oval()
    layer = np.dstack([face.astype(np.float32), opacity])
    small = float(np.linalg.norm(matrix[:, 0]))
    if small < 0.7:  # as a camera does: no finer than a pixel
        layer = cv2.GaussianBlur(layer, (0, 0), 0.4 / small)
    moved = cv2.warpAffine(layer, matrix, picture.shape[1::-1], flags=cv2.INTER_LINEAR)
    share = moved[..., 3:]
    picture[:] = picture * (1 - share) + moved[..., :3] * share


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3], float32: a cutting, a gradient, and small pictures without faces on it."""
    if rng.random() < 0.7:
        source = portraits.texture(BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
        height, width = source.shape[:2]
        part = int(rng.integers(min(height, width) // 4, min(height, width) + 1))
        top, left = rng.integers(height - part + 1), rng.integers(width - part + 1)
        picture = cv2.resize(source[top : top + part, left : left + part], (side, side))
    else:
        picture = portraits.backdrop(rng, side)
    picture = picture.astype(np.float32)
    for _ in range(rng.integers(3)):
        number = int(rng.integers(portraits.LFW_FACES, 2 * portraits.LFW_FACES))
        other = portraits.small_face(number, rng)
        size = np.exp(rng.uniform(np.log(64), np.log(side))) / portraits.SIDE
        shift = rng.uniform(-0.1 * side, 0.9 * side, 2)
        _paste(picture, other, np.array([[size, 0, shift[0]], [0, size, shift[1]]]), rng)
    return picture


def _photographed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same in other light, out of focus at times, with noise."""
    picture = (picture - 128) * rng.uniform(0.6, 1.3) + 128 + rng.uniform(-30, 30)
    picture = picture * rng.uniform(0.85, 1.15, 3)
    if rng.random() < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 2.5))
    picture = picture + rng.normal(0, rng.uniform(0, 6), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _anchors(side: int) -> np.ndarray:
    """[anchors, 3]: the middle, in pixels, and the size, in RetinaFace's order."""
    levels = []
    for stride, sizes in zip(STRIDES, ANCHORS, strict=True):
        places = (np.arange(-(-side // stride)) + 0.5) * stride
        y, x = np.meshgrid(places, places, indexing="ij")
        for_each = [np.stack([x, y, np.full_like(x, size)], -1) for size in sizes]
        levels.append(np.stack(for_each, 2).reshape(-1, 3))
    return np.concatenate(levels)


def _targets(points: np.ndarray, anchors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each anchor whether it is a face (1, 0, or -1 for neither), [anchors]; and what the
    heads should say of box and points, [anchors, 14], float32."""
    is_face = np.zeros(len(anchors), np.int64)
    wanted = np.zeros((len(anchors), 14), np.float32)
    if not len(points):
        return is_face, wanted
    boxes = np.stack([_box(own) for own in points])
    middle, size = anchors[:, :2], anchors[:, 2:]
    overlap = _overlap(np.hstack([middle - size / 2, middle + size / 2]), boxes)
    best = overlap.argmax(1)
    is_face[overlap.max(1) > NO_FACE] = -1
    is_face[overlap.max(1) > FACE] = 1
    nearest = overlap.argmax(0)
    is_face[nearest], best[nearest] = 1, np.arange(len(boxes))
    box = boxes[best]
    wanted[:, :2] = ((box[:, :2] + box[:, 2:]) / 2 - middle) / size / VARIANCES[0]
    wanted[:, 2:4] = np.log((box[:, 2:] - box[:, :2]) / size) / VARIANCES[1]
    from_middle = (points[best] - middle[:, None]) / size[:, None] / VARIANCES[0]
    wanted[:, 4:] = from_middle.reshape(-1, 10)
    return is_face, wanted


def _box(points: np.ndarray) -> np.ndarray:
    """[4]: left, top, right, bottom of the face with these points, as SCRFD frames a face."""
    left, right = points[0], points[1]
    eyes = np.linalg.norm(right - left)
    return np.array(
        [
            left[0] - BESIDE * eyes,
            (left[1] + right[1]) / 2 - ABOVE * eyes,
            right[0] + BESIDE * eyes,
            (left[1] + right[1]) / 2 + BELOW * eyes,
        ]
    )


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[boxes, others]: intersection over union."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(-1)
    areas = [(some[:, 2:] - some[:, :2]).prod(-1) for some in (boxes, others)]
    return common / (areas[0][:, None] + areas[1][None] - common)
