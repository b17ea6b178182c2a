"""The embeddings of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline

TEXT_TOKENS = 226  # ConsisIDPipeline pads or cuts every text to this length


class EmbeddedText(NamedTuple):
    """embeds: T5's, [1, 226, 4096] at full size; lost: the text after 226 tokens."""

    embeds: torch.Tensor
    lost: str


class Text(NamedTuple):
    """Embeddings of prompt and negative prompt; the latter is None without guidance."""

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None


@torch.no_grad()
def embed_text(pipe: ConsisIDPipeline, text: str) -> EmbeddedText:
    """Embed a prompt or a negative prompt. A text that is too long is cut."""
    tokens = pipe.tokenizer(text).input_ids
    lost = (
        tokens[TEXT_TOKENS - 1 : -1] if len(tokens) > TEXT_TOKENS else []
    )  # the last one is the end token
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return EmbeddedText(embeds, pipe.tokenizer.decode(lost) if lost else "")
