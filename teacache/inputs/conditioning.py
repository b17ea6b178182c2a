"""The faces and texts that videos are conditioned on: read from the cache, or computed.

The models that compute them are large, and nothing else needs them. Each is loaded only where the
cache lacks something, and is freed before the next one is loaded.
"""

import functools
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from teacache.base import device as devices
from teacache.base.errors import without_credentials
from teacache.base.files import fingerprint
from teacache.checkpoint.pipeline import load_pipeline
from teacache.inputs import identity as faces
from teacache.inputs.embedding_cache import EmbeddingCache
from teacache.inputs.photograph_store import Photograph, PhotographStore
from teacache.inputs.text import EmbeddedText, embed_text

TEXT_PACKAGES = ("torch", "transformers", "diffusers", "sentencepiece")
# Some packages have several names; one of them is installed.
FACE_PACKAGES = (
    *("torch", "torchvision", "diffusers", "insightface", "facexlib", "consisid-eva-clip"),
    *("onnxruntime", "onnxruntime-gpu", "opencv-python", "opencv-python-headless"),
)


@dataclass
class Conditioning:
    """The faces and texts of one run.

    offload: see `teacache.load_pipeline`. cache: of the embeddings of earlier runs.
    """

    checkpoint: Path
    device: torch.device
    dtype: torch.dtype
    offload: str
    cache: EmbeddingCache
    _fingerprints: dict[str, str] = field(default_factory=dict, init=False)

    def find_faces(
        self, sources: Iterable[str], photographs: PhotographStore
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The face in each photograph as `teacache.inputs.identity.as_tensors`, by its source.

        Raises:
            ImageError: where a photograph has no face.
        """
        keys = {source: self.face_key(photographs.look_at(source)) for source in sources}
        found = {source: self.cache.get(key, faces.TENSORS) for source, key in keys.items()}
        result = {source: tensors for source, tensors in found.items() if tensors}
        if missing := [source for source in keys if source not in result]:
            models = faces.load_face_models(self.checkpoint, self.device, self.dtype)
            for source in missing:
                name = f"--image {without_credentials(source)}"
                image = photographs.load(source)
                identity = faces.find_identity(image, models, self.device, self.dtype, name)
                result[source] = faces.as_tensors(identity)
                self.cache.put(keys[source], result[source])
            del models
            devices.free_cached_memory(self.device)
        return result

    def embed_texts(self, texts: Iterable[str]) -> dict[str, EmbeddedText]:
        """The embeddings of each text, on the host."""
        keys = {text: self.text_key(text) for text in texts}
        embedded = {}
        for text, key in keys.items():
            if entry := self.cache.get(key, EmbeddedText._fields):
                embeds = entry.pop("embeds")
                unread = {name: bytes(each.tolist()).decode() for name, each in entry.items()}
                embedded[text] = EmbeddedText(embeds, **unread)
        if missing := [text for text in keys if text not in embedded]:
            pipe = load_pipeline(
                self.checkpoint, self.device, self.dtype, self.offload, parts=("text_encoder",)
            )
            for text in missing:
                embeds, *words = embed_text(pipe, text)
                embedded[text] = EmbeddedText(embeds.cpu(), *words)
                as_bytes = [torch.tensor(list(each.encode()), dtype=torch.uint8) for each in words]
                fields = zip(EmbeddedText._fields, (embeds, *as_bytes), strict=True)
                self.cache.put(keys[text], dict(fields))
            del pipe
            devices.free_cached_memory(self.device)
        return embedded

    def face_key(self, photograph: Photograph) -> dict[str, str]:
        """The cache key of a face: all that its embeddings depend on."""
        pixels = f"{photograph.width}x{photograph.height} {photograph.sha256}"
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
