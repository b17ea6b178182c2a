"""Many videos in parts: which of them a shard has, and which are best sampled by one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from teacache.command.jobs import Job
from teacache.command.readers import Shard

MOST_IN_A_TASK = 32  # jobs, whose texts are in memory together: 8 MB each at full size


def units(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """What is not divided between workers, in the order of the jobs.

    These are the groups of videos that differ in their schedule alone, which are compared with each
    other and share their start; or, where there are fewer groups than workers, single videos.
    """
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    return list(groups.values()) if len(groups) >= workers else [[job] for job in jobs]


def tasks(jobs: Sequence[Job], workers: int) -> list[tuple[Job, ...]]:
    """Units, several at a time, for workers that take one task after the other.

    A worker loads the text encoder once for a task. The tasks get smaller towards the end, so that
    all workers end at about the same time.
    """
    found, left = [], len(jobs)
    task: list[Job] = []
    for unit in units(jobs, workers):
        task += unit
        if len(task) >= min(MOST_IN_A_TASK, math.ceil(left / (2 * workers))):
            found.append(tuple(task))
            left -= len(task)
            task = []
    return found


def part_of(jobs: Sequence[Job], shard: Shard) -> list[Job]:
    """The jobs of a shard. Every job is in one, and the shards differ by one unit at most.

    It depends on the arguments alone, so that shards on different machines agree.
    """
    mine = units(jobs, shard.count)[shard.index :: shard.count]
    return list(itertools.chain.from_iterable(mine))
