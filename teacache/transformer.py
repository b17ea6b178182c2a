"""The ConsisID transformer's forward with TeaCache in it, its application and its undoing."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import ConsisIDTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale

from teacache.errors import ArgumentError
from teacache.policy import COGVIDEOX_5B, Coefficients, Policy, check_threshold, relative_l1

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline

logger = logging.getLogger(__name__)


class TeaCacheHandle:
    """TeaCache on one transformer: its settings, the state of the video under way, its undoing.

    Made by `apply_teacache`. As a context manager it undoes itself at the end of the block.

    Attributes:
        transformer: the patched transformer.
        policy: the schedule of the last video, or of the one under way; None before the first.
        step_started: the clock (`time.perf_counter`) as each of its steps was decided on. To
            decide, the distance is read from the device, so all work of the step before is done.
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
        self.policy: Policy | None = None
        self.step_started: list[float] = []
        self._pipe = pipe
        self._num_inference_steps = num_inference_steps
        self._told_of_extrapolation = False
        self.removed = False
        self.reset()
        self._forward = _patch(transformer, self)

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
        _unpatch(self.transformer, self._forward)
        self.removed = True
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def begin_step(
        self, timestep: torch.Tensor, embedding: torch.Tensor, hidden_states: torch.Tensor
    ) -> bool:
        """Whether this step is computed. Starts a new video where the step belongs to one.

        Args:
            timestep: [batch], one value repeated.
            embedding: [batch, time_embed_dim], the timestep embedding.
            hidden_states: [batch, video tokens, inner dim], after the patch embedding.
        """
        t = float(timestep.flatten()[0])
        if self._starts_a_video(t, hidden_states):
            self.reset()
            if self._pipe is not None:
                self._timesteps = self._pipe.scheduler.timesteps
                num_steps = len(self._timesteps)
            else:
                num_steps = self._num_inference_steps
            self.policy = Policy(num_steps, self.rel_l1_thresh, self.coefficients)
            self.step_started = []
        self._last_timestep, self._shape = t, hidden_states.shape

        distance = None
        if self._embedding is not None:
            distance = relative_l1(embedding, self._embedding)
        self._embedding = embedding
        compute = self.policy.decide(distance)
        self.step_started.append(time.perf_counter())
        self._warn_of_extrapolation()
        return compute

    def _starts_a_video(self, t: float, hidden_states: torch.Tensor) -> bool:
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
            or self._shape != hidden_states.shape
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
        elif self.policy.rel_l1_thresh > 0:
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
        matters = policy.rel_l1_thresh > 0 and step < policy.num_steps - 1
        if matters and step in policy.extrapolated_steps and not self._told_of_extrapolation:
            self._told_of_extrapolation = True
            logger.warning(
                "step %d: the timestep embedding moved by %.4f, which the coefficients (%s) do not "
                "cover: such steps are computed",
                step,
                policy.distances[step],
                self.coefficients.source,
            )


def apply_teacache(
    pipe_or_transformer: ConsisIDPipeline | ConsisIDTransformer3DModel,
    rel_l1_thresh: float = 0.1,
    *,
    coefficients: Coefficients = COGVIDEOX_5B,
    num_inference_steps: int | None = None,
) -> TeaCacheHandle:
    """Patch one ConsisID transformer's forward with TeaCache.

    With every step computed, the output equals the unpatched forward's bit for bit. Sampling only:
    nothing here is meant to be differentiated through.

    Args:
        pipe_or_transformer: a ConsisIDPipeline, or its transformer alone.
        rel_l1_thresh: threshold on the accumulated distance; 0 is the original sampler.
        coefficients: the polynomial that rescales the distance.
        num_inference_steps: denoising steps of a video, needed for a transformer that stands
            alone; a pipeline's are read from its scheduler, video by video.

    Returns:
        The handle: `handle.policy` is the schedule of the last video, `handle.remove()` undoes the
        patch, and `with apply_teacache(...)` undoes it at the end of the block.

    Raises:
        ArgumentError: for what is no ConsisID transformer, has TeaCache already, or has been
            wrapped in a way that the patch could not be undone from.
    """
    transformer = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
    if not isinstance(transformer, ConsisIDTransformer3DModel):
        raise ArgumentError(
            "apply_teacache needs a ConsisIDPipeline or a ConsisIDTransformer3DModel, "
            f"found {type(pipe_or_transformer).__name__}"
        )
    pipe = None if transformer is pipe_or_transformer else pipe_or_transformer
    if pipe is None and (num_inference_steps is None or num_inference_steps < 1):
        raise ArgumentError(
            "a transformer without its pipeline needs num_inference_steps, 1 or more: "
            f"found {num_inference_steps}"
        )
    if pipe is not None and num_inference_steps is not None:
        raise ArgumentError(
            "num_inference_steps is for a transformer alone: a pipeline has its own"
        )
    return TeaCacheHandle(transformer, rel_l1_thresh, coefficients, pipe, num_inference_steps)


def _dispatch(transformer: ConsisIDTransformer3DModel, teacache: TeaCacheHandle, *args, **kwargs):
    """What stands in the place of the transformer's forward."""
    if teacache.removed:
        return type(transformer).forward(transformer, *args, **kwargs)
    return _forward(transformer, teacache, *args, **kwargs)


@apply_lora_scale("attention_kwargs")
def _forward(
    self: ConsisIDTransformer3DModel,
    teacache: TeaCacheHandle,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    timestep: torch.Tensor,
    timestep_cond: torch.Tensor | None = None,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    id_cond: torch.Tensor | None = None,
    id_vit_hidden: list[torch.Tensor] | None = None,
    return_dict: bool = True,
) -> tuple[torch.Tensor] | Transformer2DModelOutput:
    """`ConsisIDTransformer3DModel.forward`, with the block stack computed or reused.

    Args:
        hidden_states: [batch, latent frames, channels, height, width].
        encoder_hidden_states: [batch, text tokens, text embed dim].
        timestep: [batch].
        id_cond, id_vit_hidden: the identity, see `TeaCacheHandle.face_embedding`.
    """
    batch_size, num_frames, _, height, width = hidden_states.shape
    text_seq_length = encoder_hidden_states.shape[1]

    # The sinusoids are float32 whatever the model is; the embedding runs in the sampling dtype.
    t_emb = self.time_proj(timestep).to(dtype=hidden_states.dtype)
    emb = self.time_embedding(t_emb, timestep_cond)  # [batch, time_embed_dim]

    embedded = self.patch_embed(encoder_hidden_states, hidden_states)
    embedded = self.embedding_dropout(embedded)
    text = embedded[:, :text_seq_length]  # [batch, text tokens, inner dim]
    video = embedded[:, text_seq_length:]  # [batch, video tokens, inner dim]

    if teacache.begin_step(timestep, emb, video):
        face = None
        if self.is_train_face:
            face = teacache.face_embedding(id_cond, id_vit_hidden, video.device, video.dtype)
        out = _blocks(self, video, text, emb, image_rotary_emb, face)
        teacache.keep_residual(before=video, after=out)
        video = out
    else:
        video = teacache.reuse_residual(video)

    # The text tokens end here: norms and projection work on each token alone.
    video = self.norm_final(video)
    video = self.norm_out(video, temb=emb)
    video = self.proj_out(video)  # [batch, video tokens, patch x patch x out channels]

    p = self.config.patch_size
    video = video.reshape(batch_size, num_frames, height // p, width // p, -1, p, p)
    output = video.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _blocks(
    transformer: ConsisIDTransformer3DModel,
    video: torch.Tensor,
    text: torch.Tensor,
    emb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    face: torch.Tensor | None,
) -> torch.Tensor:
    """The block stack, with identity cross-attention after every `cross_attn_interval`-th block."""
    for index, block in enumerate(transformer.transformer_blocks):
        video, text = block(
            hidden_states=video,
            encoder_hidden_states=text,
            temb=emb,
            image_rotary_emb=image_rotary_emb,
        )
        if face is not None and index % transformer.cross_attn_interval == 0:
            attend = transformer.perceiver_cross_attention[index // transformer.cross_attn_interval]
            video = video + transformer.local_face_scale * attend(face, video)
    return video


def _same_tensors(given: list[torch.Tensor], known: list[torch.Tensor]) -> bool:
    # Offload hooks may hand over fresh copies at every step: then the values decide.
    return len(given) == len(known) and all(
        a is b or (a.device == b.device and a.shape == b.shape and torch.equal(a, b))
        for a, b in zip(given, known, strict=True)
    )


def _patch(transformer: ConsisIDTransformer3DModel, handle: TeaCacheHandle) -> functools.partial:
    """Put the forward in place, under accelerate's offload hooks where the model has them.

    Such a hook keeps the forward that it wraps in `_old_forward`, and puts it back when it goes;
    so the innermost forward is the one to replace, whichever of the two came first.
    """
    hooked = "_old_forward" in vars(transformer)
    name = "_old_forward" if hooked else "forward"
    innermost = vars(transformer).get(name)
    if isinstance(innermost, functools.partial) and innermost.func is _dispatch:
        raise ArgumentError("this transformer has TeaCache already: remove() the first one")
    plain = type(transformer).forward
    if innermost is not None and getattr(innermost, "__func__", None) is not plain:
        raise ArgumentError(
            "this transformer's forward is wrapped by something else than an accelerate hook: "
            "apply TeaCache first"
        )
    forward = functools.partial(_dispatch, transformer, handle)
    setattr(transformer, name, forward)
    return forward


def _unpatch(transformer: ConsisIDTransformer3DModel, forward: functools.partial) -> None:
    if vars(transformer).get("_old_forward") is forward:
        transformer._old_forward = type(transformer).forward.__get__(transformer)
    elif vars(transformer).get("forward") is forward:
        del transformer.forward
