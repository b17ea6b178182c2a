"""How one video's denoising step is divided among several GPUs, and which numbers of them fit."""

from __future__ import annotations

from typing import NamedTuple

from teacache.base.errors import ArgumentError

# Of numbers that fit, those up to here are named where another is refused.
LARGEST = 64


# ConsisID-preview at 49 frames of 720x480; what one H100 was measured to take for a computed step
# with guidance, and to move in its own memory; and what NVLink sends by its data sheet.
FULL_LAYERS, FULL_TOKENS, FULL_WIDTH = 42, 17776, 3072
H100_STEP = 1.82  # seconds
H100_MEMORY, H100_LINK = 2.9e12, 450e9  # bytes a second
H100_EXCHANGE = 25e-6  # seconds, to begin one


class Division(NamedTuple):
    """halves: 2 where each half of guidance has GPUs of its own; parts: of each half's tokens."""

    halves: int
    parts: int

    def __str__(self) -> str:
        shares = (("guidance", self.halves), ("tokens", self.parts))
        said = ", ".join(f"{what} x{number}" for what, number in shares if number > 1)
        return f"{self.halves * self.parts} GPUs: {said}"


ALONE = Division(1, 1)


def divide(num_gpus: int, guided: bool, heads: int, text: int, video: int) -> Division:
    """The division for so many GPUs: guidance first, which costs no communication, then tokens.

    Args:
        guided: whether there are two halves of guidance.
        heads: of attention, of which each part has as many as the others.
        text, video: tokens of one sample.

    Raises:
        ArgumentError: where it does not go, naming the nearest numbers that do.
    """
    division = _division(num_gpus, guided, heads, text, video)
    if division is not None:
        return division
    fitting = [n for n in range(1, LARGEST) if _division(n, guided, heads, text, video)]
    near = [n for n in fitting if n < num_gpus][-1:] + [n for n in fitting if n > num_gpus][:1]
    raise ArgumentError(
        f"--num_gpus {num_gpus}: {text + video} tokens and {heads} heads do not divide among so "
        f"many; {' and '.join(map(str, near))} would do"
    )


def _division(num_gpus: int, guided: bool, heads: int, text: int, video: int) -> Division | None:
    halves = 2 if guided and num_gpus % 2 == 0 else 1
    parts = num_gpus // halves
    tokens = text + video
    # The first part begins with the text, and each needs some tokens of the video.
    if heads % parts or tokens % parts or tokens // parts <= text * (parts > 1):
        return None
    return Division(halves, parts)


def h100_seconds(division: Division, guided: bool) -> float:
    """Seconds of a computed step at published settings on so many H100s with NVLink, by arithmetic.

    The step measured on one, divided; what each sends; and its copies before and after.
    """
    batch = 2 if guided else 1
    seconds = H100_STEP * batch / 2 / (division.halves * division.parts)
    if division.parts == 1:
        return seconds
    sent = bytes_sent(division, batch, FULL_LAYERS, FULL_TOKENS, FULL_WIDTH)
    shares = sent * division.parts / (division.parts - 1)
    exchanges = 4 * FULL_LAYERS * H100_EXCHANGE
    return seconds + sent / H100_LINK + 2 * shares / H100_MEMORY + exchanges


def bytes_sent(division: Division, batch: int, layers: int, tokens: int, width: int) -> int:
    """What each GPU sends in a computed step for attention, in half precision.

    Query, key, value and the output of each layer are exchanged among the parts: of its own share
    of each, a part keeps one in `parts` and sends the rest.

    Args:
        batch: samples in all; each half of guidance has its own.
        tokens: of one sample, text and video; width: inner dim.
    """
    parts = division.parts
    own = batch // division.halves * (tokens // parts) * width
    return 4 * layers * (own - own // parts) * 2
