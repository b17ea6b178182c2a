"""Division of a denoising step among several GPUs, and the valid numbers of GPUs."""

from teacache.base.errors import ArgumentError
from teacache.core.ranks import Ranks


def divide(num_gpus: int, guided: bool, heads: int, text: int, video: int) -> Ranks:
    """Divide the halves of guidance first, which needs no communication, then the tokens.

    Args:
        guided: whether there are two halves of guidance.
        text, video: tokens of one sample.

    Raises:
        ArgumentError: if the number is not valid, naming the nearest valid numbers.
    """
    ranks = _ranks(num_gpus, guided, heads, text, video)
    if ranks is not None:
        return ranks
    fitting = [n for n in range(1, 64) if _ranks(n, guided, heads, text, video)]
    near = [n for n in fitting if n < num_gpus][-1:] + [n for n in fitting if n > num_gpus][:1]
    raise ArgumentError(
        f"--num_gpus {num_gpus}: {text + video} tokens and {heads} heads cannot be divided among "
        f"{num_gpus} GPUs: use {' or '.join(map(str, near))}"
    )


def _ranks(num_gpus: int, guided: bool, heads: int, text: int, video: int) -> Ranks | None:
    halves = 2 if guided and num_gpus % 2 == 0 else 1
    parts = num_gpus // halves
    tokens = text + video
    # The first part begins with the text. Each part needs some tokens of the video.
    if heads % parts or tokens % parts or tokens // parts <= text * (parts > 1):
        return None
    return Ranks(halves, parts)
