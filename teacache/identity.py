"""From a face image to an identity: the four things that the sampler needs of a face."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.errors import ImageError
from teacache.quiet import import_eva_clip

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

EVA_CLIP = "EVA02-CLIP-L-14-336"
CONNECT_SECONDS, READ_SECONDS = 10, 30


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

    Raises:
        ImageError: where it cannot be fetched or read.
    """
    from PIL import Image, ImageOps

    if source == "astronaut":
        import skimage.data

        return Image.fromarray(skimage.data.astronaut())
    file = io.BytesIO(_fetch(source)) if "://" in source else Path(source)
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError for some broken PNG files.
        raise ImageError(f"--image {source} cannot be read as an image: {error}") from error


def _fetch(url: str) -> bytes:
    import requests

    try:
        answer = requests.get(url, timeout=(CONNECT_SECONDS, READ_SECONDS))
        answer.raise_for_status()
    except requests.RequestException as error:
        raise ImageError(f"--image {url} cannot be fetched: {error}") from error
    return answer.content


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
    return FaceModels(*prepare_face_models(str(checkpoint), str(device), dtype))


def find_identity(
    image: Image.Image, models: FaceModels, device: torch.device, dtype: torch.dtype
) -> Identity:
    """The identity of the face in `image` (RGB, upright).

    Raises:
        ImageError: where no face is found.
    """
    import numpy as np
    import torch
    from diffusers.pipelines.consisid.consisid_utils import process_face_embeddings_infer

    try:
        with torch.no_grad():
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
