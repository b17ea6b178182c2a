"""Sizes: of a checkpoint's models, as its configurations have them, and of its videos."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from teacache.base.errors import ArgumentError
from teacache.checkpoint.folder import read_json

logger = logging.getLogger(__name__)


class VideoSize(NamedTuple):
    """Width and height in pixels, and the number of frames."""

    width: int
    height: int
    num_frames: int


@dataclass(frozen=True)
class Architecture:
    """Sizes of a checkpoint's transformer and VAE.

    Attributes:
        trained: the size of the videos that it was trained on.
        learned_positions: whether it can make no other width and height.
        heads, head_dim, num_layers: of the transformer. text_tokens: of each prompt.
        patch_size: in latent pixels. spatial, temporal: pixels and frames that a latent one is.
        latent_channels: of the VAE.
    """

    trained: VideoSize
    learned_positions: bool
    heads: int
    head_dim: int
    num_layers: int
    text_tokens: int
    patch_size: int
    spatial: int
    temporal: int
    latent_channels: int

    @classmethod
    def of(cls, checkpoint: Path) -> Architecture:
        """Read it from a checkpoint folder; where an entry is missing, diffusers' default counts.

        Raises:
            CheckpointError: where a configuration cannot be read.
        """
        transformer = read_json(checkpoint / "transformer" / "config.json")
        vae = read_json(checkpoint / "vae" / "config.json")
        spatial = 2 ** (len(vae.get("block_out_channels", (128, 256, 256, 512))) - 1)
        return cls(
            trained=VideoSize(
                transformer.get("sample_width", 90) * spatial,
                transformer.get("sample_height", 60) * spatial,
                transformer.get("sample_frames", 49),
            ),
            learned_positions=transformer.get("use_learned_positional_embeddings", False),
            heads=transformer.get("num_attention_heads", 30),
            head_dim=transformer.get("attention_head_dim", 64),
            num_layers=transformer.get("num_layers", 30),
            text_tokens=transformer.get("max_text_seq_length", 226),
            patch_size=transformer.get("patch_size", 2),
            spatial=spatial,
            temporal=vae.get("temporal_compression_ratio", 4),
            latent_channels=vae.get("latent_channels", 16),
        )

    def video_tokens(self, size: VideoSize) -> int:
        """How many tokens the transformer makes of a video."""
        frames = (size.num_frames - 1) // self.temporal + 1
        pixels = self.spatial * self.patch_size
        return frames * (size.height // pixels) * (size.width // pixels)


def video_size(
    folder: Path, width: int | None, height: int | None, num_frames: int | None
) -> VideoSize:
    """The size to sample at: what is asked for, else what the transformer was trained at.

    Raises:
        ArgumentError: where the model cannot make that size, naming the nearest that it can.
    """
    model = Architecture.of(folder)
    trained = model.trained
    size = VideoSize(
        width or trained.width, height or trained.height, num_frames or trained.num_frames
    )
    if model.learned_positions and size[:2] != trained[:2]:
        raise ArgumentError(
            f"--width {size.width} --height {size.height}: this checkpoint has learned "
            f"positional embeddings and makes {trained.width}x{trained.height} only"
        )
    multiple = model.spatial * model.patch_size
    for name, pixels in (("--width", size.width), ("--height", size.height)):
        if pixels % multiple:
            below = max(pixels // multiple, 1) * multiple
            raise ArgumentError(
                f"{name} {pixels} must be a multiple of {multiple}: "
                f"the nearest are {below} and {below + multiple}"
            )
    check_num_frames(size.num_frames, model.temporal)
    if model.learned_positions and size.num_frames != trained.num_frames:
        logger.warning(
            "--num_frames %d: the checkpoint has learned positional embeddings for %d frames, "
            "for others the pipeline computes some that it was not trained with",
            size.num_frames,
            trained.num_frames,
        )
    return size


def check_memory(size: VideoSize) -> None:
    """Raise ArgumentError where the frames alone, in float32, take more than the machine has."""
    needed = 4 * 3 * size.width * size.height * size.num_frames
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ArgumentError(
            f"--num_frames {size.num_frames} of {size.width}x{size.height} take "
            f"{needed / 2**30:.0f} GiB of memory, and this machine has {there / 2**30:.0f}"
        )


def check_num_frames(num_frames: int, ratio: int) -> None:
    """Raise ArgumentError where the VAE cannot make so many frames, naming the nearest."""

    def made(asked: int) -> int:
        # The VAE decodes latent frames in pairs, the odd one with the first pair. The first
        # latent frame stands for a single frame in an odd group, for `ratio` of them in a pair.
        latent_frames = (asked - 1) // ratio + 1
        return latent_frames * ratio - (ratio - 1 if latent_frames % 2 else 0)

    if made(num_frames) != num_frames:
        below, above = num_frames - 1, num_frames + 1
        while made(below) != below:
            below -= 1
        while made(above) != above:
            above += 1
        raise ArgumentError(
            f"--num_frames {num_frames}: the VAE cannot make that many, "
            f"the nearest are {below} and {above}"
        )
