"""Self-attention of the ConsisID blocks through diffusers' dispatcher, which has many backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from teacache.base.errors import ArgumentError, reason

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel
    from diffusers.models.attention_processor import Attention

# Short names for `--attention`; any other backend of diffusers goes by its own name.
BACKENDS = {
    "cudnn": "_native_cudnn",
    "flash3": "_flash_3",
}
# These compute with fewer bits than the sampling dtype has; the others differ in rounding alone.
INEXACT = "sage"
# So many numbers of query or key are turned by the rotary embedding at once: 64 MiB in float32,
# of which some are there at a time. At full size that makes 7 pieces, each of them ample for a GPU.
TURNED_AT_ONCE = 2**24


class ConsisIDAttnProcessor:
    """`CogVideoXAttnProcessor2_0`, but through the dispatcher, and in the layout that it takes.

    With the backend `native` its output equals that of the processor it replaces, bit for bit. The
    two class attributes are those that `set_attention_backend` of a diffusers model looks for.
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
        """Attend over text and video tokens together; the rotary embedding turns the video's.

        Args:
            hidden_states: [batch, video tokens, inner dim].
            encoder_hidden_states: [batch, text tokens, inner dim].

        Returns:
            both, in the same order and shapes.
        """
        text_tokens = encoder_hidden_states.shape[1]
        query, key, value = _projected(
            attn, torch.cat([encoder_hidden_states, hidden_states], dim=1)
        )
        if image_rotary_emb is not None:
            turn(query[:, text_tokens:], image_rotary_emb)
            turn(key[:, text_tokens:], image_rotary_emb)
        attended = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        del query, key, value  # 0.6 GiB at full size, before as much is allocated again
        out = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3)))
        text, video = out.split([text_tokens, out.shape[1] - text_tokens], dim=1)
        return video, text


def _projected(
    attn: Attention, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, [batch, tokens, heads, head dim]: what the dispatcher takes, without a
    transposition. Each is normed before the next is projected: none is there twice.

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


def turn(tokens: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Apply the rotary embedding in place: diffusers' `apply_rotary_emb`, bit for bit.

    It moves 60 % of the bytes. The sign of the turned half goes to the sines, which are few, and
    the products are made in float32 from where the tokens lie, not from copies of them. They are
    made piece by piece, since those of all tokens would be the most that a block has in memory.

    Args:
        tokens: [batch, tokens, heads, head dim].
        rotary: cosines and sines, float32, [tokens, head dim].
    """
    cosines, sines = (each[:, None] for each in rotary)
    sines = sines.clone()
    sines[..., 0::2].neg_()
    # A compiler makes no such products, and would write out every piece.
    whole = torch.compiler.is_compiling()
    size = tokens.shape[1] if whole else max(1, TURNED_AT_ONCE // tokens[:, 0].numel())
    pieces = (tokens.split(size, dim=1), cosines.split(size), sines.split(size))
    for piece, cosine, sine in zip(*pieces, strict=True):
        turned = piece.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) * sine
        piece.copy_((piece * cosine).add_(turned))


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The dispatcher's name of the backend that `--attention` asks for.

    `native` is torch's own choice: on Hopper cuDNN's kernel, which by its own name, `cudnn`, costs
    diffusers copies of query, key and value besides (44 ms of 1.9 s a step on an H100).

    Raises:
        ArgumentError: for a name that diffusers does not know, or a backend that the machine lacks.
    """
    backend = BACKENDS.get(name, name)
    known = {member.value for member in AttentionBackendName}
    if backend not in known:
        names = ", ".join(sorted({*BACKENDS, *(n for n in known if n[0] != "_")}))
        raise ArgumentError(f"--attention {name}: diffusers knows {names}")
    _try_out(name, backend, device, dtype)
    return backend


def short_name(backend: str) -> str:
    """What `--attention` calls a backend of the dispatcher's."""
    return {value: name for name, value in BACKENDS.items()}.get(backend, backend)


def is_exact(backend: str) -> bool:
    """Whether a backend differs from torch's own in rounding alone."""
    return INEXACT not in backend


def use_attention(transformer: ConsisIDTransformer3DModel, backend: str) -> None:
    """Let every block of the transformer attend through `backend`, a name of the dispatcher."""
    transformer.set_attn_processor(
        {name: ConsisIDAttnProcessor() for name in transformer.attn_processors}
    )
    transformer.set_attention_backend(backend)


def _try_out(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Attend once over next to nothing: whatever a backend lacks shows before 20 GB are loaded."""
    from diffusers.models.attention_dispatch import attention_backend

    try:
        tokens = torch.randn(1, 128, 2, 64, device=device, dtype=dtype)
        with attention_backend(backend):
            dispatch_attention_fn(tokens, tokens, tokens)
    except Exception as error:
        # Each backend is another package's, with errors of its own: any of them means not here.
        raise ArgumentError(f"--attention {name} does not work here: {reason(error)}") from error
