"""How one video's denoising step is divided among several GPUs, and which numbers of them fit."""

from __future__ import annotations

from teacache.base.errors import ArgumentError
from teacache.core.ranks import Ranks

# Of numbers that fit, those up to here are named where another is refused.
LARGEST = 64


def divide(num_gpus: int, guided: bool, heads: int, text: int, video: int) -> Ranks:
    """The ranks of so many GPUs: guidance first, which costs no communication, then tokens.

    Args:
        guided: whether there are two halves of guidance.
        heads: of attention, of which each part has as many as the others.
        text, video: tokens of one sample.

    Raises:
        ArgumentError: where it does not go, naming the nearest numbers that do.
    """
    ranks = _ranks(num_gpus, guided, heads, text, video)
    if ranks is not None:
        return ranks
    fitting = [n for n in range(1, LARGEST) if _ranks(n, guided, heads, text, video)]
    near = [n for n in fitting if n < num_gpus][-1:] + [n for n in fitting if n > num_gpus][:1]
    raise ArgumentError(
        f"--num_gpus {num_gpus}: {text + video} tokens and {heads} heads do not divide among so "
        f"many; {' and '.join(map(str, near))} would do"
    )


def _ranks(num_gpus: int, guided: bool, heads: int, text: int, video: int) -> Ranks | None:
    halves = 2 if guided and num_gpus % 2 == 0 else 1
    parts = num_gpus // halves
    tokens = text + video
    # The first part begins with the text, and each needs some tokens of the video.
    if heads % parts or tokens % parts or tokens // parts <= text * (parts > 1):
        return None
    return Ranks(halves, parts)
