"""The identity of a face image: the embeddings and the aligned face that ConsisID takes."""

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from teacache.base.errors import CheckpointError, ImageError
from teacache.base.quiet import import_eva_clip
from teacache.checkpoint.loading import reading

logger = logging.getLogger(__name__)

EVA_CLIP = "EVA02-CLIP-L-14-336"  # the model; `face_encoder/` may hold its configuration, a .json
# The names of the tensors of `as_tensors`. ConsisID reads 5 of EVA-CLIP's 24 layers.
HIDDEN = tuple(f"id_vit_hidden_{n}" for n in range(5))
TENSORS = ("id_cond", *HIDDEN, "face", "kps", "embedding")
SMALL_FACE_PIXELS = 64


class Identity(NamedTuple):
    """The face that ConsisID is conditioned on.

    id_cond: [1, 1280], 512 numbers of ArcFace and 768 of EVA-CLIP.
    id_vit_hidden: five hidden states of EVA-CLIP, each [1, 577, ViT width].
    face: the aligned face, 512x512, the condition of the first frame.
    kps: [5, 2], key points: eyes, nose and corners of the mouth, in pixels of the image after its
        longer side is reduced to 1024.
    embedding: [512], float32, ArcFace's embedding of the photograph's face. `id_cond` has it in the
        dtype of the models.
    """

    id_cond: torch.Tensor
    id_vit_hidden: list[torch.Tensor]
    face: Image.Image
    kps: np.ndarray
    embedding: np.ndarray


class FaceModels(NamedTuple):
    """The face models, in the order of diffusers' `prepare_face_models`."""

    aligner: Any  # facexlib: RetinaFace, alignment, parsing
    recogniser: Any  # insightface: ArcFace
    eva_clip: torch.nn.Module
    analyser: Any  # insightface: SCRFD and ArcFace
    clip_mean: tuple[float, ...]
    clip_std: tuple[float, ...]


def as_tensors(identity: Identity) -> dict[str, torch.Tensor]:
    """An identity as named tensors on the host, for a safetensors file."""
    return {
        "id_cond": identity.id_cond.cpu(),
        **{name: each.cpu() for name, each in zip(HIDDEN, identity.id_vit_hidden, strict=True)},
        "face": torch.from_numpy(np.array(identity.face)),  # [512, 512, 3], uint8
        "kps": torch.from_numpy(np.array(identity.kps)),
        "embedding": torch.from_numpy(np.array(identity.embedding)),
    }


def from_tensors(tensors: dict[str, torch.Tensor], device: torch.device) -> Identity:
    """The inverse of `as_tensors`, with the embeddings on the device."""
    return Identity(
        id_cond=tensors["id_cond"].to(device),
        id_vit_hidden=[tensors[name].to(device) for name in HIDDEN],
        face=Image.fromarray(tensors["face"].numpy()),
        kps=tensors["kps"].numpy(),
        embedding=tensors["embedding"].numpy(),
    )


def load_analyser(checkpoint: Path) -> Any:
    """Load only insightface's detector and recogniser."""
    from insightface.app import FaceAnalysis

    folder = checkpoint / "face_encoder"
    with reading(folder):
        analyser = FaceAnalysis("antelopev2", root=str(folder), providers=["CUDAExecutionProvider"])
        analyser.prepare(ctx_id=0, det_size=(640, 640))
    return analyser


def load_face_models(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> FaceModels:
    """Load detectors, recogniser, parser and EVA-CLIP from `face_encoder/` of the checkpoint.

    Raises:
        CheckpointError: where a file is damaged, or a .pth or .pt file holds more than weights.
    """
    consisid_eva_clip = import_eva_clip()
    from diffusers.pipelines.consisid.consisid_utils import prepare_face_models

    own = checkpoint / "face_encoder" / f"{EVA_CLIP}.json"
    packaged = Path(str(consisid_eva_clip.__file__)).parent / "model_configs" / f"{EVA_CLIP}.json"
    with reading(checkpoint / "face_encoder"):
        # The registry is global. An earlier checkpoint may have registered a smaller EVA-CLIP.
        consisid_eva_clip.add_model_config(own if own.is_file() else packaged)
        try:
            with _no_code_in_weights():
                return FaceModels(*prepare_face_models(str(checkpoint), str(device), dtype))
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{checkpoint / 'face_encoder'}: a .pth or .pt file is damaged, or holds more than "
                "weights, and is not read: it might run code"
            ) from error


@contextlib.contextmanager
def _no_code_in_weights() -> Iterator[None]:
    """Let `torch.load` read weights only, even where its caller allows more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name, "")  # torch takes an empty value for none
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ[name] = before


def find_identity(
    image: Image.Image,
    models: FaceModels,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "the image",
) -> Identity:
    """The identity of the largest face in `image` (RGB, upright).

    There are two detectors: insightface's for the recogniser, facexlib's to align the face.
    Upstream takes the largest face of the first and the central face of the second. Here both
    take the same face. Where insightface does not detect it, the recogniser reads the aligned face.
    Messages have the image's name.

    Raises:
        ImageError: where facexlib detects no face.
    """
    from diffusers.pipelines.consisid import consisid_utils

    picture = consisid_utils.resize_numpy_image_long(np.array(image), 1024)
    recognised, alignable = _choose_face(picture, models, name)
    box = recognised[0]["bbox"] if recognised else alignable[0]
    side = _sides(box).min()
    if side < SMALL_FACE_PIXELS:
        reduced = image.width / picture.shape[1]
        logger.warning(
            "%s: the face is %d pixels wide or high, in a picture of %dx%d. Below %d pixels a face "
            "is hardly recognised: crop the picture to the face",
            name,
            side * reduced,
            *image.size,
            SMALL_FACE_PIXELS * reduced,
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
    """The identity of a face that was detected before.

    Args:
        picture: [height, width, 3], uint8 RGB.
        recognised: a list with insightface's face, or an empty list.
        alignable: facexlib's box (left, top, right, bottom, confidence) and five landmarks.
    """
    from diffusers.pipelines.consisid import consisid_utils

    aligner, (box, landmarks) = models.aligner, alignable

    def detect(only_center_face: bool) -> None:
        aligner.det_faces, aligner.all_landmarks_5 = [box], [landmarks]

    aligner.get_face_landmarks_5 = detect  # instead of detecting faces again
    try:
        with torch.no_grad():
            id_cond, id_vit_hidden, face, kps = consisid_utils.process_face_embeddings_infer(
                aligner,
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
    finally:
        del aligner.get_face_landmarks_5
    if recognised:
        embedding = recognised[0]["embedding"]
    else:
        (embedding,) = models.recogniser.get_feat(aligner.cropped_faces[0])
    return Identity(id_cond, id_vit_hidden, face, kps, embedding)


def _choose_face(
    picture: np.ndarray, models: FaceModels, name: str
) -> tuple[list, tuple[np.ndarray, np.ndarray]]:
    """The largest face in [height, width, 3], uint8 RGB, as `aligned_identity` takes it."""
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    recognised = sorted(models.analyser.get(bgr), key=lambda face: _sides(face["bbox"]).prod())
    aligner = models.aligner
    aligner.clean_all()
    aligner.read_image(bgr)
    aligner.get_face_landmarks_5()
    alignable = list(zip(aligner.det_faces, aligner.all_landmarks_5, strict=True))
    if not alignable:
        raise ImageError(
            f"{name}: no face was found in it: use an image with a large face, seen from the front"
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
    """From the middle of `box` to that of `other`: 0 is its middle, 1 is its edge."""
    shift = box[:2] + box[2:4] - other[:2] - other[2:4]
    return (abs(shift) / _sides(other)).max()
