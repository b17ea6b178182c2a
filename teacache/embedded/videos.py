"""Videos for measurements: three sets of aligned portraits, prompts and seeds.

The embedded checkpoint was not trained on the portraits of `held_out` and of half of `fresh`. It
was trained on portraits like those of `training` and of the other half.
"""

import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from insightface.app.common import Face
from PIL import Image

from teacache.checkpoint.size import VideoSize
from teacache.inputs.identity import FaceModels, Identity, aligned_identity

SIZE = VideoSize(width=112, height=96, num_frames=13)
SIDE = 128  # pixels of a portrait
# Eyes, tip of the nose and corners of the mouth in an aligned face, in fractions of its side: the
# template of FFHQ, from facexlib 0.3.0, face_restoration_helper.py.
ALIGNED = np.array(
    [[0.3769, 0.4686], [0.6229, 0.4691], [0.5012, 0.6133], [0.3931, 0.7254], [0.6115, 0.7249]]
)
ALIGNED_SIDE = 512  # pixels of the pipeline's aligned face


class BenchmarkVideo(NamedTuple):
    """A video to sample. portrait: [SIDE, SIDE, 3], uint8 RGB."""

    portrait: np.ndarray
    prompt: str
    seed: int


def videos(name: str) -> list[BenchmarkVideo]:
    """The 16 videos of the set `held_out`, `training` or `fresh`."""
    folder = Path(__file__).parent
    sheet = np.array(Image.open(folder / "portraits.jpg"))
    rows = [np.split(row, sheet.shape[1] // SIDE, 1) for row in np.split(sheet, len(sheet) // SIDE)]
    portraits = [np.ascontiguousarray(portrait) for row in rows for portrait in row]
    entries = json.loads((folder / "videos.json").read_text(encoding="utf-8"))
    chosen = [entry for entry in entries if entry["set"] == name]
    return [
        BenchmarkVideo(portraits[one["portrait"]], one["prompt"], one["seed"]) for one in chosen
    ]


def identity_of(portrait: np.ndarray, models: FaceModels) -> Identity:
    """The identity of an aligned face."""
    picture = cv2.resize(portrait, (ALIGNED_SIDE, ALIGNED_SIDE), interpolation=cv2.INTER_CUBIC)
    points = (ALIGNED * ALIGNED_SIDE).astype(np.float32)
    box = np.array([*points.min(0) - 80, *points.max(0) + 80, 1.0], np.float32)
    face = Face(bbox=box[:4], kps=points, det_score=1.0)
    models.analyser.models["recognition"].get(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), face)
    cpu = torch.device("cpu")
    return aligned_identity(picture, [face], (box, points), models, cpu, torch.float32)
