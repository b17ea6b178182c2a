"""Self-attention of the ConsisID blocks by diffusers' dispatcher, which has many backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)

from teacache.base.errors import ArgumentError, reason

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel
    from diffusers.models.attention_processor import Attention

# Short names for `--attention`. Any other backend of diffusers has its own name.
BACKENDS = {"cudnn": "_native_cudnn", "flash3": "_flash_3"}
# These compute with fewer bits than the sampling dtype. The others differ only in rounding.
INEXACT = "sage"
# Numbers of query or key in one chunk of the rotary embedding: 64 MiB in float32, which is 7 chunks
# at full size, each large enough to fill a GPU.
ROTARY_CHUNK = 2**24


class ConsisIDAttnProcessor:
    """`CogVideoXAttnProcessor2_0` by the dispatcher, in the dispatcher's layout.

    With the backend `native` its output equals that of the processor it replaces, bit for bit.
    `set_attention_backend` of a diffusers model requires the two class attributes.
    """

    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Joint attention over text and video tokens. Only video tokens have a rotary embedding.

        Args:
            hidden_states: [batch, video tokens, inner dim].
            encoder_hidden_states: [batch, text tokens, inner dim].

        Returns:
            video and text tokens, in the same shapes.
        """
        text_tokens = encoder_hidden_states.shape[1]
        query, key, value = _project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        if image_rotary_emb is not None:
            apply_rotary_(query[:, text_tokens:], image_rotary_emb)
            apply_rotary_(key[:, text_tokens:], image_rotary_emb)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        del query, key, value  # frees 0.6 GiB at full size before as much is allocated
        out = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))
        text, video = out.split([text_tokens, out.shape[1] - text_tokens], dim=1)
        return video, text


def _project(
    attn: Attention, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, [batch, tokens, heads, head dim], which is the dispatcher's layout.

    Each is normalised before the next is projected, which needs less memory.

    Args:
        tokens: [batch, tokens, inner dim].
    """
    heads = (attn.heads, -1)
    if attn.fused_projections:
        query, key, value = (p.unflatten(2, heads) for p in attn.to_qkv(tokens).chunk(3, dim=-1))
        return attn.norm_q(query), attn.norm_k(key), value
    query = attn.norm_q(attn.to_q(tokens).unflatten(2, heads))
    key = attn.norm_k(attn.to_k(tokens).unflatten(2, heads))
    return query, key, attn.to_v(tokens).unflatten(2, heads)


def apply_rotary_(tokens: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Apply the rotary embedding in place: diffusers' `apply_rotary_emb`, bit for bit.

    It moves 60 % of the bytes: the sines have the sign of the rotated half, and float32 products
    are computed from the tokens without a float32 copy. It works in chunks, because the products of
    all tokens would be the peak memory of a block.

    Args:
        tokens: [batch, tokens, heads, head dim].
        rotary: cosines and sines, float32, [tokens, head dim].
    """
    cosines, sines = (each[:, None] for each in rotary)
    sines = sines.clone()
    sines[..., 0::2].neg_()
    # A compiled region has no intermediate products, so chunks would only add writes.
    whole = torch.compiler.is_compiling()
    size = tokens.shape[1] if whole else max(1, ROTARY_CHUNK // tokens[:, 0].numel())
    chunks = (tokens.split(size, dim=1), cosines.split(size), sines.split(size))
    for chunk, cosine, sine in zip(*chunks, strict=True):
        rotated = chunk.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sine
        chunk.copy_((chunk * cosine).add_(rotated))


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The dispatcher's name for a value of `--attention`.

    `native` is torch's own choice. On Hopper that is cuDNN's kernel. With the name `cudnn`,
    diffusers also copies query, key and value (44 ms of 1.9 s a step on an H100).

    Raises:
        ArgumentError: if diffusers does not know the name, or the backend does not work here.
    """
    backend = BACKENDS.get(name, name)
    known = {member.value for member in AttentionBackendName}
    if backend not in known:
        names = ", ".join(sorted({*BACKENDS, *(n for n in known if n[0] != "_")}))
        raise ArgumentError(f"--attention {name}: diffusers knows {names}")
    try:  # a tiny call, before 20 GB are loaded
        tokens = torch.randn(1, 128, 2, 64, device=device, dtype=dtype)
        with attention_backend(backend):
            dispatch_attention_fn(tokens, tokens, tokens)
    except Exception as error:
        # Each backend is another package, with errors of its own.
        raise ArgumentError(f"--attention {name} does not work here: {reason(error)}") from error
    return backend


def short_name(backend: str) -> str:
    """The value of `--attention` for a name of the dispatcher."""
    return {value: name for name, value in BACKENDS.items()}.get(backend, backend)


def is_exact(backend: str) -> bool:
    """Whether a backend differs from torch's own only in rounding."""
    return INEXACT not in backend


def use_attention(transformer: ConsisIDTransformer3DModel, backend: str) -> None:
    """Set the attention backend of all blocks, by its name in the dispatcher."""
    transformer.set_attn_processor(
        {name: ConsisIDAttnProcessor() for name in transformer.attn_processors}
    )
    transformer.set_attention_backend(backend)
