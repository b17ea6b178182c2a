"""Division of a denoising step among the ranks that compute one video together.

Each half of guidance has its own half of the ranks, which divide its tokens. Text and video tokens
are divided as one sequence, in the order of attention. All operations except attention work on each
token alone. For attention, the ranks exchange tokens for heads and back (`teacache.parallel`), so
that each head attends over the whole sequence. At the end of a step each rank has the whole
prediction. A single rank computes everything, without communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Share(NamedTuple):
    """The batch, text tokens and video tokens that one rank computes."""

    batch: slice
    text: slice
    video: slice


@dataclass(frozen=True)
class Ranks:
    """The ranks of a video, and the number of this one.

    Attributes:
        halves: 2 if each half of guidance has its own ranks, else 1.
        parts: number of ranks that divide the tokens of a half.
        rank: number of this process, from 0. The ranks of a half are consecutive.
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
        return f"{self.size} ranks: {shared}"

    def share(self, batch: int, text: int, video: int) -> Share:
        """This rank's share of a batch with that many samples, text tokens and video tokens.

        All shares have the same number of tokens, see `teacache.parallel.division`.
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
        """Gather [batch, video tokens, channels] from the shares of all ranks.

        It is a sum over the ranks, in which each has zeros outside its share, so it is exact.
        """
        if self.size == 1:
            return own
        import torch.distributed  # here, because `--num_gpus` is checked without torch

        whole = own.new_zeros(batch, video, own.shape[2])
        whole[share.batch, share.video] = own
        torch.distributed.all_reduce(whole)
        return whole


ALONE = Ranks()
