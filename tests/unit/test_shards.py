"""Parts of many videos: all of them, none twice, and what is compared together."""

from __future__ import annotations

import pytest

from teacache.request.arguments import parse_arguments
from teacache.request.job import Job
from teacache.request.readers import Shard
from teacache.request.shards import part_of, tasks, units
from teacache.request.values import Request


def order(*arguments: object) -> Request:
    return Request.of(parse_arguments(["--ckpts_path", "tiny", *map(str, arguments)]))


@pytest.mark.parametrize("count", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("thresholds", [(0.1,), (0, 0.1, 0.2)])
def test_every_video_is_in_one_shard(count, thresholds):
    sweep = ("--seed", *range(6), "--rel_l1_thresh", *thresholds)
    parts = [order(*sweep, "--shard", f"{i}/{count}") for i in range(count)]
    everything = order(*sweep).jobs
    sampled = [job for part in parts for job in part.jobs]
    assert sorted(sampled, key=everything.index) == list(everything)
    assert all(part.all_jobs == everything for part in parts)
    sizes = [len(part.jobs) for part in parts]
    assert max(sizes) - min(sizes) <= (len(thresholds) if count <= 6 else 1)


def test_what_is_compared_stays_together():
    """As long as no shard goes empty for it."""
    jobs = order("--seed", 1, 2, 3, "--rel_l1_thresh", 0.2, 0).jobs
    assert [[job.seed for job in unit] for unit in units(jobs, 3)] == [[1, 1], [2, 2], [3, 3]]
    assert [len(unit) for unit in units(jobs, 4)] == [1] * 6
    assert [job.seed for job in part_of(jobs, Shard(1, 2))] == [2, 2]


@pytest.mark.parametrize("thresholds", [(0.1,), (0, 0.1, 0.2)])
@pytest.mark.parametrize("workers", [1, 8, 50])
def test_every_video_is_in_one_task(workers, thresholds):
    """The last are the smallest: a worker waits for the others no longer than for one unit."""
    jobs = order("--seed", *range(40), "--rel_l1_thresh", *thresholds).jobs
    found = tasks(jobs, workers)
    assert [job for task in found for job in task] == list(jobs)
    sizes = [len(task) for task in found]
    assert sizes[-1] == (len(thresholds) if workers <= 40 else 1)
    assert max(sizes) < 32 + len(thresholds)
    assert len(found) >= min(2 * workers, 40)


def test_groups_differ_in_more_than_the_schedule():
    one = Job("a.png", "p", "", 1, 50, 0.1)
    assert one.group == Job("a.png", "p", "", 1, 50, None).group
    assert one.group != Job("a.png", "p", "", 1, 49, 0.1).group


@pytest.mark.parametrize("value", ["8/8", "1", "/8", "-1/8", "0/0", "1.0/8"])
def test_a_shard_that_is_none(capsys, value):
    with pytest.raises(SystemExit) as end:
        parse_arguments([f"--shard={value}"])
    assert end.value.code == 2
    assert value in capsys.readouterr().err
