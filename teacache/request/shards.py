"""Division of many videos among shards, or among the workers of a cluster."""

import itertools
import math
from collections.abc import Sequence

from teacache.request.job import Job
from teacache.request.readers import Shard

MAX_TASK = 32  # jobs; the embeddings of each prompt take 8 MB at full size


def units(jobs: Sequence[Job], workers: int) -> list[list[Job]]:
    """Divide jobs into units that one worker samples, in the order of the jobs.

    A unit is a group of videos that differ only in their schedule. They share their initial noise,
    and are compared with each other. If there are fewer groups than workers, a unit is one video.
    """
    groups: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    return list(groups.values()) if len(groups) >= workers else [[job] for job in jobs]


def tasks(jobs: Sequence[Job], workers: int) -> list[tuple[Job, ...]]:
    """Divide jobs into tasks of one or more units. A worker takes one task after the other.

    A worker loads the text encoder once for each task. The last tasks are small, so that all
    workers end at about the same time.
    """
    result, remaining = [], len(jobs)
    task: list[Job] = []
    for unit in units(jobs, workers):
        task += unit
        if len(task) >= min(MAX_TASK, math.ceil(remaining / (2 * workers))):
            result.append(tuple(task))
            remaining -= len(task)
            task = []
    return result


def part_of(jobs: Sequence[Job], shard: Shard) -> list[Job]:
    """The jobs of one shard. Each job is in one shard; shards differ by one unit at most.

    The result depends only on the arguments, so shards on several machines agree.
    """
    own = units(jobs, shard.count)[shard.index :: shard.count]
    return list(itertools.chain.from_iterable(own))
