"""What the checks of a request determine: a setup for all its videos, and a shot for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.checkpoint.size import VideoSize
from teacache.core.ranks import Ranks
from teacache.core.rule import Schedule
from teacache.request.job import Job
from teacache.request.values import Machine, Options

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Setup:
    """What all videos of a run share. It is made once.

    Attributes:
        checkpoint: its folder, complete.
        checkpoint_sha256: digest of the transformer's files.
        machine: the options' one, without `auto`.
        memory: the memory plan in one line; empty on a CPU.
        backend: of the attention, see `teacache.sampling.attention.choose_backend`.
        scheduler: `dpm` or `ddim`.
    """

    options: Options
    checkpoint: Path
    checkpoint_sha256: str
    size: VideoSize
    device: torch.device
    dtype: torch.dtype
    machine: Machine
    memory: str
    backend: str
    scheduler: str
    ranks: Ranks


class Shot(NamedTuple):
    """One video: a job, the digest of its photograph's pixels, and its schedule."""

    job: Job
    image_sha256: str
    schedule: Schedule
