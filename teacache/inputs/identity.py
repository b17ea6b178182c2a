"""From a face image to an identity: the four things that the sampler needs of a face."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from teacache.base.errors import CheckpointError, ImageError
from teacache.base.quiet import import_eva_clip
from teacache.checkpoint.loading import reading

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from facexlib.utils.face_restoration_helper import FaceRestoreHelper

EVA_CLIP = "EVA02-CLIP-L-14-336"  # the model, and with .json its description in `face_encoder/`
HIDDEN_STATES = 5  # of EVA-CLIP's 24 layers, those that ConsisID reads
# What an identity consists of, as `as_tensors` names it.
TENSORS = ("id_cond", *(f"id_vit_hidden_{n}" for n in range(HIDDEN_STATES)), "face", "kps")
SMALL_FACE_PIXELS = 64
UPSTREAM_PIXELS = 1024


class Identity(NamedTuple):
    """What ConsisID is conditioned on.

    id_cond: [1, 1280], ArcFace's 512 numbers and EVA-CLIP's 768.
    id_vit_hidden: five hidden states of EVA-CLIP, each [1, 577, ViT width].
    face: the aligned face, 512x512, which becomes the first frame's condition.
    kps: [5, 2], the face's key points, eyes, nose and corners of the mouth, in pixels of the image
        as upstream looks at it, its longer side at most 1024.
    """

    id_cond: torch.Tensor
    id_vit_hidden: list[torch.Tensor]
    face: Image.Image
    kps: np.ndarray


class FaceModels(NamedTuple):
    """The face stack, in the order in which `prepare_face_models` of diffusers returns it."""

    aligner: Any  # facexlib: RetinaFace, alignment, parsing
    recogniser: Any  # insightface: ArcFace
    eva_clip: torch.nn.Module
    analyser: Any  # insightface: SCRFD and ArcFace
    clip_mean: tuple[float, ...]
    clip_std: tuple[float, ...]


def as_tensors(identity: Identity) -> dict[str, torch.Tensor]:
    """An identity as named tensors, as a safetensors file holds them."""
    hidden = {f"id_vit_hidden_{n}": tensor for n, tensor in enumerate(identity.id_vit_hidden)}
    return {
        "id_cond": identity.id_cond,
        **hidden,
        "face": torch.from_numpy(np.array(identity.face)),  # [512, 512, 3], uint8
        "kps": torch.from_numpy(np.array(identity.kps)),
    }


def from_tensors(tensors: dict[str, torch.Tensor], device: torch.device) -> Identity:
    """The identity that `as_tensors` took apart, its embeddings on the device."""
    return Identity(
        id_cond=tensors["id_cond"].to(device),
        id_vit_hidden=[tensors[f"id_vit_hidden_{n}"].to(device) for n in range(HIDDEN_STATES)],
        face=Image.fromarray(tensors["face"].numpy()),
        kps=tensors["kps"].numpy(),
    )


def load_analyser(checkpoint: Path) -> Any:
    """insightface's detector and recogniser alone, as `load_face_models` loads them too."""
    from insightface.app import FaceAnalysis

    folder = checkpoint / "face_encoder"
    with reading(folder):
        analyser = FaceAnalysis("antelopev2", root=str(folder), providers=["CUDAExecutionProvider"])
        analyser.prepare(ctx_id=0, det_size=(640, 640))
    return analyser


def load_face_models(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> FaceModels:
    """Load detectors, recogniser, parser and EVA-CLIP from `face_encoder/` of the checkpoint.

    Raises:
        CheckpointError: where a file is damaged, or a .pth or .pt holds more than weights.
    """
    consisid_eva_clip = import_eva_clip()
    from diffusers.pipelines.consisid.consisid_utils import prepare_face_models

    own = checkpoint / "face_encoder" / f"{EVA_CLIP}.json"
    packaged = Path(str(consisid_eva_clip.__file__)).parent / "model_configs" / f"{EVA_CLIP}.json"
    with reading(checkpoint / "face_encoder"):
        # The registry is one for the process: without the second, a small EVA-CLIP registered for
        # another checkpoint would still be there for one that describes none.
        consisid_eva_clip.add_model_config(own if own.is_file() else packaged)
        try:
            with _no_code_in_weights():
                return FaceModels(*prepare_face_models(str(checkpoint), str(device), dtype))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{checkpoint / 'face_encoder'}: a .pth or .pt file is damaged, or holds more than "
                "weights, and is not read, since that might run what it holds"
            ) from error


@contextlib.contextmanager
def _no_code_in_weights() -> Iterator[None]:
    """Have torch read weights and nothing else, whatever its callers ask for."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def find_identity(
    image: Image.Image,
    models: FaceModels,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "the image",
) -> Identity:
    """The identity of the face in `image` (RGB, upright), the largest where there are several.

    Two detectors look: insightface's for the recogniser, facexlib's to align the face. Upstream
    takes the largest face of the first and the one in the middle of the second; here both go on
    with the same one. Where the first does not find it, the recogniser gets the aligned face.

    Args:
        name: of the image, in what is said of it.

    Raises:
        ImageError: where facexlib finds no face.
    """
    from diffusers.pipelines.consisid import consisid_utils

    picture = consisid_utils.resize_numpy_image_long(np.array(image), UPSTREAM_PIXELS)
    recognised, alignable = _choose_face(picture, models, name)
    box = recognised[0]["bbox"] if recognised else alignable[0]
    side = _sides(box).min()
    if side < SMALL_FACE_PIXELS:
        height, width, _ = picture.shape
        logger.warning(
            "%s: the face in it is %d pixels wide or high, in a picture of %dx%d: below %d it is "
            "hardly recognised. Cut the picture to the face",
            name,
            side,
            width,
            height,
            SMALL_FACE_PIXELS,
        )
    return aligned_identity(picture, recognised, alignable, models, device, dtype)


def aligned_identity(
    picture: np.ndarray,
    recognised: list,
    alignable: tuple[np.ndarray, np.ndarray],
    models: FaceModels,
    device: torch.device,
    dtype: torch.dtype,
) -> Identity:
    """The identity of a face that was found before.

    Args:
        picture: [height, width, 3], uint8 RGB.
        recognised: insightface's face, in a list that may be empty.
        alignable: facexlib's box (left, top, right, bottom, how sure it is) and five landmarks.
    """
    from diffusers.pipelines.consisid import consisid_utils

    with torch.no_grad(), _aligning(alignable, models.aligner):
        id_cond, id_vit_hidden, face, kps = consisid_utils.process_face_embeddings_infer(
            models.aligner,
            models.eva_clip,
            models.recogniser,
            models.clip_mean,
            models.clip_std,
            SimpleNamespace(get=lambda _: recognised),
            str(device),
            dtype,
            picture,
            is_align_face=True,
        )
    return Identity(id_cond, id_vit_hidden, face, kps)


def _choose_face(
    picture: np.ndarray, models: FaceModels, name: str
) -> tuple[list, tuple[np.ndarray, np.ndarray]]:
    """The face to take, as each detector found it.

    Args:
        picture: [height, width, 3], uint8 RGB.

    Returns:
        insightface's face, in a list that is empty where it does not find the one to take; and
        facexlib's, its box (left, top, right, bottom, how sure it is) and its five landmarks.
    """
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    recognised = sorted(models.analyser.get(bgr), key=lambda face: _sides(face["bbox"]).prod())
    aligner = models.aligner
    aligner.clean_all()
    aligner.read_image(bgr)
    aligner.get_face_landmarks_5()
    alignable = list(zip(aligner.det_faces, aligner.all_landmarks_5, strict=True))
    if not alignable:
        raise ImageError(
            f"{name}: no face was found in it: take one that shows a face from the front, large"
        )
    several = len(recognised) or len(alignable)
    if several > 1:
        logger.warning("%s: %d faces were found in it, the largest is taken", name, several)
    for face in reversed(recognised):
        distances = [_distance(box, face["bbox"]) for box, _ in alignable]
        if min(distances) < 1:
            return [face], alignable[distances.index(min(distances))]
    if recognised:
        logger.warning("%s: the detectors find different faces, the aligned one is taken", name)
    return [], max(alignable, key=lambda face: _sides(face[0]).prod())


def _sides(box: np.ndarray) -> np.ndarray:
    """Width and height of a box: left, top, right, bottom."""
    return box[2:4] - box[:2]


def _distance(box: np.ndarray, other: np.ndarray) -> float:
    """How far the middle of a box is from another's: 0 in its middle, 1 on its edge."""
    away = (box[:2] + box[2:4] - other[:2] - other[2:4]) / 2
    return 2 * (abs(away) / _sides(other)).max()


@contextlib.contextmanager
def _aligning(face: tuple[np.ndarray, np.ndarray], aligner: FaceRestoreHelper) -> Iterator[None]:
    """Have facexlib align this face, which it has found before, instead of looking anew."""
    box, landmarks = face

    def look(only_center_face: bool) -> None:
        aligner.det_faces, aligner.all_landmarks_5 = [box], [landmarks]

    aligner.get_face_landmarks_5 = look
    try:
        yield
    finally:
        del aligner.get_face_landmarks_5
