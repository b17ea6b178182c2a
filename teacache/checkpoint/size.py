"""The sizes of a checkpoint's models and of its videos."""

from __future__ import annotations

import itertools
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
    """The sizes of a checkpoint's transformer and VAE.

    trained: the size of the training videos. learned_positions: whether the positional embeddings
    are learned, and only for that size. patch_size: in latent pixels. spatial, temporal: the VAE's
    compression of width and height, and of time.
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
        """Read the configurations in a checkpoint folder. Missing entries are diffusers' defaults.

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
        """The number of video tokens of the transformer."""
        frames = (size.num_frames - 1) // self.temporal + 1
        pixels = self.spatial * self.patch_size
        return frames * (size.height // pixels) * (size.width // pixels)


def video_size(
    folder: Path, width: int | None, height: int | None, num_frames: int | None
) -> VideoSize:
    """The size to sample at. None stands for the size of the training videos.

    Raises:
        ArgumentError: where the model cannot make that size; it names the nearest possible one.
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
            "--num_frames %d: the checkpoint has learned positional embeddings for %d frames; for "
            "another number the pipeline computes embeddings that were not trained",
            size.num_frames,
            trained.num_frames,
        )
    return size


def host_memory_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(size: VideoSize) -> None:
    """Raise ArgumentError where the frames in float32 take more memory than the machine has."""
    needed = 4 * 3 * size.width * size.height * size.num_frames
    available = host_memory_bytes()
    if needed > available:
        raise ArgumentError(
            f"--num_frames {size.num_frames} of {size.width}x{size.height} take "
            f"{needed / 2**30:.0f} GiB of memory, and this machine has {available / 2**30:.0f}"
        )


def check_num_frames(num_frames: int, ratio: int) -> None:
    """Raise ArgumentError where a VAE that compresses time by `ratio` cannot make that number.

    It names the nearest numbers.
    """

    def possible(number: int) -> bool:
        # The VAE decodes latent frames in pairs; an odd one joins the first pair. The first latent
        # frame stands for one frame in an odd group, for `ratio` frames in a pair.
        latent_frames = (number - 1) // ratio + 1
        return number == latent_frames * ratio - (ratio - 1 if latent_frames % 2 else 0)

    if not possible(num_frames):
        below = next(number for number in range(num_frames, 0, -1) if possible(number))
        above = next(number for number in itertools.count(num_frames) if possible(number))
        raise ArgumentError(
            f"--num_frames {num_frames}: the VAE cannot make this number, "
            f"the nearest are {below} and {above}"
        )
