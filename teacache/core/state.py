"""The state of one video, from its first denoising step to its last."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from teacache.base.errors import ArgumentError
from teacache.core.forecast import Forecast
from teacache.core.rule import Schedule

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel


@dataclass
class VideoState:
    """The state of one video. Another video gets another: nothing is carried over.

    Attributes:
        timesteps: the scheduler's own tensor. `set_timesteps` makes a new one for each video, so
            another tensor means another video.
        plan: its schedule, made before its first step.
        step: index of the step that the next forward is.
        forecast: where steps are reused by it.
        residual: [batch, video tokens, inner dim], what the block stack added at the last computed
            step, where a later step reuses it.
        face: the local facial extractor's inputs, and its output [1, queries, output dim].
        thread: which denoises it.
    """

    timesteps: torch.Tensor
    plan: Schedule
    step: int = 0
    forecast: Forecast | None = None
    residual: torch.Tensor | None = None
    face: tuple[list[torch.Tensor], torch.Tensor] | None = None
    thread: int = field(default_factory=threading.get_ident)

    @property
    def done(self) -> Schedule:
        """The plan as far as it was followed."""
        return self.plan.until(self.step)

    def face_embedding(
        self,
        transformer: ConsisIDTransformer3DModel,
        id_cond: torch.Tensor | None,
        id_vit_hidden: list[torch.Tensor] | None,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """The local facial extractor's output, [1, queries, output dim], once for each video.

        Args:
            id_cond: [1, 1280].
            id_vit_hidden: five of [1, 577, ViT width].
            like: a tensor of the device and the dtype to compute with.
        """
        if id_cond is None or id_vit_hidden is None:
            raise ArgumentError("this transformer needs an identity: id_cond and id_vit_hidden")
        inputs = [id_cond, *id_vit_hidden]
        if self.face is None or not _same_tensors(inputs, self.face[0]):
            id_cond, *id_vit_hidden = (tensor.to(like) for tensor in inputs)
            self.face = inputs, transformer.local_facial_extractor(id_cond, id_vit_hidden)
        return self.face[1]


def _same_tensors(inputs: list[torch.Tensor], known: list[torch.Tensor]) -> bool:
    # Offload hooks may hand over fresh copies at every step: then the values decide.
    return all(
        a is b or (a.device == b.device and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(inputs, known, strict=True)
    )


def is_at(timestep: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the transformer is called at that timestep.

    A sampler passes a view of the scheduler's timesteps. Then nothing waits for the GPU.

    Args:
        timestep: [batch]; expected: a scalar, one of the scheduler's timesteps.
    """
    if torch._C._is_alias_of(timestep, expected):  # type: ignore[attr-defined]
        return int(timestep.storage_offset()) == int(expected.storage_offset())
    return bool((timestep == expected).all())


def embed_timestep(
    transformer: ConsisIDTransformer3DModel,
    timestep: torch.Tensor,
    dtype: torch.dtype,
    timestep_cond: torch.Tensor | None = None,
) -> torch.Tensor:
    """The timestep embedding, [batch, time_embed_dim], as the transformer's forward makes it.

    The sinusoids are float32 whatever the model is; the embedding runs in the sampling dtype.

    Args:
        timestep: [batch].
    """
    sinusoids = transformer.time_proj(timestep).to(dtype)
    return transformer.time_embedding(sinusoids, timestep_cond)
