"""The size of a video: what is asked for, or what the checkpoint was trained at."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

from teacache.base.errors import ArgumentError, CheckpointError
from teacache.checkpoint.configuration import read_json, whole_number

logger = logging.getLogger(__name__)


class VideoSize(NamedTuple):
    """Width and height in pixels, and the number of frames."""

    width: int
    height: int
    num_frames: int


def video_size(
    folder: Path, width: int | None, height: int | None, num_frames: int | None
) -> VideoSize:
    """The size to sample at: what is asked for, else what the transformer was trained at.

    Raises:
        ArgumentError: where the model cannot make that size, naming the nearest that it can.
    """
    path, vae_path = folder / "transformer" / "config.json", folder / "vae" / "config.json"
    config, vae = (read_json(each, "not a checkpoint") for each in (path, vae_path))
    blocks = vae.get("block_out_channels", [128, 256, 256, 512])
    if not isinstance(blocks, list) or not blocks:
        raise CheckpointError(f"{vae_path}: block_out_channels is {blocks!r}, no list of numbers")
    spatial = 2 ** (len(blocks) - 1)
    trained = VideoSize(
        whole_number(path, config, "sample_width", 90) * spatial,
        whole_number(path, config, "sample_height", 60) * spatial,
        whole_number(path, config, "sample_frames", 49),
    )
    size = VideoSize(width or trained.width, height or trained.height, num_frames or trained[2])

    learned = config.get("use_learned_positional_embeddings", False)
    if learned and size[:2] != trained[:2]:
        raise ArgumentError(
            f"--width {size.width} --height {size.height}: this checkpoint has learned "
            f"positional embeddings and makes {trained.width}x{trained.height} only"
        )
    multiple = spatial * whole_number(path, config, "patch_size", 2)
    for name, pixels in (("--width", size.width), ("--height", size.height)):
        if pixels % multiple:
            below = max(pixels // multiple, 1) * multiple
            raise ArgumentError(
                f"{name} {pixels} must be a multiple of {multiple}: "
                f"the nearest are {below} and {below + multiple}"
            )
    ratio = whole_number(vae_path, vae, "temporal_compression_ratio", 4)
    check_num_frames(size.num_frames, ratio)
    if learned and size.num_frames != trained.num_frames:
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
