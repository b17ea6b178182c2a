"""`--resume`: videos and latents in the output folder that need no second computation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from teacache.base.console import Console, Stages
from teacache.comparison.comparison import Comparison
from teacache.preflight.checks import Ready
from teacache.request.jobs_file import Job
from teacache.request.values import Order
from teacache.results.output_folder import locked_name
from teacache.results.record import Record, Settings, read_record
from teacache.results.slot import find_latents
from teacache.results.video import count_frames
from teacache.run.recording import settings_of

if TYPE_CHECKING:
    import torch


def find_finished(settings: Settings, order: Order) -> tuple[Path, Record] | None:
    """A complete video with these settings and its record, or None.

    Args:
        settings: an empty `image_sha256` means that the image was not read. Then the image's source
            is compared, and the newest video is returned.
    """
    records = sorted(
        order.output_path.glob(f"{settings.prefix}_*.json"), reverse=not settings.image_sha256
    )
    for path in records:
        video, record = path.with_suffix(".mp4"), read_record(path)
        if path.name in order.ignored or record is None:
            continue
        other = record.settings
        if not settings.image_sha256:
            other = dataclasses.replace(other, image_sha256="")
        if other == settings and count_frames(video) == settings.num_frames:
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
    """The jobs with a finished video in the output folder, which is printed and compared."""
    earlier = {}
    for job in jobs:
        finished = find_finished(settings_of(job, order, ready), order)
        if finished:
            earlier[job] = finished
            console.done(finished[0], f"done before {finished[0]}")
            if comparison:
                comparison.add_earlier(places[job], *finished)
    return earlier


@contextlib.contextmanager
def pending(
    job: Job, order: Order, ready: Ready, console: Console
) -> Iterator[tuple[bool, tuple[Path, Record] | None]]:
    """With `--resume`, lock a job against other processes while the block runs.

    Yields:
        whether the lock is held: False if another process samples the job. And the video, if
        another process has finished it since `find_earlier`.
    """
    if not order.resume:
        yield True, None
        return
    settings = settings_of(job, order, ready)
    with locked_name(order.output_path, settings.name) as held:
        finished = find_finished(settings, order) if held else None
        if finished:
            console.done(finished[0], f"done by another process {finished[0]}")
        elif not held:
            console.say(f"seed {job.seed}, {job.which}: another process samples it")
        yield held, finished


def saved_latents(
    job: Job, order: Order, ready: Ready, stages: Stages, console: Console
) -> tuple[torch.Tensor, Record, Path] | None:
    """With `--resume`, latents of a job that an earlier run saved and did not decode.

    Args:
        stages: of the video; the seconds of the earlier run are added.

    Returns:
        the latents, their record with the settings of this run, and their file; or None.
    """
    settings = settings_of(job, order, ready)
    saved = next(find_latents(order.output_path, settings), None) if order.resume else None
    if saved is None:
        return None
    path, record = saved
    console.say(f"latents     {path}")
    stages.include(record.seconds)
    latents = load_file(path)["latents"].to(ready.device)
    return latents, dataclasses.replace(record, settings=settings), path


def add_finished(comparison: Comparison, places: dict[Job, int], order: Order, ready: Ready) -> int:
    """Add the videos of other processes to a comparison; return how many videos are missing.

    Args:
        places: index of every job of all shards in the request.
    """
    # This shard has read only its own images. The digests of the others are empty.
    digests = {job.image: ready.digests.get(job.image, "") for job in places}
    every = dataclasses.replace(ready, digests=digests)
    added = {finished.place for finished in comparison.videos}
    for job, place in places.items():
        finished = None
        if place not in added:
            finished = find_finished(settings_of(job, order, every), order)
        if finished:
            comparison.add_earlier(place, *finished)
    return len(places) - len(comparison.videos)
