"""Videos that are finished already, by this process or another one, and what that leaves to do."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from teacache.base.console import Console, Stages
from teacache.command.jobs import Job
from teacache.command.order import Order
from teacache.command.preflight import Ready
from teacache.command.recording import settings_of
from teacache.comparison.comparison import Comparison
from teacache.results.lock import locked
from teacache.results.record import Record, Settings, read_record
from teacache.results.slot import find_latents
from teacache.results.video import count_frames

if TYPE_CHECKING:
    import torch


def find_finished(
    settings: Settings, folder: Path, ignored: Collection[str] = ()
) -> tuple[Path, Record] | None:
    """A video in the folder, whole, that has the settings, and its record.

    Args:
        settings: with an empty `image_sha256` where the image has not been looked at: then its
            source counts, and the video that was made last.
        ignored: names of records that do not count.
    """
    records = sorted(folder.glob(f"{settings.prefix}_*.json"), reverse=not settings.image_sha256)
    for path in records:
        video, record = path.with_suffix(".mp4"), read_record(path)
        if path.name in ignored or record is None:
            continue
        found = record.settings
        if not settings.image_sha256:
            found = dataclasses.replace(found, image_sha256="")
        if found == settings and count_frames(video) == settings.num_frames:
            return video, record
    return None


def find_earlier(
    jobs: Sequence[Job],
    places: dict[Job, int],
    order: Order,
    ready: Ready,
    console: Console,
    comparison: Comparison | None,
) -> dict[Job, tuple[Path, Record]]:
    """The jobs that a video, whole, in the output folder has the settings of; say which.

    Args:
        places: of every job, in the order asked for.
    """
    earlier = {}
    for job in jobs:
        settings = settings_of(job, order, ready)
        finished = find_finished(settings, order.output_path, order.ignored)
        if finished is None:
            continue
        video, record = earlier[job] = finished
        console.done(video, f"done before {video}")
        if comparison:
            comparison.add_earlier(places[job], video, record)
    return earlier


@contextlib.contextmanager
def left_to_do(
    job: Job, order: Order, ready: Ready, console: Console
) -> Iterator[tuple[bool, tuple[Path, Record] | None]]:
    """Keep other processes with `--resume` from a job for as long as the block runs.

    Yields:
        whether no other one is at it; and its video, where one has made it since this one looked.
    """
    if not order.resume:
        yield True, None
        return
    settings = settings_of(job, order, ready)
    with locked(order.output_path, settings.name) as ours:
        finished = find_finished(settings, order.output_path, order.ignored) if ours else None
        if finished:
            console.done(finished[0], f"done by another process {finished[0]}")
        elif not ours:
            console.say(f"seed {job.seed}, {job.which}: another process samples it")
        yield ours, finished


def kept_latents(
    job: Job, order: Order, ready: Ready, stages: Stages, console: Console
) -> tuple[torch.Tensor, Record, Path] | None:
    """With `--resume`, latents of a job that an earlier run has denoised and not decoded.

    Args:
        stages: of the video, which get the seconds of that run.

    Returns:
        them, the record of their sampling with the settings of this run, and their file.
    """
    settings = settings_of(job, order, ready)
    found = next(find_latents(order.output_path, settings), None) if order.resume else None
    if found is None:
        return None
    path, record = found
    console.say(f"latents     {path}")
    stages.include(record.seconds)
    latents = load_file(path)["latents"].to(ready.device)
    return latents, dataclasses.replace(record, settings=settings), path


def add_others(comparison: Comparison, places: dict[Job, int], order: Order, ready: Ready) -> int:
    """Add what other processes have finished; return how many videos nobody has.

    Args:
        places: of every job of all shards, in the order asked for.
    """
    # This shard has looked at its own images alone. The digest of the others is empty.
    digests = {job.image: ready.digests.get(job.image, "") for job in places}
    every = dataclasses.replace(ready, digests=digests)
    there, missing = {finished.place for finished in comparison.videos}, 0
    for job, place in places.items():
        if place in there:
            continue
        finished = find_finished(settings_of(job, order, every), order.output_path)
        if finished:
            comparison.add_earlier(place, finished[0], finished[1])
        else:
            missing += 1
    return missing
