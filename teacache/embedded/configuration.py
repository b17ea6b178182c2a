"""The configurations of the embedded checkpoint's models, and its random weights."""

import torch
from torch import nn

SEED = 20241126

# What differs from the defaults of diffusers. A video has 13 frames of 112x96, so the pipeline
# stretches the square face only a little. The VAE compresses time by 2: by 4, as in the real VAE,
# 13 frames would be 4 latent frames, which decode to 16 frames.
TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_layers": 4,
    "in_channels": 32,
    "time_embed_dim": 32,
    "text_embed_dim": 64,
    "sample_width": 14,
    "sample_height": 12,
    "sample_frames": 13,
    "temporal_compression_ratio": 2,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
    "cross_attn_dim_head": 16,
    "cross_attn_num_heads": 4,
    "LFE_vit_dim": 64,
    "LFE_depth": 5,
    "LFE_dim_head": 16,
    "LFE_num_heads": 4,
    "LFE_output_dim": 128,  # two thirds of the inner width, as in ConsisID
}
VAE = {
    "block_out_channels": (16, 24, 48, 48),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "temporal_compression_ratio": 2,
    # Tiles are half as large. With 144 their overlaps would not be whole latents.
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
    """Fill the matrices with normal values that keep the variance, and the biases with zeros.

    The values depend only on the seed. The initial values of the libraries may change with their
    versions.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(generator=generator).div_(parameter[0].numel() ** 0.5)
            elif name.endswith("bias"):
                parameter.zero_()
