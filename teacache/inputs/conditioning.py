"""What videos are conditioned on, faces and texts: from the cache where it has them, else computed.

The models for it are large, and needed for nothing else: each is loaded only if the cache lacks
something, and gone again before the next one comes.
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
# Some of them come under several names, of which one is installed.
FACE_PACKAGES = (
    *("torch", "torchvision", "diffusers", "insightface", "facexlib", "consisid-eva-clip"),
    *("onnxruntime", "onnxruntime-gpu", "opencv-python", "opencv-python-headless"),
)


class Conditioning:
    """The faces and texts of one run.

    Args:
        offload: see `teacache.load_pipeline`.
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
        self._fingerprints: dict[str, str] = {}

    def find_identities(self, images: dict[str, Image.Image]) -> dict[str, faces.Identity]:
        """The identity in each image, by the image's source.

        Raises:
            ImageError: where one has no face.
        """
        keys, found = {}, {}
        if self.cache:
            for source, image in images.items():
                keys[source] = self.face_key(image)
                entry = self.cache.get(keys[source], faces.TENSORS)
                if entry:
                    found[source] = faces.from_tensors(entry, self.device)
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

    def embed_texts(self, texts: Iterable[str]) -> dict[str, EmbeddedText]:
        """Each text's embeddings."""
        wanted = dict.fromkeys(texts)
        embedded = {text: cached for text in wanted if (cached := self._cached_text(text))}
        missing = [text for text in wanted if text not in embedded]
        if missing:
            pipe = load_pipeline(
                self.checkpoint, self.device, self.dtype, self.offload, parts=("text_encoder",)
            )
            for text in missing:
                embedded[text] = embed_text(pipe, text)
                if self.cache:
                    lost = torch.tensor(list(embedded[text].lost.encode()), dtype=torch.uint8)
                    entry = {"embeds": embedded[text].embeds, "lost": lost}
                    self.cache.put(self.text_key(text), entry)
            del pipe
            devices.free_cached_memory(self.device)
        return embedded

    def _cached_text(self, text: str) -> EmbeddedText | None:
        names = ("embeds", "lost")
        entry = self.cache.get(self.text_key(text), names) if self.cache else None
        if entry is None:
            return None
        lost = bytes(entry["lost"].tolist()).decode()
        return EmbeddedText(entry["embeds"].to(self.device), lost)

    def face_key(self, image: Image.Image) -> dict[str, str]:
        """What the embeddings of a face depend on."""
        pixels = f"{image.width}x{image.height} {pixels_sha256(image)}"
        return {**self._key("face_encoder", packages=FACE_PACKAGES), "image": pixels}

    def text_key(self, text: str) -> dict[str, str]:
        """What the embeddings of a text depend on."""
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
            **{package: installed_version(package) for package in packages},
        }


def installed_version(package: str) -> str:
    """The version of a package, or `none` where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _digest_of_the_code() -> str:
    code = (faces.find_identity, embed_text, load_pipeline, Conditioning)
    files = [Path(str(sys.modules[each.__module__].__file__)) for each in code]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
