"""The conditions of videos, made for a window of them at a time.

Face models, text encoder and transformer follow one another on the GPU, so each change costs a
load. The conditions of a window wait in host memory, and a video's move to the GPU at its turn.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from teacache.base.console import Stages
from teacache.base.files import cache_folder
from teacache.checkpoint.size import host_memory_bytes
from teacache.inputs.conditioning import Conditioning
from teacache.inputs.embedding_cache import EmbeddingCache
from teacache.inputs.identity import Identity, from_tensors
from teacache.inputs.photograph_store import PhotographStore
from teacache.inputs.text import Text
from teacache.preflight.setup import Setup, Shot

logger = logging.getLogger(__name__)

CONDITION_BYTES = 9 * 10**6  # of one video at full size in bfloat16: a face 7 MB, a prompt 2 MB
SHARE = 200  # a window takes this part of host memory at most
LARGEST = 20  # videos; more would save less than a second a video


class Condition(NamedTuple):
    """A video's face and texts in host memory. Videos share equal ones."""

    face: dict[str, torch.Tensor]
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None

    def identity(self, device: torch.device) -> Identity:
        """The face, with its embeddings on the device."""
        return from_tensors(self.face, device)

    def text(self, device: torch.device) -> Text:
        """The texts on the device."""
        embeds, negative = self.prompt_embeds.to(device), self.negative_prompt_embeds
        return Text(embeds, None if negative is None else negative.to(device))


class Conditions:
    """Makes conditions, and warns about each prompt once."""

    def __init__(self, setup: Setup, photographs: PhotographStore, stages: Stages):
        cache = EmbeddingCache(cache_folder() / "embeddings")
        self._models = Conditioning(
            setup.checkpoint, setup.device, setup.dtype, setup.machine.offload, cache
        )
        self._guided = setup.options.format.guided
        self._photographs, self._stages = photographs, stages
        self._warned: set[tuple[str, str]] = set()

    def of(self, shots: Sequence[Shot]) -> list[Condition]:
        """The condition of each shot.

        Raises:
            ImageError: where a photograph has no face.
        """
        with self._stages.stage("identity"):
            faces = self._models.find_faces([shot.job.image for shot in shots], self._photographs)
        prompts = [("prompt", shot.job.prompt) for shot in shots]
        if self._guided:
            prompts += [("negative_prompt", shot.job.negative_prompt) for shot in shots]
        with self._stages.stage("text"):
            texts = self._models.embed_texts([text for _, text in prompts])
        for flag, text in dict.fromkeys(prompts):
            if (complaint := texts[text].complaint) and (flag, text) not in self._warned:
                logger.warning("--%s %s", flag, complaint)
                self._warned.add((flag, text))
        return [
            Condition(
                faces[shot.job.image],
                texts[shot.job.prompt].embeds,
                texts[shot.job.negative_prompt].embeds if self._guided else None,
            )
            for shot in shots
        ]


def window_size() -> int:
    """The number of videos in a window, by the memory of this machine."""
    return min(max(host_memory_bytes() // SHARE // CONDITION_BYTES, 1), LARGEST)
