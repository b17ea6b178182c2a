"""The quality of a video: likeness to the video without reuse, and to the face."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacache.results.record import Figures, IdentityFigures, Quality

# LPIPS needs its package, and this file in torch's cache.
LPIPS_BACKBONE = "alexnet-owt-7be5be79.pth"


def compare(frames: np.ndarray, baseline: np.ndarray) -> Quality:
    """PSNR, SSIM and, where it is installed, LPIPS of each frame against the baseline's.

    Args:
        frames, baseline: [frames, height, width, 3], uint8.

    Returns:
        for each figure the `mean` and `worst` of the frames, the index of the `worst_frame`, and
        `per_frame`. The PSNR of a frame that equals the baseline's is null, and does not count.
        LPIPS is null where it cannot be computed; `lpips_missing` is the reason.
    """
    # Late: takes half a second, and only sweeps need it.
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    psnr, ssim = [], []
    for frame, reference in zip(frames, baseline, strict=True):
        same = np.array_equal(frame, reference)
        psnr.append(math.nan if same else peak_signal_noise_ratio(reference, frame, data_range=255))
        ssim.append(structural_similarity(reference, frame, channel_axis=-1, data_range=255))
    missing = lpips_missing()
    return {
        "psnr": _figures(psnr, worst=min),
        "ssim": _figures(ssim, worst=min),
        "lpips": None if missing else _figures(_lpips(frames, baseline), worst=max),
        "lpips_missing": missing,
    }


def identity_similarity(
    frames: np.ndarray, reference: np.ndarray, analyser: Any
) -> IdentityFigures:
    """ArcFace's cosine similarity between the reference face and the face in each frame.

    Args:
        frames: [frames, height, width, 3], uint8 RGB.
        reference: [512], ArcFace's embedding of the face in the photograph.
        analyser: insightface's detector and recogniser in one.

    Returns:
        `mean`, `worst` and `worst_frame` of the frames with a face, `per_frame` (null for a frame
        without one), `frames_without_face`, and `face_share`: the share of frames with a face.
    """
    similarities = []
    for frame in frames:
        faces = analyser.get(np.ascontiguousarray(frame[:, :, ::-1]))
        if not faces:
            similarities.append(math.nan)
            continue
        # The largest face, as in the photograph.
        face = max(faces, key=lambda face: np.prod(face.bbox[2:] - face.bbox[:2]))
        norms = np.linalg.norm(face.embedding) * np.linalg.norm(reference)
        similarities.append(float(face.embedding @ reference / norms))
    without = sum(map(math.isnan, similarities))
    return {
        **_figures(similarities, worst=min),
        "frames_without_face": without,
        "face_share": 1 - without / len(frames),
    }


def lpips_missing() -> str | None:
    """The reason why LPIPS cannot be computed, or None. Nothing is downloaded."""
    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed"
    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE).is_file():
        return f"its weights {LPIPS_BACKBONE} are not in torch's cache"
    return None


def _lpips(frames: np.ndarray, baseline: np.ndarray) -> list[float]:
    import lpips  # optional

    model = lpips.LPIPS(net="alex", verbose=False).eval()

    def tensor(frame: np.ndarray) -> torch.Tensor:  # [1, 3, height, width], from -1 to 1
        return torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1

    with torch.no_grad():
        return [
            model(tensor(frame), tensor(reference)).item()
            for frame, reference in zip(frames, baseline, strict=True)
        ]


def _figures(values: list[float], worst: Callable[[list[float]], float]) -> Figures:
    known = [value for value in values if not math.isnan(value)]
    return {
        "mean": float(np.mean(known)) if known else None,
        "worst": float(worst(known)) if known else None,
        "worst_frame": values.index(worst(known)) if known else None,
        "per_frame": [None if math.isnan(value) else float(value) for value in values],
    }
