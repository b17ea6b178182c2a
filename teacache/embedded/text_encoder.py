"""The embedded checkpoint's text encoder and tokenizer."""

import io
import random
import zlib
from pathlib import Path

import sentencepiece
import torch
from transformers import T5Config, T5EncoderModel

from teacache.embedded.configuration import SEED, TRANSFORMER, fill

# The words of ConsisID's example prompts: a prompt of their length must fit into 226 tokens.
WORDS = """
    The video captures a boy girl man woman astronaut walking standing laughing along a city street,
    filmed in black and white on a classic 35mm camera. His Her expression is thoughtful, smiling,
    brow slightly furrowed as if he's she's lost in contemplation. film grain adds textured,
    timeless quality to the image, evoking sense of nostalgia. Around him, her, the cityscape
    filled with vintage buildings, cobblestone sidewalks, and softly blurred figures passing by,
    their outlines faint and indistinct. Streetlights cast gentle glow, while shadows play across
    boy's path, adding depth scene. lighting highlights subtle smile, hinting at fleeting moment of
    curiosity. overall cinematic atmosphere, complete with still aesthetics dramatic contrasts,
    gives an evocative introspective feel. portrait of young old face light sea trees
    A person moves drifts goes to left right up down rises sinks comes closer away sways from side
    is stays still front background over before wall bright dim red blue green golden purple grey
    wall. background. light. still, wall, background, light,
""".split()


def write_text_encoder(folder: Path) -> None:
    """Write tokenizer and text encoder.

    The output of its attention is zero, so each token is encoded by itself. The embedding of a
    token depends on its letters, not on its number. So the trained weights do not depend on the
    version of the tokenizer.
    """
    pieces = _write_tokenizer(folder / "tokenizer")
    width = TRANSFORMER["text_embed_dim"]
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=width,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    fill(encoder, SEED)
    with torch.no_grad():
        for block in encoder.encoder.block:
            block.layer[0].SelfAttention.o.weight.zero_()
        for number, piece in enumerate(pieces):
            seed = torch.Generator().manual_seed(zlib.crc32(piece.encode()))
            encoder.shared.weight[number] = torch.randn(width, generator=seed)
    encoder.save_pretrained(folder / "text_encoder")


def _write_tokenizer(folder: Path) -> list[str]:
    """Train a SentencePiece model on random sentences; return its tokens."""
    # In random order, so that words and not phrases repeat, and become pieces.
    order = random.Random(SEED)
    sentences = [" ".join(order.sample(WORDS, 12)) for _ in range(800)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=480,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    reader = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [reader.id_to_piece(number) for number in range(reader.get_piece_size())]
    # T5's tokenizer adds a hundred tokens.
    return [*pieces, *(f"<extra_id_{number}>" for number in range(100))]
