"""The embedded ConsisID checkpoint: the real folder layout and the real classes on small weights.

It samples 13 frames of 112x96 in seconds on a CPU, so that every line of the way from a photograph
to a video can run where there is neither a GPU nor the 20 GB of the real weights. VAE, transformer
and face detector were trained (README.md): a face moves in front of a colour as the prompt says.
The text encoder and the other models of faces are random, from seeds.
`python3 -m teacache.embedded DIR` builds one in DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.environment import prepare_environment
from teacache.base.errors import CheckpointError, TeaCacheError
from teacache.base.files import cache_folder
from teacache.base.quiet import no_progress_bars, silence_libraries

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel
    from torch import nn

SEED = 20241126
WEIGHTS = "weights.safetensors"
TIME_EMBEDDING_SEED = 4

# 112x96 and 13 frames, at the eightfold spatial and twofold temporal compression of the VAE below.
# The pipeline stretches the square picture of the aligned face to the frame: to 112x96 it stretches
# little, so that the model may keep the face as it is.
# The real VAE compresses time fourfold; so would this one turn 13 frames into 4 latent frames, and
# an even number of those decodes to 4 frames each, the first one included: 16 in all.
TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 4,
    "in_channels": 32,
    "out_channels": 16,
    "time_embed_dim": 32,
    "text_embed_dim": 64,
    "sample_width": 14,
    "sample_height": 12,
    "sample_frames": 13,
    "temporal_compression_ratio": 2,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
    "is_kps": False,
    "cross_attn_dim_head": 16,
    "cross_attn_num_heads": 4,
    "LFE_id_dim": 1280,
    "LFE_vit_dim": 64,
    "LFE_depth": 5,
    "LFE_dim_head": 16,
    "LFE_num_heads": 4,
    # The identity cross-attention reads keys and values of two thirds of the inner width.
    "LFE_output_dim": 128,
    "LFE_num_scale": 5,
}
VAE = {
    "block_out_channels": (16, 24, 48, 48),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "temporal_compression_ratio": 2,
    # Tiles are half of this, and their overlaps must fall on whole latents: of 144 they do not.
    "sample_height": 96,
    "sample_width": 160,
    "scaling_factor": 1.0,  # the reciprocal of the latents' standard deviation
}
SCHEDULER = {
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "clip_sample": False,
}


def cached_tiny_checkpoint() -> Path:
    """The embedded checkpoint in the user's cache folder, built there if it is not yet.

    The folder's name carries a digest of the code that builds it, so that a newer version of the
    package never samples from an older build.
    """
    digest = hashlib.sha256()
    for name in ("build.py", "detector.py", "faces.py", "text.py", WEIGHTS):
        digest.update(Path(__file__).with_name(name).read_bytes())
    folder = cache_folder() / f"tiny-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        build_tiny_checkpoint(folder)
    return folder


def build_tiny_checkpoint(folder: Path) -> None:
    """Build the embedded checkpoint in `folder`, which must not exist or be empty.

    It is written to a folder beside and renamed, so that an interrupted build leaves nothing
    half-made; of two builds at the same moment one is kept.

    Raises:
        CheckpointError: where the folder cannot be made, or holds something already.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists already: name a folder that does not, or an empty")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder.parent}: {error.strerror}") from error
    try:
        write_checkpoint(beside)
        beside.chmod(0o755)
        try:
            beside.rename(folder)
        except OSError as error:
            if not (folder / "model_index.json").is_file():
                raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_checkpoint(folder: Path) -> None:
    """Write every file of the embedded checkpoint."""
    import torch
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler

    from teacache.embedded import faces, weights
    from teacache.embedded.text import write_text_encoder

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
    """The transformer without what was trained; face extractor and time embedding stay so."""
    from diffusers import ConsisIDTransformer3DModel

    transformer = ConsisIDTransformer3DModel(**TRANSFORMER)
    fill(transformer.local_facial_extractor, SEED)
    smooth_time_embedding(transformer)
    return transformer


def fill(module: nn.Module, seed: int) -> None:
    """Give its matrices normal values that keep the variance, and no bias, from the seed alone.

    How a library fills a new module may change from version to version.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(generator=generator).div_(parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.zero_()


def smooth_time_embedding(transformer: ConsisIDTransformer3DModel) -> None:
    """Give it a random time embedding that moves as little from step to step as a trained one.

    Between two of 50 steps the timestep falls by 20, and a sinusoid of frequency f turns by 20 f.
    A random first layer reads the fast ones as loudly as the slow ones, which puts the relative L1
    distance around 0.5, far above what the coefficients were fitted on; so it is made deaf to
    those that turn by more than 0.15. The seed is one of those whose distances then spread widely
    enough for the usual thresholds to give as different schedules as on the trained model.
    """
    import torch

    embedding = transformer.time_embedding
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(TIME_EMBEDDING_SEED)
        embedding.linear_1.reset_parameters()
        embedding.linear_2.reset_parameters()
        weight = embedding.linear_1.weight  # [time_embed_dim, inner dim]
        half = weight.shape[1] // 2
        frequencies = 10000.0 ** (-torch.arange(half) / half)
        fast = (20 * frequencies > 0.15).repeat(2)  # cosines, then sines of the same frequencies
        weight[:, fast] = 0.0


def main(argv: list[str] | None = None) -> int:
    """Build the checkpoint in the folder named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python3 -m teacache.embedded",
        description="Build a small ConsisID checkpoint: the real layout and classes, trained.",
    )
    parser.add_argument("folder", type=Path, help="where to build it; must not exist, or be empty")
    folder = parser.parse_args(argv).folder
    silence_libraries()
    try:
        prepare_environment()
        build_tiny_checkpoint(folder)
    except TeaCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"built {folder}")
    return 0
