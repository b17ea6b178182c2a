"""What the embedded checkpoint is made of: the configurations of its models, and random weights."""

from __future__ import annotations

import torch
from torch import nn

SEED = 20241126

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


def fill(module: nn.Module, seed: int) -> None:
    """Give its matrices normal values that keep the variance, and no bias, from the seed alone.

    How a library fills a new module may change from version to version.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(generator=generator).div_(parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.zero_()
