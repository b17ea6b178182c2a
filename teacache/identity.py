"""From a face image to an identity: the four things that the sampler needs of a face."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.errors import CheckpointError, ImageError
from teacache.loading import reading
from teacache.quiet import import_eva_clip

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from facexlib.utils.face_restoration_helper import FaceRestoreHelper
    from PIL import Image

EVA_CLIP = "EVA02-CLIP-L-14-336"
SMALL_FACE_PIXELS = 64
UPSTREAM_PIXELS = 1024


class Identity(NamedTuple):
    """What ConsisID is conditioned on.

    id_cond: [1, 1280], ArcFace's 512 numbers and EVA-CLIP's 768.
    id_vit_hidden: five hidden states of EVA-CLIP, each [1, 577, ViT width].
    face: the aligned face, 512x512, which becomes the first frame's condition.
    kps: [5, 2], the face's key points in pixels of the image: eyes, nose, corners of the mouth.
    """

    id_cond: torch.Tensor
    id_vit_hidden: list[torch.Tensor]
    face: Image.Image
    kps: np.ndarray


class FaceModels(NamedTuple):
    """The face stack, in the order in which `prepare_face_models` of diffusers returns it."""

    aligner: object  # facexlib: RetinaFace, alignment, parsing
    recogniser: object  # insightface: ArcFace
    eva_clip: torch.nn.Module
    analyser: object  # insightface: SCRFD and ArcFace
    clip_mean: tuple[float, ...]
    clip_std: tuple[float, ...]


def as_tensors(identity: Identity) -> dict[str, torch.Tensor]:
    """An identity as named tensors, as a safetensors file holds them."""
    import numpy as np
    import torch

    hidden = {f"id_vit_hidden_{n}": tensor for n, tensor in enumerate(identity.id_vit_hidden)}
    return {
        "id_cond": identity.id_cond,
        **hidden,
        "face": torch.from_numpy(np.array(identity.face)),  # [512, 512, 3], uint8
        "kps": torch.from_numpy(np.array(identity.kps)),
    }


def from_tensors(tensors: dict[str, torch.Tensor], device: torch.device) -> Identity:
    """The identity that `as_tensors` took apart, its embeddings on the device."""
    from PIL import Image

    hidden = sorted(name for name in tensors if name.startswith("id_vit_hidden_"))
    return Identity(
        id_cond=tensors["id_cond"].to(device),
        id_vit_hidden=[tensors[name].to(device) for name in hidden],
        face=Image.fromarray(tensors["face"].numpy()),
        kps=tensors["kps"].numpy(),
    )


def load_analyser(checkpoint: Path) -> object:
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
    packaged = Path(consisid_eva_clip.__file__).parent / "model_configs" / f"{EVA_CLIP}.json"
    # The registry is one for the process: without the second, a small EVA-CLIP registered for
    # another checkpoint would still be there for one that describes none.
    consisid_eva_clip.add_model_config(own if own.is_file() else packaged)
    with reading(checkpoint / "face_encoder"):
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

    Two detectors look: insightface's for the recogniser, facexlib's to align the face. Where only
    the second finds one, the recogniser gets the aligned face.

    Args:
        name: of the image, in what is said of it.

    Raises:
        ImageError: where facexlib finds no face.
    """
    import numpy as np
    import torch
    from diffusers.pipelines.consisid.consisid_utils import process_face_embeddings_infer

    boxes = _find_boxes(image, models, name)
    several = len(boxes) > 1
    same_face = _aligned_at(boxes[-1], models.aligner) if several else nullcontext()
    try:
        with torch.no_grad(), same_face:
            id_cond, id_vit_hidden, face, kps = process_face_embeddings_infer(
                models.aligner,
                models.eva_clip,
                models.recogniser,
                models.clip_mean,
                models.clip_std,
                models.analyser,
                str(device),
                dtype,
                np.array(image),
                is_align_face=True,
            )
    except (IndexError, RuntimeError) as error:
        # Finding no face, the upstream code stumbles over an empty list or gives up aligning.
        if isinstance(error, IndexError) or "align face fail" in str(error):
            raise ImageError(
                f"{name}: no face was found in it: take one that shows a face from the front, large"
            ) from error
        raise
    return Identity(id_cond, id_vit_hidden, face, kps)


def _find_boxes(image: Image.Image, models: FaceModels, name: str) -> np.ndarray:
    """insightface's boxes, [faces, 4]: left, top, right, bottom; the largest face last.

    In pixels of the picture as upstream looks at it, its longer side 1024. Warns where there are
    several to choose from, or the one chosen is very small.
    """
    import cv2
    import numpy as np
    from diffusers.pipelines.consisid.consisid_utils import resize_numpy_image_long

    picture = resize_numpy_image_long(np.array(image), UPSTREAM_PIXELS)
    found = models.analyser.get(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    boxes = np.array([face["bbox"] for face in found]).reshape(-1, 4)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    order = np.argsort(width * height, kind="stable")
    if len(boxes) > 1:
        logger.warning("%s: %d faces were found in it, the largest is taken", name, len(boxes))
    if len(boxes):
        side = min(width[order[-1]], height[order[-1]]) * image.width / picture.shape[1]
        if side < SMALL_FACE_PIXELS:
            logger.warning(
                "%s: the face in it is %d pixels wide or high: below %d it is hardly recognised",
                *(name, side, SMALL_FACE_PIXELS),
            )
    return boxes[order]


@contextlib.contextmanager
def _aligned_at(box: np.ndarray, aligner: FaceRestoreHelper) -> Iterator[None]:
    """Have facexlib align the face at the box; upstream asks it for the one in the middle."""
    import numpy as np

    find_all = aligner.get_face_landmarks_5

    def find_one(**given: bool) -> None:
        find_all()
        found = np.array(aligner.det_faces).reshape(-1, 5)  # boxes, and how sure it is
        distances = np.linalg.norm(found[:, :2] + found[:, 2:4] - box[:2] - box[2:], axis=1)
        nearest = distances.argsort()[:1]
        aligner.det_faces = [aligner.det_faces[n] for n in nearest]
        aligner.all_landmarks_5 = [aligner.all_landmarks_5[n] for n in nearest]

    aligner.get_face_landmarks_5 = find_one
    try:
        yield
    finally:
        del aligner.get_face_landmarks_5
