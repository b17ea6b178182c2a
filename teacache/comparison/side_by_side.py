"""Writes several videos side by side, each below its label."""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from teacache.results.video import QUALITY, write_video

# In pixels. A grid of very many videos may become wider, to keep the smallest cell.
GRID_WIDTH = 1920
SMALL_VIDEO_WIDTH, SMALLEST_CELL = 320, 160  # narrower videos are enlarged to the first
CAPTION_HEIGHT = 48


def write_grid(
    videos: list[np.ndarray], labels: list[str], path: Path, quality: float = QUALITY
) -> None:
    """Write videos side by side, each below its label of one or two lines.

    Args:
        videos: each [frames, height, width, 3], uint8, of the same size. The last frame of a
            shorter video stays.
        quality: of the mp4, 0 to 10.
    """
    columns = math.ceil(math.sqrt(len(videos)))
    lines = math.ceil(len(videos) / columns)
    _, height, width, _ = videos[0].shape
    most = max(GRID_WIDTH // columns, SMALLEST_CELL)
    cell_width = _multiple_of_16(min(max(width, SMALL_VIDEO_WIDTH), most))
    cell_height = _multiple_of_16(cell_width * height / width)
    captions = [_caption(label, cell_width) for label in labels]

    frames = []
    for n in range(max(map(len, videos))):
        page = np.zeros((lines * (CAPTION_HEIGHT + cell_height), columns * cell_width, 3), np.uint8)
        for i, (video, caption) in enumerate(zip(videos, captions, strict=True)):
            left, top = i % columns * cell_width, i // columns * (CAPTION_HEIGHT + cell_height)
            page[top : top + CAPTION_HEIGHT, left : left + cell_width] = caption
            top += CAPTION_HEIGHT
            frame = Image.fromarray(video[min(n, len(video) - 1)])
            cell = frame.resize((cell_width, cell_height), Image.Resampling.LANCZOS)
            page[top : top + cell_height, left : left + cell_width] = np.array(cell)
        frames.append(Image.fromarray(page))
    write_video(frames, path, quality)


def _caption(label: str, width: int) -> np.ndarray:
    """White text on black, [CAPTION_HEIGHT, width, 3]; a long text is smaller."""
    font = ImageFont.load_default(size=16)
    longest = max(font.getlength(line) for line in label.splitlines())
    if longest > width - 12:
        font = ImageFont.load_default(size=16 * (width - 12) / longest)
    picture = Image.new("RGB", (width, CAPTION_HEIGHT))
    ImageDraw.Draw(picture).multiline_text((6, 4), label, font=font, spacing=4)
    return np.array(picture)


def _multiple_of_16(pixels: float) -> int:
    # The encoder would stretch any other size.
    return max(16, round(pixels / 16) * 16)
