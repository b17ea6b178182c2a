"""The trained weights of the embedded checkpoint, stored in half precision.

The face extractor and the time embedding are random, from seeds, and are not stored. For the
training see README.md.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, ConsisIDTransformer3DModel
from safetensors.torch import load_file

# Trained by `python3 -m teacache.embedded.train DIR` of commit 0a84901.
FILE = Path(__file__).with_name("weights.safetensors")
FROM_SEEDS = ("local_facial_extractor.", "time_embedding.")
POSITIONS = "patch_embed.pos_embedding"


def read() -> dict[str, torch.Tensor]:
    """The trained weights; the positional embeddings are those of the video tokens only."""
    return load_file(FILE)


def detector_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The face detector's weights, in single precision."""
    return {name: value.float() for name, value in _part("detector.", tensors).items()}


def unpack(
    tensors: dict[str, torch.Tensor],
    transformer: ConsisIDTransformer3DModel,
    vae: AutoencoderKLCogVideoX,
) -> None:
    """Load the trained weights into transformer and VAE."""
    own = {n: value for n, value in transformer.state_dict().items() if n.startswith(FROM_SEEDS)}
    trained = _part("transformer.", tensors)
    positions = transformer.patch_embed.pos_embedding.clone()
    positions[:, transformer.config.max_text_seq_length :] = trained[POSITIONS]
    transformer.load_state_dict({**own, **trained, POSITIONS: positions})
    vae.register_to_config(scaling_factor=tensors["scaling_factor"].item())
    vae.load_state_dict(_part("vae.", tensors))


def _part(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
