"""TeaCache on one transformer: what it remembers from step to step, and from video to video."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch

from teacache.device import mark
from teacache.patch import take_away
from teacache.policy import Coefficients, Policy, check_threshold, relative_l1

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline, ConsisIDTransformer3DModel

logger = logging.getLogger(__name__)


class TeaCacheHandle:
    """TeaCache on one transformer: its settings, the state of the video under way, its undoing.

    Made by `apply_teacache`. As a context manager it undoes itself at the end of the block.

    Attributes:
        transformer: the patched transformer.
        given_steps: the steps to compute, instead of those that the rule decides on; None, at
            first, leaves it to the rule. Setting them takes effect with the next video.
        policy: the schedule of the last video, or of the one under way; None before the first.
        forward: what stands in the place of the transformer's own forward.
        step_started: a mark in the device's work as each of its steps began, see
            `teacache.device.mark`.
    """

    def __init__(
        self,
        transformer: ConsisIDTransformer3DModel,
        rel_l1_thresh: float,
        coefficients: Coefficients,
        pipe: ConsisIDPipeline | None,
        num_inference_steps: int | None,
    ):
        self.transformer = transformer
        self.coefficients = coefficients
        self.rel_l1_thresh = rel_l1_thresh
        self.given_steps: frozenset[int] | None = None
        self.forward: Callable | None = None
        self.policy: Policy | None = None
        self.step_started: list[float | torch.cuda.Event] = []
        self._pipe = pipe
        self._num_inference_steps = num_inference_steps
        self._told_of_extrapolation = False
        self.removed = False
        self.reset()

    @property
    def rel_l1_thresh(self) -> float:
        """Threshold on the accumulated distance. Setting it takes effect with the next video."""
        return self._rel_l1_thresh

    @rel_l1_thresh.setter
    def rel_l1_thresh(self, value: float) -> None:
        self._rel_l1_thresh = check_threshold(value)

    def reset(self) -> None:
        """Forget the video under way, so that the next step is the first one of a new video.

        Videos in a row need no call, interrupted ones included, but in one case: a transformer
        that stands alone, and a new video that starts below the timestep the last one stopped at.
        """
        self._timesteps: torch.Tensor | None = None
        self._timestep_values: list[float] = []
        self._distances: dict[tuple[float, float], float] = {}
        self._last_timestep: float | None = None
        self._shape: torch.Size | None = None
        self._embedding: torch.Tensor | None = None
        self._residual: torch.Tensor | None = None
        self._face_inputs: list[torch.Tensor] | None = None
        self._face_embedding: torch.Tensor | None = None

    def remove(self) -> None:
        """Undo the patch and drop what is cached. A second call does nothing.

        Where something else has wrapped the patched forward since, the patch stays underneath and
        calls the plain forward.
        """
        take_away(self.transformer, self.forward)
        self.removed = True
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def begin_step(
        self, timestep: torch.Tensor, embedding: torch.Tensor, shape: torch.Size
    ) -> bool:
        """Whether this step is computed. Starts a new video where the step belongs to one.

        Args:
            timestep: [batch], one value repeated.
            embedding: [batch, time_embed_dim], the timestep embedding.
            shape: of the transformer's input, [batch, latent frames, channels, height, width].
        """
        t = self._value_of(timestep)
        if self._starts_a_video(t, shape):
            self.reset()
            num_steps = self._num_inference_steps
            if self._pipe is not None:
                self._timesteps = self._pipe.scheduler.timesteps
                self._timestep_values = self._timesteps.tolist()
                self._distances = self._measure_ahead(len(timestep), embedding.dtype)
                num_steps = len(self._timesteps)
            self.policy = Policy(num_steps, self.rel_l1_thresh, self.coefficients, self.given_steps)
            self.step_started = []

        distance = None
        if self._embedding is not None:
            distance = self._distances.get((self._last_timestep, t))
            if distance is None:
                distance = relative_l1(embedding, self._embedding).item()
        self._last_timestep, self._shape, self._embedding = t, shape, embedding
        compute = self.policy.decide(distance)
        self.step_started.append(mark(embedding.device))
        self._warn_of_extrapolation()
        return compute

    def _value_of(self, timestep: torch.Tensor) -> float:
        """The timestep as a number.

        To read it from a GPU is to wait for all that the GPU has been given to do. A step of the
        video under way is a view of its scheduler's timesteps: where in them says which.
        """
        own = self._timesteps
        if own is not None and timestep.untyped_storage().data_ptr() == (
            own.untyped_storage().data_ptr()
        ):
            return self._timestep_values[timestep.storage_offset() - own.storage_offset()]
        return float(timestep.flatten()[0])

    def _measure_ahead(self, batch: int, dtype: torch.dtype) -> dict[tuple[float, float], float]:
        """x between each two timesteps of the video under way, by their values.

        The embedding depends on the timestep alone. Measured here, all of them wait for the device
        once; measured step by step, at every step.
        """
        embeddings = [
            embed_timestep(self.transformer, t.expand(batch), dtype) for t in self._timesteps
        ]
        distances = [relative_l1(e, previous) for previous, e in itertools.pairwise(embeddings)]
        values = itertools.pairwise(self._timestep_values)
        return dict(zip(values, torch.stack(distances).tolist(), strict=True)) if distances else {}

    def _starts_a_video(self, t: float, shape: torch.Size) -> bool:
        """Every sign of a new video, so that one that was interrupted leaves nothing behind.

        A scheduler makes a new tensor of timesteps for each video. A transformer that stands alone
        has to go by its count of steps, and by what holds within a video: timesteps fall, and the
        shape stays.
        """
        return (
            self._last_timestep is None
            or self.policy.step >= self.policy.num_steps
            or (self._pipe is not None and self._pipe.scheduler.timesteps is not self._timesteps)
            or not t < self._last_timestep
            or self._shape != shape
        )

    def keep_residual(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Cache what the block stack added, where a later step of the video may reuse it.

        Args:
            before, after: [batch, video tokens, inner dim], into and out of the block stack.
        """
        ended = self.policy.step >= self.policy.num_steps
        if ended:
            # The next step belongs to another video: leave the memory to the VAE.
            self.reset()
        elif self.policy.may_reuse:
            self._residual = after - before

    def reuse_residual(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, video tokens, inner dim] with the cached residual in place of the blocks."""
        return hidden_states + self._residual

    def face_embedding(
        self,
        id_cond: torch.Tensor,
        id_vit_hidden: list[torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The local facial extractor's output, [1, queries, output dim], once for each video.

        Args:
            id_cond: [1, 1280].
            id_vit_hidden: five of [1, 577, ViT width].
        """
        given = [id_cond, *id_vit_hidden]
        if self._face_inputs is None or not _same_tensors(given, self._face_inputs):
            self._face_inputs = given
            id_cond, *id_vit_hidden = (tensor.to(device=device, dtype=dtype) for tensor in given)
            self._face_embedding = self.transformer.local_facial_extractor(id_cond, id_vit_hidden)
        return self._face_embedding

    def _warn_of_extrapolation(self) -> None:
        policy, step = self.policy, self.policy.step - 1
        # Threshold 0 and the last step compute in any case.
        matters = policy.rel_l1_thresh > 0 and step < policy.num_steps - 1 and policy.given is None
        if matters and step in policy.extrapolated_steps and not self._told_of_extrapolation:
            self._told_of_extrapolation = True
            logger.warning(
                "step %d: the timestep embedding moved by %.4f, which the coefficients (%s) do not "
                "cover: such steps are computed",
                step,
                policy.distances[step],
                self.coefficients.source,
            )


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


def _same_tensors(given: list[torch.Tensor], known: list[torch.Tensor]) -> bool:
    # Offload hooks may hand over fresh copies at every step: then the values decide.
    return len(given) == len(known) and all(
        a is b or (a.device == b.device and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(given, known, strict=True)
    )
