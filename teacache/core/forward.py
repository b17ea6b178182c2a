"""The forward of the ConsisID transformer with TeaCache, and the function that applies it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConsisIDTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale

from teacache.base.errors import ArgumentError
from teacache.base.patch import forwards, put_in_place
from teacache.core.handle import TeaCacheHandle
from teacache.core.ranks import Share
from teacache.core.rule import COGVIDEOX_5B, PUBLISHED, Coefficients, Limits, Schedule
from teacache.core.state import embed_timestep

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline
    from diffusers.models.embeddings import CogVideoXPatchEmbed
    from diffusers.models.transformers.consisid_transformer_3d import PerceiverCrossAttention

    from teacache.core.forecast import Scheduler


def apply_teacache(
    pipe_or_transformer: ConsisIDPipeline | ConsisIDTransformer3DModel,
    rel_l1_thresh: float = 0.1,
    *,
    computed_steps: int | None = None,
    schedule: Schedule | Iterable[int] | None = None,
    reuse: str | None = None,
    coefficients: Coefficients = COGVIDEOX_5B,
    limits: Limits = PUBLISHED,
    scheduler: Scheduler | None = None,
) -> TeaCacheHandle:
    """Patch one ConsisID transformer's forward with TeaCache.

    With every step computed, the output equals the unpatched forward's bit for bit. For sampling
    only, without gradients.

    Args:
        pipe_or_transformer: a ConsisIDPipeline, or its transformer alone.
        rel_l1_thresh: threshold on the accumulated distance; 0 is the original sampler.
        computed_steps: number of steps to compute, instead of a threshold.
        schedule: the steps to compute, instead of both; see `TeaCacheHandle.follow`.
        reuse: how the other steps are reused: `residual`, as published, or `forecast`. By default
            the forecast with `computed_steps`, else the residual.
        coefficients: the polynomial that rescales the distance.
        limits: steps that are computed at any threshold.
        scheduler: of a transformer without a pipeline. The caller's loop must call its
            `set_timesteps` before each video.

    Returns:
        The handle: `handle.schedule` is the schedule of the last video; `handle.remove()`, or the
        end of `with apply_teacache(...)`, undoes the patch.

    Raises:
        ArgumentError: if it is no ConsisID transformer, has TeaCache already, or is wrapped in a
            way that prevents the removal of the patch.
    """
    if computed_steps is not None and schedule is not None:
        raise ArgumentError("computed_steps and schedule both say what to compute: give one")
    transformer = _patchable(pipe_or_transformer, scheduler)

    def current_scheduler() -> Scheduler:
        # At each step, because a pipeline's scheduler may be replaced between videos.
        return pipe_or_transformer.scheduler if scheduler is None else scheduler

    handle = TeaCacheHandle(
        transformer, rel_l1_thresh, coefficients, limits, reuse, current_scheduler, _dispatch
    )
    handle.follow(schedule if computed_steps is None else computed_steps)
    put_in_place(transformer, handle.forward)
    return handle


def _patchable(
    pipe_or_transformer: ConsisIDPipeline | ConsisIDTransformer3DModel, scheduler: Scheduler | None
) -> ConsisIDTransformer3DModel:
    """The transformer, or ArgumentError with the reason why it cannot be patched."""
    transformer = getattr(pipe_or_transformer, "transformer", pipe_or_transformer)
    if hasattr(transformer, "_orig_mod") or getattr(transformer, "_compiled_call_impl", None):
        raise ArgumentError(
            "this transformer is compiled as a whole, and each step would be compiled with its "
            "branch: apply TeaCache to the plain one, and compile each block of "
            "transformer.transformer_blocks by block.compile()"
        )
    if not isinstance(transformer, ConsisIDTransformer3DModel):
        raise ArgumentError(
            "apply_teacache needs a ConsisIDPipeline or a ConsisIDTransformer3DModel, "
            f"found {type(pipe_or_transformer).__name__}"
        )
    if (transformer is pipe_or_transformer) != (scheduler is not None):
        raise ArgumentError("a scheduler is needed for a transformer alone: a pipeline has its own")
    if any(getattr(forward, "func", None) is _dispatch for _, _, forward in forwards(transformer)):
        raise ArgumentError("this transformer has TeaCache already: remove() the first one")
    return transformer


def _dispatch(
    transformer: ConsisIDTransformer3DModel, handle: TeaCacheHandle, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor] | Transformer2DModelOutput:
    """Replaces the transformer's forward."""
    if handle.removed:
        return type(transformer).forward(transformer, *args, **kwargs)
    with handle.alone():
        return _forward(transformer, handle, *args, **kwargs)


@apply_lora_scale("attention_kwargs")
def _forward(
    self: ConsisIDTransformer3DModel,
    handle: TeaCacheHandle,
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

    With the residual, a reused step skips the block stack; with the forecast, everything. A
    computed step has the operations of diffusers 0.42.1,
    models/transformers/consisid_transformer_3d.py.

    Args:
        hidden_states: [batch, latent frames, channels, height, width].
        encoder_hidden_states: [batch, text tokens, text embed dim].
        timestep: [batch].
        id_cond, id_vit_hidden: the identity, see `VideoState.face_embedding`.
    """
    computed = handle.begin_step(timestep, hidden_states.dtype)
    forecast, step = handle.video.forecast, handle.video.step
    if forecast is not None:  # the noisy latents, without the image's
        sample = hidden_states[:, :, : self.config.out_channels].float()
    if forecast is not None and not computed:
        output = forecast.reused(step, sample).to(hidden_states.dtype)
    else:
        emb = embed_timestep(self, timestep, hidden_states.dtype, timestep_cond)
        identity = id_cond, id_vit_hidden
        output = _predict(
            self, handle, hidden_states, encoder_hidden_states, emb, image_rotary_emb, identity
        )
        if forecast is not None:
            output = forecast.computed(step, sample, output.float()).to(output.dtype)
    handle.end_step()
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _predict(
    self: ConsisIDTransformer3DModel,
    handle: TeaCacheHandle,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    emb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    identity: tuple[torch.Tensor | None, list[torch.Tensor] | None],
) -> torch.Tensor:
    """The prediction of v, [batch, latent frames, channels, height, width].

    Each rank computes its share of samples and tokens. A single rank has all of them.

    Args:
        emb: [batch, time embed dim].
        identity: id_cond and id_vit_hidden. All others are as for `_forward`.
    """
    batch_size, num_frames, _, height, width = hidden_states.shape
    text_seq_length, p = encoder_hidden_states.shape[1], self.config.patch_size
    video_seq_length = num_frames * (height // p) * (width // p)

    share = handle.ranks.share(batch_size, text_seq_length, video_seq_length)
    hidden_states, emb = hidden_states[share.batch], emb[share.batch]
    state = handle.video
    if state.is_computed:
        text, video = embed(self, encoder_hidden_states[share.batch], hidden_states, share)
        if image_rotary_emb is not None:
            cosines, sines = image_rotary_emb
            image_rotary_emb = cosines[share.video], sines[share.video]
        face = None
        if self.is_train_face:
            face = state.face_embedding(self, *identity, video)
        out = run_blocks(self, video, text, emb, image_rotary_emb, face)
        if state.forecast is None and state.step + 1 in state.plan.reused_steps:
            state.residual = out - video
        video = out
    else:
        assert state.residual is not None, "the first step is computed"
        video = embed_video(self.patch_embed, hidden_states)[:, share.video] + state.residual

    # Norms and projection work on each token alone, so the text tokens are not needed.
    video = self.norm_final(video)  # two statements: the input is freed before the next norm
    video = self.norm_out(video, temb=emb)
    video = self.proj_out(video)  # [batch, video tokens, patch x patch x out channels]
    video = handle.ranks.whole(video, share, batch_size, video_seq_length)
    video = video.reshape(batch_size, num_frames, height // p, width // p, -1, p, p)
    return video.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def embed(
    transformer: ConsisIDTransformer3DModel,
    encoder_hidden_states: torch.Tensor,
    hidden_states: torch.Tensor,
    share: Share,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The text and the video tokens of a share, each [batch, tokens, inner dim].

    They are contiguous copies, as the blocks return them, even for a batch of one, whose slices
    have other strides. So the compiler needs no second compilation for the first block.

    Args:
        encoder_hidden_states, hidden_states: the samples of the share, with all tokens.
    """
    embedded = transformer.patch_embed(encoder_hidden_states, hidden_states)
    embedded = transformer.embedding_dropout(embedded)
    text_tokens = encoder_hidden_states.shape[1]
    text, video = embedded[:, :text_tokens], embedded[:, text_tokens:]
    return tuple(
        tokens[:, own].clone(memory_format=torch.contiguous_format)
        for tokens, own in ((text, share.text), (video, share.video))
    )


def embed_video(patch_embed: CogVideoXPatchEmbed, hidden_states: torch.Tensor) -> torch.Tensor:
    """The video tokens of `patch_embed(text, hidden_states)`, bit for bit, without the text.

    From [batch, latent frames, channels, height, width] to [batch, video tokens, inner dim]. A
    reused step needs no text tokens. Their projection costs as much as the rest of the step.
    """
    batch_size, num_frames, _, height, width = hidden_states.shape
    patches = patch_embed.proj(hidden_states.flatten(0, 1))  # [batch x frames, inner dim, h, w]
    video = patches.flatten(2).transpose(1, 2).unflatten(0, (batch_size, num_frames)).flatten(1, 2)
    if patch_embed.use_positional_embeddings or patch_embed.use_learned_positional_embeddings:
        frames = (num_frames - 1) * patch_embed.temporal_compression_ratio + 1
        trained = (patch_embed.sample_height, patch_embed.sample_width, patch_embed.sample_frames)
        positions = patch_embed.pos_embedding  # [1, text and video tokens, inner dim]
        if (height, width, frames) != trained:
            positions = patch_embed._get_positional_embeddings(height, width, frames, video.device)
        video = video + positions[:, patch_embed.max_text_seq_length :].to(video.dtype)
    return video


def run_blocks(
    transformer: ConsisIDTransformer3DModel,
    video: torch.Tensor,
    text: torch.Tensor,
    emb: torch.Tensor,
    image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    face: torch.Tensor | None,
) -> torch.Tensor:
    """The block stack, with identity cross-attention after every `cross_attn_interval`-th block.

    Args:
        video, text: [batch, tokens, inner dim].
        emb: [batch, time embed dim].
        face: [batch or 1, queries, face width], the face extractor's output.
    """
    for index, block in enumerate(transformer.transformer_blocks):
        video, text = block(
            hidden_states=video,
            encoder_hidden_states=text,
            temb=emb,
            image_rotary_emb=image_rotary_emb,
        )
        if face is not None and index % transformer.cross_attn_interval == 0:
            attend = transformer.perceiver_cross_attention[index // transformer.cross_attn_interval]
            add = add_face if attend._compiled_call_impl is None else _compiled_add_face()
            video = add(attend, face, video, transformer.local_face_scale)
    return video


def add_face(
    attend: PerceiverCrossAttention, face: torch.Tensor, video: torch.Tensor, scale: float
) -> torch.Tensor:
    """The video tokens plus the output of an identity cross-attention layer.

    Args:
        face, video: as for `run_blocks`.
        scale: 1 in ConsisID-preview. A multiplication by 1 would only copy.
    """
    added = attend(face, video)
    return video + (added if scale == 1 else scale * added)


@functools.cache
def _compiled_add_face() -> Callable[..., torch.Tensor]:
    """`add_face` as one compiled region, which all compiled layers share."""
    return torch.compile(add_face, fullgraph=True, dynamic=False)
