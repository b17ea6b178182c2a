"""Several videos side by side in one, each below its label."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from teacache.results.video import write_video

# Pixels: of a whole grid at most, unless its cells would become too small to see anything in.
GRID_WIDTH = 1920
CELL_WIDTH = (320, 160)  # a small video is enlarged to the first; none shrinks below the second


def write_grid(videos: list[np.ndarray], labels: list[str], path: Path) -> None:
    """Write videos side by side, each below its label.

    Args:
        videos: each [frames, height, width, 3], uint8, all of one size; where one is shorter its
            last frame stays.
        labels: one for each, of one or more lines.
    """
    columns = math.ceil(math.sqrt(len(videos)))
    lines = math.ceil(len(videos) / columns)
    _, height, width, _ = videos[0].shape
    cell_width = _even(min(max(width, CELL_WIDTH[0]), max(GRID_WIDTH // columns, CELL_WIDTH[1])))
    cell_height = _even(cell_width * height / width)
    captions = [_caption(label, cell_width) for label in labels]
    caption_height = max(len(caption) for caption in captions)

    frames = []
    for n in range(max(map(len, videos))):
        page = np.zeros((lines * (caption_height + cell_height), columns * cell_width, 3), np.uint8)
        for i, (video, caption) in enumerate(zip(videos, captions, strict=True)):
            left, top = i % columns * cell_width, i // columns * (caption_height + cell_height)
            page[top : top + len(caption), left : left + cell_width] = caption
            top += caption_height
            cell = _resized(video[min(n, len(video) - 1)], cell_width, cell_height)
            page[top : top + cell_height, left : left + cell_width] = cell
        frames.append(page)
    write_video([_as_image(page) for page in frames], path)


def _caption(label: str, width: int) -> np.ndarray:
    """White text on black, [height, width, 3], as high as its lines need."""
    font = ImageFont.load_default(size=16)
    longest = max(font.getlength(line) for line in label.splitlines())
    if longest > width - 12:
        font = ImageFont.load_default(size=16 * (width - 12) / longest)
    picture = Image.new("RGB", (width, 48))
    ImageDraw.Draw(picture).multiline_text((6, 4), label, font=font, spacing=4)
    return np.array(picture)


def _resized(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.array(_as_image(frame).resize((width, height), Image.Resampling.LANCZOS))


def _as_image(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(frame)


def _even(pixels: float) -> int:
    # The encoder works in squares of 16 pixels, and would stretch anything else to them.
    return max(16, round(pixels / 16) * 16)
