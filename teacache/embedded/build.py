"""Writes the embedded checkpoint: a small ConsisID with the real layout and the real classes.

It samples 13 frames of 112x96 in seconds on a CPU, without the 20 GB of the real weights. VAE,
transformer and face detector are trained (README.md). The text encoder and the other face models
are random, from seeds.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, ConsisIDTransformer3DModel

from teacache.base.quiet import no_progress_bars
from teacache.embedded import faces, weights
from teacache.embedded.configuration import SCHEDULER, SEED, TRANSFORMER, VAE, fill
from teacache.embedded.text_encoder import write_text_encoder


def write_checkpoint(folder: Path) -> None:
    """Write every file of the embedded checkpoint."""
    with torch.random.fork_rng(devices=[]), no_progress_bars():
        torch.manual_seed(SEED)
        write_text_encoder(folder)
        transformer, vae = untrained_transformer(), AutoencoderKLCogVideoX(**VAE)
        trained = weights.read()
        weights.unpack(trained, transformer, vae)
        transformer.save_pretrained(folder / "transformer")
        vae.save_pretrained(folder / "vae")
        CogVideoXDPMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
        faces.write_face_encoder(
            folder / "face_encoder", TRANSFORMER["LFE_vit_dim"], weights.detector_of(trained)
        )

    index = {
        "_class_name": "ConsisIDPipeline",
        "scheduler": ["diffusers", "CogVideoXDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "ConsisIDTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def untrained_transformer() -> ConsisIDTransformer3DModel:
    """The transformer before training; its face extractor and time embedding were not trained."""
    transformer = ConsisIDTransformer3DModel(**TRANSFORMER)
    fill(transformer.local_facial_extractor, SEED)
    smooth_time_embedding(transformer)
    return transformer


def smooth_time_embedding(transformer: ConsisIDTransformer3DModel) -> None:
    """Fill the time embedding with random weights whose output changes as slowly as a trained one.

    From one of 50 steps to the next the timestep falls by 20, and the phase of a sinusoid with
    frequency f changes by 20 f. A random first layer weights all frequencies alike, which gives
    relative L1 distances around 0.5, far above the fitted range of the coefficients. So the weights
    of frequencies whose phase changes by more than 0.15 are zero. The seed is one that gives a
    different schedule at each of the usual thresholds, as on the trained model.
    """
    embedding = transformer.time_embedding
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        embedding.linear_1.reset_parameters()
        embedding.linear_2.reset_parameters()
        weight = embedding.linear_1.weight  # [time_embed_dim, inner dim]
        half = weight.shape[1] // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        fast = (20 * frequencies > 0.15).repeat(2)  # cosines, then sines of the same frequencies
        weight[:, fast] = 0.0
