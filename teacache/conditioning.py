"""What videos are conditioned on, faces and texts: from the cache where it has them, else computed.

The models for it are large, and needed for nothing else: each is loaded only if the cache lacks
something, and gone again before the next one comes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from teacache import device as devices
from teacache import identity as faces
from teacache import sampler
from teacache.cache import fingerprint
from teacache.checkpoint import read_ahead
from teacache.errors import without_credentials

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL import Image

    from teacache.cache import EmbeddingCache
    from teacache.jobs import Job
    from teacache.report import Stages

logger = logging.getLogger(__name__)

TEXT_PACKAGES = ("torch", "transformers", "diffusers", "sentencepiece")
# Some of them come under several names, of which one is installed.
FACE_PACKAGES = (
    *("torch", "torchvision", "diffusers", "insightface", "facexlib", "consisid-eva-clip"),
    *("onnxruntime", "onnxruntime-gpu", "opencv-python", "opencv-python-headless"),
)


class Conditioning:
    """The faces and texts of one run.

    Args:
        offload: see `teacache.sampler.load_pipeline`.
        cache: where embeddings are kept from run to run; None computes all of them.
    """

    def __init__(
        self,
        checkpoint: Path,
        device: torch.device,
        dtype: torch.dtype,
        offload: str,
        cache: EmbeddingCache | None,
    ):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.offload, self.cache = offload, cache
        self._texts: dict[str, sampler.EmbeddedText] = {}
        self._fingerprints: dict[str, str] = {}

    def find_identities(self, images: dict[str, Image.Image]) -> dict[str, faces.Identity]:
        """The identity in each image, by the image's source.

        Raises:
            ImageError: where one has no face.
        """
        keys, found = {}, {}
        if self.cache:
            keys = {source: self._face_key(image) for source, image in images.items()}
        for source, key in keys.items():
            kept = self.cache.get(key)
            if kept:
                found[source] = faces.from_tensors(kept, self.device)
        missing = [source for source in images if source not in found]
        if missing:
            models = faces.load_face_models(self.checkpoint, self.device, self.dtype)
            for source in missing:
                name = f"--image {without_credentials(source)}"
                found[source] = faces.find_identity(
                    images[source], models, self.device, self.dtype, name
                )
                if self.cache:
                    self.cache.put(keys[source], faces.as_tensors(found[source]))
            del models
            devices.free_cached_memory(self.device)
        return found

    def lacks(self, texts: Iterable[str]) -> bool:
        """Whether the text encoder is needed for any of these texts."""
        missing = [text for text in texts if not self._kept_text(text)]
        return bool(missing)

    def embed_texts(self, texts: Iterable[str]) -> dict[str, sampler.EmbeddedText]:
        """Each text's embeddings."""
        texts = list(texts)
        if self.lacks(texts):
            pipe = sampler.load_pipeline(
                self.checkpoint, self.device, self.dtype, self.offload, parts=("text_encoder",)
            )
            for text in texts:
                if text not in self._texts:
                    self._texts[text] = embedded = sampler.embed_text(pipe, text)
                    if self.cache:
                        self.cache.put(
                            self._text_key(text),
                            {"embeds": embedded.embeds, "lost": _as_tensor(embedded.lost)},
                        )
            del pipe
            devices.free_cached_memory(self.device)
        return {text: self._texts[text] for text in texts}

    def _kept_text(self, text: str) -> bool:
        if text not in self._texts and self.cache:
            kept = self.cache.get(self._text_key(text))
            if kept:
                lost = bytes(kept["lost"].tolist()).decode()
                self._texts[text] = sampler.EmbeddedText(kept["embeds"].to(self.device), lost)
        return text in self._texts

    def _face_key(self, image: Image.Image) -> dict[str, str]:
        pixels = hashlib.sha256(image.tobytes()).hexdigest()
        size = f"{image.width}x{image.height}"
        return {**self._key("face_encoder", packages=FACE_PACKAGES), "image": f"{size} {pixels}"}

    def _text_key(self, text: str) -> dict[str, str]:
        return {**self._key("text_encoder", "tokenizer", packages=TEXT_PACKAGES), "text": text}

    def _key(self, *components: str, packages: tuple[str, ...]) -> dict[str, str]:
        """What every embedding of a kind depends on.

        The device is among it: another GPU may round differently. So is the code that computes and
        takes apart the embeddings.
        """
        for component in components:
            if component not in self._fingerprints:
                folder = self.checkpoint / component
                files = [path for path in folder.rglob("*") if path.is_file()]
                self._fingerprints[component] = fingerprint(files)
        return {
            **{component: self._fingerprints[component] for component in components},
            "dtype": devices.dtype_name(self.dtype),
            "device": devices.device_name(self.device),
            "code": _digest_of_the_code(),
            **{package: _version(package) for package in packages},
        }


def condition(
    conditioning: Conditioning,
    jobs: list[Job],
    images: dict[str, Image.Image],
    guided: bool,
    stages: Stages,
) -> tuple[dict[str, faces.Identity], dict[Job, sampler.Text]]:
    """The identities of some jobs by their images' sources, and each one's text.

    While the models of one stage compute, the files of the next are read.

    Args:
        images: by their sources; there may be more of them than the jobs need.
        guided: whether negative prompts count.
    """
    used = {job.prompt for job in jobs}
    if guided:
        used |= {job.negative_prompt for job in jobs}
    folder = conditioning.checkpoint
    pipeline = [folder / "transformer", folder / "vae"]
    text_encoder_first = conditioning.lacks(used)
    read_ahead([folder / "text_encoder"] if text_encoder_first else pipeline)
    with stages.stage("identity"):
        identities = conditioning.find_identities({job.image: images[job.image] for job in jobs})
    if text_encoder_first:
        read_ahead(pipeline)
    with stages.stage("text"):
        embedded = conditioning.embed_texts(used)

    for name in ("prompt", "negative_prompt"):
        for text in {getattr(job, name) for job in jobs} & used:
            if embedded[text].lost:
                logger.warning(
                    "--%s is longer than %d tokens: without %r",
                    *(name, sampler.TEXT_TOKENS, embedded[text].lost),
                )
    texts = {
        job: sampler.Text(
            embedded[job.prompt].embeds,
            embedded[job.negative_prompt].embeds if guided else None,
        )
        for job in jobs
    }
    return identities, texts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _digest_of_the_code() -> str:
    files = (Path(faces.__file__), Path(sampler.__file__), Path(__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _as_tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
