"""The ranks that compute one video together, and what each of them computes of a step.

The two halves of guidance go to two halves of the ranks. Those of a half share its tokens: text and
video are cut as the one sequence that attention sees. All but attention works on each token alone;
around attention, tokens are exchanged for heads and back (`teacache.parallel`), so that each head
attends over the whole sequence, in its own order. At the end of a step each rank has the whole
prediction. A single rank has all of everything, and nothing is exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Share(NamedTuple):
    """A rank's part of a step: of the batch, of the text tokens, of the video tokens."""

    batch: slice
    text: slice
    video: slice


@dataclass(frozen=True)
class Ranks:
    """How many ranks there are, and which of them this process is.

    Attributes:
        halves: 2 where each half of guidance has its own ranks, else 1.
        parts: among how many ranks the tokens of a half are divided.
        rank: of this process, from 0; those of a half follow each other.
    """

    halves: int = 1
    parts: int = 1
    rank: int = 0

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.halves * self.parts

    def __str__(self) -> str:
        shares = (("guidance", self.halves), ("tokens", self.parts))
        shared = ", ".join(f"{what} x{number}" for what, number in shares if number > 1)
        return f"{self.size} GPUs: {shared}"

    def share(self, batch: int, text: int, video: int) -> Share:
        """What this rank computes of so many samples, text tokens and video tokens.

        The parts are equally long: the tokens divide by their number, see `teacache.parallel`.
        """
        half, part = divmod(self.rank, self.parts)
        samples, tokens = batch // self.halves, (text + video) // self.parts
        first, last = part * tokens, (part + 1) * tokens
        return Share(
            slice(half * samples, (half + 1) * samples),
            slice(min(first, text), min(last, text)),
            slice(max(first - text, 0), max(last - text, 0)),
        )

    def whole(self, own: torch.Tensor, share: Share, batch: int, video: int) -> torch.Tensor:
        """[batch, video tokens, channels], put together from each rank's share of it.

        One sum over all ranks, to which each adds zeros where another's share is: exact.
        """
        if self.size == 1:
            return own
        import torch.distributed  # late: a plan divides a step without torch

        whole = own.new_zeros(batch, video, own.shape[2])
        whole[share.batch, share.video] = own
        torch.distributed.all_reduce(whole)
        return whole


ALONE = Ranks()
