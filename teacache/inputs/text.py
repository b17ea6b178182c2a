"""From a prompt to its embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline

TEXT_TOKENS = 226  # what ConsisIDPipeline fills up or cuts every text to


class EmbeddedText(NamedTuple):
    """embeds: T5's, [1, 226, 4096] at full size; lost: the words that 226 tokens did not hold."""

    embeds: torch.Tensor
    lost: str


class Text(NamedTuple):
    """Embeddings of prompt and negative prompt; no negative ones without guidance."""

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None


@torch.no_grad()
def embed_text(pipe: ConsisIDPipeline, text: str) -> EmbeddedText:
    """Embed one text, a prompt or a negative prompt. What is too long for T5 is cut off."""
    tokens = pipe.tokenizer(text).input_ids
    lost = tokens[TEXT_TOKENS - 1 : -1] if len(tokens) > TEXT_TOKENS else []  # the last one ends it
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return EmbeddedText(embeds, pipe.tokenizer.decode(lost) if lost else "")
