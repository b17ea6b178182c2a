"""From a face image to an identity: the four things that the sampler needs of a face."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import re
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.errors import CheckpointError, ImageError
from teacache.quiet import import_eva_clip
from teacache.readers import without_password

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from facexlib.utils.face_restoration_helper import FaceRestoreHelper
    from PIL import Image

EVA_CLIP = "EVA02-CLIP-L-14-336"
CONNECT_SECONDS, READ_SECONDS, FETCH_SECONDS = 10, 30, 60
MOST_BYTES = 50 * 10**6  # of an image that is fetched
MOST_PIXELS = 100 * 10**6  # of any image; decoded, they take 300 MB
SMALL_FACE_PIXELS = 64


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


def load_image(source: str) -> Image.Image:
    """The image at a URL or a path, upright and in RGB; `astronaut` is scikit-image's photograph.

    Of an animation it is the first frame; what is transparent becomes white.

    Raises:
        ImageError: where it cannot be fetched or read, or is too large to be a photograph.
    """
    from PIL import Image, UnidentifiedImageError

    if source == "astronaut":
        import skimage.data

        return Image.fromarray(skimage.data.astronaut())
    name = f"--image {without_password(source)}"
    file = io.BytesIO(_fetch(source, name)) if "://" in source else Path(source)
    try:
        with Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            if getattr(image, "n_frames", 1) > 1:
                logger.warning("%s has %d frames: the first is taken", name, image.n_frames)
            return _upright_rgb(image)
    except Image.DecompressionBombError:
        raise ImageError(
            f"{name} has more than {MOST_PIXELS // 10**6} million pixels: make it smaller"
        ) from None
    except UnidentifiedImageError as error:
        empty = isinstance(file, Path) and file.stat().st_size == 0
        what = "is empty" if empty else "is no image that can be read"
        raise ImageError(f"{name} {what}") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        # Which of these Pillow raises for a broken file depends on the format.
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"{name} cannot be read as an image: {reason}") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":  # 16 bits a pixel, or more
        numbers = np.asarray(upright, np.float64)
        largest = 65535 if numbers.max(initial=0) > 255 else 255
        upright = Image.fromarray((numbers.clip(0, largest) * (255 / largest)).astype(np.uint8))
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    paper = Image.new("RGBA", upright.size, "white")
    return Image.alpha_composite(paper, upright.convert("RGBA")).convert("RGB")


def _fetch(url: str, name: str) -> bytes:
    """The body at a URL.

    Args:
        name: of the image, in an error.
    """
    import requests
    import urllib3

    ends = time.monotonic() + FETCH_SECONDS
    body = bytearray()
    try:
        with requests.get(url, timeout=(CONNECT_SECONDS, READ_SECONDS), stream=True) as answer:
            if not answer.ok:
                raise ImageError(f"{name}: the server answers {answer.status_code} {answer.reason}")
            if answer.headers.get("Content-Type", "").startswith("text/"):
                raise ImageError(f"{name} is a page of text, not an image: name the file itself")
            # As it comes: to wait for a block of some size is to wait as long as the server likes.
            while piece := answer.raw.read1(2**16, decode_content=True):
                body += piece
                if len(body) > MOST_BYTES:
                    raise ImageError(f"{name} is larger than {MOST_BYTES // 10**6} MB")
                if time.monotonic() > ends:
                    raise ImageError(f"{name} does not arrive within {FETCH_SECONDS} s")
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise ImageError(
            f"{name}: no answer from the server within {CONNECT_SECONDS} s to connect "
            f"and {READ_SECONDS} s to read"
        ) from error
    except requests.TooManyRedirects as error:
        raise ImageError(f"{name}: the server redirects again and again") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as error:
        # What requests says may hold the whole URL; the kind of error is what can be acted on.
        raise ImageError(f"{name} cannot be fetched: {_kind(error)}") from error
    return bytes(body)


def _kind(error: Exception) -> str:
    """`ConnectionError` as "connection error", and what the system says of it."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    reason = re.search(r"\[Errno -?\d+\] ([\w ]+)", str(error))
    return f"{words} ({reason[1].lower()})" if reason else words


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

    root = str(checkpoint / "face_encoder")
    analyser = FaceAnalysis("antelopev2", root=root, providers=["CUDAExecutionProvider"])
    analyser.prepare(ctx_id=0, det_size=(640, 640))
    return analyser


def load_face_models(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> FaceModels:
    """Load detectors, recogniser, parser and EVA-CLIP from `face_encoder/` of the checkpoint."""
    consisid_eva_clip = import_eva_clip()
    from diffusers.pipelines.consisid.consisid_utils import prepare_face_models

    own = checkpoint / "face_encoder" / f"{EVA_CLIP}.json"
    packaged = Path(consisid_eva_clip.__file__).parent / "model_configs" / f"{EVA_CLIP}.json"
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
    image: Image.Image, models: FaceModels, device: torch.device, dtype: torch.dtype
) -> Identity:
    """The identity of the face in `image` (RGB, upright), the largest where there are several.

    Two detectors look: insightface's for the recogniser, facexlib's to align the face. Where only
    the second finds one, the recogniser gets the aligned face.

    Raises:
        ImageError: where facexlib finds no face.
    """
    import numpy as np
    import torch
    from diffusers.pipelines.consisid.consisid_utils import process_face_embeddings_infer

    boxes = _find_boxes(image, models)
    several = len(boxes) > 1
    same_face = _aligned_at(boxes[-1], image, models.aligner) if several else nullcontext()
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
            raise ImageError("--image: no face was found in it") from error
        raise
    return Identity(id_cond, id_vit_hidden, face, kps)


def _find_boxes(image: Image.Image, models: FaceModels) -> np.ndarray:
    """insightface's boxes, [faces, 4] in pixels: left, top, right, bottom; the largest face last.

    Warns where there are several to choose from, or the one chosen is very small.
    """
    import cv2
    import numpy as np

    found = models.analyser.get(cv2.cvtColor(np.array(image), cv2.COLOR_RGB2BGR))
    boxes = np.array([face["bbox"] for face in found]).reshape(-1, 4)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    if len(boxes) > 1:
        logger.warning("--image: %d faces were found in it, the largest is taken", len(boxes))
    order = np.argsort(width * height, kind="stable")
    if len(boxes) and (side := min(width[order[-1]], height[order[-1]])) < SMALL_FACE_PIXELS:
        logger.warning(
            "--image: the face in it is %d pixels wide or high; of less than %d little is known",
            *(side, SMALL_FACE_PIXELS),
        )
    return boxes[order]


@contextlib.contextmanager
def _aligned_at(box: np.ndarray, image: Image.Image, aligner: FaceRestoreHelper) -> Iterator[None]:
    """Have facexlib align the face at the box; upstream asks it for the one in the middle."""
    import numpy as np

    find_all, size = aligner.get_face_landmarks_5, np.array(image.size)
    wanted = (box[:2] + box[2:]) / 2 / size

    def find_one(**given: bool) -> None:
        find_all()
        height, width = aligner.input_img.shape[:2]  # not the image's own: it is made smaller
        faces = np.array(aligner.det_faces).reshape(-1, 5)
        centres = (faces[:, :2] + faces[:, 2:4]) / 2 / (width, height)
        nearest = np.linalg.norm(centres - wanted, axis=1).argsort()[:1]
        aligner.det_faces = [aligner.det_faces[n] for n in nearest]
        aligner.all_landmarks_5 = [aligner.all_landmarks_5[n] for n in nearest]

    aligner.get_face_landmarks_5 = find_one
    try:
        yield
    finally:
        del aligner.get_face_landmarks_5
