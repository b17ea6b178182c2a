"""The embeddings of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline

TEXT_TOKENS = 226  # ConsisIDPipeline pads or cuts every text to this length


class EmbeddedText(NamedTuple):
    """A text, and what of it the video does not follow.

    embeds: T5's, [1, 226, 4096] at full size. lost: the text after 226 tokens. unknown: the parts
    of the rest that T5 has no tokens for, with spaces between; it reads the same of them all.
    """

    embeds: torch.Tensor
    lost: str
    unknown: str

    @property
    def complaint(self) -> str:
        """What is not read, to be said after the argument's name; empty if all is."""
        lost = f"is longer than {TEXT_TOKENS} tokens: without {self.lost!r}"
        unknown = f"has what the text encoder cannot read, write it in English: {self.unknown!r}"
        return "; and it ".join([lost] * bool(self.lost) + [unknown] * bool(self.unknown))


class Text(NamedTuple):
    """Embeddings of prompt and negative prompt; the latter is None without guidance."""

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None


@torch.no_grad()
def embed_text(pipe: ConsisIDPipeline, text: str) -> EmbeddedText:
    """Embed a prompt or a negative prompt. A text that is too long is cut."""
    tokens = pipe.tokenizer(text, return_offsets_mapping=True)
    # Each token's place in the text, and those that are read; the end token follows.
    places, read = tokens.offset_mapping, TEXT_TOKENS - 1
    unknown = [
        text[start:end]
        for token, (start, end) in zip(tokens.input_ids[:read], places, strict=False)
        if token == pipe.tokenizer.unk_token_id
    ]
    lost = text[places[read][0] :] if len(places) > TEXT_TOKENS else ""
    embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False)
    return EmbeddedText(embeds, lost.strip(), " ".join(dict.fromkeys(unknown)))
