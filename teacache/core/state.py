"""The state of one video, from its first denoising step to its last."""

import threading
from dataclasses import dataclass, field

import torch
from diffusers import ConsisIDTransformer3DModel

from teacache.base.errors import ArgumentError
from teacache.core.forecast import Forecast
from teacache.core.rule import Schedule


@dataclass
class VideoState:
    """The state of one video. The next video has a new state.

    Attributes:
        timesteps: the scheduler's own tensor. `set_timesteps` makes a new one for each video, so
            another tensor means another video.
        plan: the schedule, known before the first step.
        step: index of the step of the next forward.
        forecast: None if steps are reused by the residual.
        residual: [batch, video tokens, inner dim], output minus input of the block stack at the
            last computed step; None if the next step does not reuse it.
        face: inputs of the local facial extractor, and its output [1, queries, output dim].
        thread: identifier of the thread that denoises the video.
    """

    timesteps: torch.Tensor
    plan: Schedule
    step: int = 0
    forecast: Forecast | None = None
    residual: torch.Tensor | None = None
    face: tuple[list[torch.Tensor], torch.Tensor] | None = None
    thread: int = field(default_factory=threading.get_ident)

    @property
    def is_computed(self) -> bool:
        """Whether the next step is computed."""
        return self.step in self.plan.computed_steps

    @property
    def done(self) -> Schedule:
        """The part of the plan that is done."""
        return self.plan.until(self.step)

    def face_embedding(
        self,
        transformer: ConsisIDTransformer3DModel,
        id_cond: torch.Tensor | None,
        id_vit_hidden: list[torch.Tensor] | None,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """The local facial extractor's output, [1, queries, output dim], computed once a video.

        id_cond: [1, 1280]. id_vit_hidden: five of [1, 577, ViT width]. like: a tensor with the
        device and dtype of the computation.
        """
        if id_cond is None or id_vit_hidden is None:
            raise ArgumentError("this transformer needs an identity: id_cond and id_vit_hidden")
        inputs = [id_cond, *id_vit_hidden]
        if self.face is None or not _same_tensors(inputs, self.face[0]):
            id_cond, *id_vit_hidden = (tensor.to(like) for tensor in inputs)
            self.face = inputs, transformer.local_facial_extractor(id_cond, id_vit_hidden)
        return self.face[1]


def _same_tensors(inputs: list[torch.Tensor], known: list[torch.Tensor]) -> bool:
    # Offload hooks may pass new copies at every step, so the values are compared.
    return all(
        a is b or (a.device == b.device and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(inputs, known, strict=True)
    )


def is_at(timestep: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the transformer is called at the expected timestep.

    timestep: [batch]. expected: a scalar, one of the scheduler's timesteps. A sampler passes a view
    of these. Then no synchronisation is necessary.
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
    """The embedding of timesteps, [batch] to [batch, time_embed_dim], as in the plain forward.

    The sinusoids are always float32; the embedding is computed in the sampling dtype.
    """
    sinusoids = transformer.time_proj(timestep).to(dtype)
    return transformer.time_embedding(sinusoids, timestep_cond)
