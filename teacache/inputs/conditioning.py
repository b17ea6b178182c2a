"""The faces and texts that videos are conditioned on: read from the cache, or computed.

The models that compute them are large, and nothing else needs them. Each is loaded only where the
cache lacks something, and is freed before the next one is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from teacache.base import device as devices
from teacache.base.errors import without_credentials
from teacache.checkpoint.pipeline import load_pipeline
from teacache.inputs import identity as faces
from teacache.inputs.embedding_cache import fingerprint
from teacache.inputs.photograph import pixels_sha256
from teacache.inputs.text import EmbeddedText, embed_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from PIL import Image

    from teacache.inputs.embedding_cache import EmbeddingCache

TEXT_PACKAGES = ("torch", "transformers", "diffusers", "sentencepiece")
# Some packages have several names; one of them is installed.
FACE_PACKAGES = (
    *("torch", "torchvision", "diffusers", "insightface", "facexlib", "consisid-eva-clip"),
    *("onnxruntime", "onnxruntime-gpu", "opencv-python", "opencv-python-headless"),
)


class Conditioning:
    """The faces and texts of one run.

    Args:
        offload: see `teacache.load_pipeline`.
        cache: of the embeddings of earlier runs.
    """

    def __init__(
        self,
        checkpoint: Path,
        device: torch.device,
        dtype: torch.dtype,
        offload: str,
        cache: EmbeddingCache,
    ):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.offload, self.cache = offload, cache
        self._fingerprints: dict[str, str] = {}

    def find_identities(self, images: dict[str, Image.Image]) -> dict[str, faces.Identity]:
        """The identity in each image, by the image's source.

        Raises:
            ImageError: where an image has no face.
        """
        keys = {source: self.face_key(image) for source, image in images.items()}
        identities = {}
        for source, key in keys.items():
            if entry := self.cache.get(key, faces.TENSORS):
                identities[source] = faces.from_tensors(entry, self.device)
        missing = [source for source in images if source not in identities]
        if missing:
            models = faces.load_face_models(self.checkpoint, self.device, self.dtype)
            for source in missing:
                name = f"--image {without_credentials(source)}"
                identities[source] = faces.find_identity(
                    images[source], models, self.device, self.dtype, name
                )
                self.cache.put(keys[source], faces.as_tensors(identities[source]))
            del models
            devices.free_cached_memory(self.device)
        return identities

    def embed_texts(self, texts: Iterable[str]) -> dict[str, EmbeddedText]:
        """The embeddings of each text."""
        keys = {text: self.text_key(text) for text in texts}
        embedded = {}
        for text, key in keys.items():
            if entry := self.cache.get(key, EmbeddedText._fields):
                embeds = entry.pop("embeds").to(self.device)
                unread = {name: bytes(each.tolist()).decode() for name, each in entry.items()}
                embedded[text] = EmbeddedText(embeds, **unread)
        missing = [text for text in keys if text not in embedded]
        if missing:
            pipe = load_pipeline(
                self.checkpoint, self.device, self.dtype, self.offload, parts=("text_encoder",)
            )
            for text in missing:
                embeds, *words = embedded[text] = embed_text(pipe, text)
                as_bytes = [torch.tensor(list(each.encode()), dtype=torch.uint8) for each in words]
                fields = zip(EmbeddedText._fields, (embeds, *as_bytes), strict=True)
                self.cache.put(keys[text], dict(fields))
            del pipe
            devices.free_cached_memory(self.device)
        return embedded

    def face_key(self, image: Image.Image) -> dict[str, str]:
        """The cache key of a face: all that its embeddings depend on."""
        pixels = f"{image.width}x{image.height} {pixels_sha256(image)}"
        return {**self._key("face_encoder", packages=FACE_PACKAGES), "image": pixels}

    def text_key(self, text: str) -> dict[str, str]:
        """The cache key of a text: all that its embeddings depend on."""
        return {**self._key("text_encoder", "tokenizer", packages=TEXT_PACKAGES), "text": text}

    def _key(self, *components: str, packages: tuple[str, ...]) -> dict[str, str]:
        """The part of a key that all faces share, or all texts.

        It has the device, since another GPU may round differently, and a digest of the code that
        computes the embeddings.
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
            "code": _code_digest(),
            **{package: installed_version(package) for package in packages},
        }


def installed_version(package: str) -> str:
    """The version of a package, or `none` where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _code_digest() -> str:
    code = (faces.find_identity, embed_text, load_pipeline, Conditioning)
    files = [Path(str(sys.modules[each.__module__].__file__)) for each in code]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
