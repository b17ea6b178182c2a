"""The loop of every run: conditions of a window of videos, then latents, mp4 and record of each."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from teacache.base.console import Console, Stages
from teacache.checkpoint.folder import is_full_size
from teacache.comparison.comparison import Comparison
from teacache.inputs.identity import Identity, load_analyser
from teacache.inputs.photograph_store import PhotographStore
from teacache.preflight.setup import Setup, Shot
from teacache.request.job import Job
from teacache.request.values import Request
from teacache.results.finished_videos import FinishedVideos
from teacache.results.record import Record, summary
from teacache.results.slot import claimed_slot
from teacache.run.conditions import Condition, window_size
from teacache.run.memory import explained_out_of_memory
from teacache.run.recording import completed, record_of, settings_of
from teacache.run.report import add_others, write_report, write_report_of_shards
from teacache.run.resume import pending, saved_latents
from teacache.run.session import Session
from teacache.sampling import sampler

CPU = torch.device("cpu")
SHORT_PROMPT = 30  # words; the published one has 110


class FinishedVideo(NamedTuple):
    """A job's video. frames, identity: None if an earlier run or another process has sampled it."""

    job: Job
    path: Path
    record: Record
    frames: list[Image.Image] | None = None
    identity: Identity | None = None


def run(
    request: Request, setup: Setup, shots: list[Shot], photographs: PhotographStore, stages: Stages
) -> None:
    """Sample every video of a request; compare them if there are several."""
    jobs, console = request.all_jobs, stages.console
    finished = FinishedVideos(setup.options.output_path) if request.resume else None
    session = Session(setup, photographs, stages, len(shots))
    comparison = comparison_of(jobs, setup)
    try:
        for video in compared(session, shots, finished, comparison, final=True):
            if video.frames and (console.quiet or len(jobs) == 1):
                console.done(video.path, summary(video.path, video.record))
        session.end()
        if comparison:
            add_others(comparison, shots, setup)
            if request.shard:
                write_report_of_shards(comparison, request.shard, console)
    finally:
        # A sweep that failed or was interrupted also has a report.
        if comparison and not request.shard:
            write_report(comparison, console)


def sample(
    session: Session, shots: Sequence[Shot], finished: FinishedVideos | None, final: bool
) -> Iterator[FinishedVideo]:
    """Sample videos; yield each after it is written, and first those that were finished before.

    Args:
        finished: of earlier runs, for `--resume`; None to sample all.
        final: whether these are the session's last videos, see `DecoderMemory.to_decode`.
    """
    setup, console, remaining = session.setup, session.stages.console, []
    if finished:
        finished.list_folder()
    for shot in shots:
        if finished and (video := finished.find(settings_of(shot, setup))):
            console.done(video[0], f"done before {video[0]}")
            yield FinishedVideo(shot.job, *video)
        else:
            remaining.append(shot)
    if not remaining:
        return
    remaining = in_order(remaining)
    hint_at_short_prompts(remaining, setup, console)
    if len(remaining) > (window := window_size()):
        console.say(f"window      faces and texts of {window} videos at a time")
    for start in range(0, len(remaining), window):
        part = remaining[start : start + window]
        for shot, condition in zip(part, session.conditions(part), strict=True):
            with pending(shot, setup, finished, console) as (locked, other):
                if other:
                    yield FinishedVideo(shot.job, *other)
                elif locked:
                    if len(shots) > 1:
                        console.say(f"seed {shot.job.seed}, {shot.job.which}")
                    last = final and shot is remaining[-1]
                    yield _sample(session, shot, condition, finished is not None, last)


def _sample(
    session: Session, shot: Shot, condition: Condition, resume: bool, last: bool
) -> FinishedVideo:
    """Sample a video, and write it with its record."""
    setup = session.setup
    models = session.load(condition)
    stages = Stages(session.stages.console, shared=session.stages)
    latents: torch.Tensor
    saved = saved_latents(shot, setup, stages) if resume else None
    if saved:
        latents, record, file = saved
    else:
        latents, step_seconds = session.denoise(models, shot, condition, stages)
        record, file = record_of(shot, setup, step_seconds, stages), None
    with claimed_slot(setup.options.output_path, record.settings.prefix, file) as slot:
        slot.keep(latents, record)
        with stages.stage("decoding"), models.memory.to_decode(last):
            frames = sampler.decode(models.pipe, latents)
        with stages.stage("writing"):
            video_bytes = slot.write(frames, record.settings.mp4_quality)
        record = completed(record, shot, setup, stages, slot.video, video_bytes)
        slot.finish(record)
    return FinishedVideo(shot.job, slot.video, record, frames, condition.identity(CPU))


def comparison_of(jobs: Sequence[Job], setup: Setup) -> Comparison | None:
    """A comparison of several videos; None for a single one."""
    if len(jobs) == 1:
        return None
    folder = setup.options.output_path
    return Comparison(jobs, folder, lambda: load_analyser(setup.checkpoint))


def compared(
    session: Session,
    shots: Sequence[Shot],
    finished: FinishedVideos | None,
    comparison: Comparison | None,
    final: bool,
) -> Iterator[FinishedVideo]:
    """Sample videos, see `sample`; add each to a comparison, and yield it with its figures."""
    console = session.stages.console
    with explained_out_of_memory(session.setup.machine, console):
        for video in sample(session, shots, finished, final):
            job, path, record, frames, identity = video
            if comparison and frames and identity:
                with Stages(console).stage("quality"):  # not part of the video's seconds
                    record = comparison.add(job, path, record, frames, identity)
            elif comparison:
                comparison.add_earlier(job, path, record)
            yield video._replace(record=record)


def in_order(shots: Sequence[Shot]) -> list[Shot]:
    """Sort shots by face and seed, then by prompt and steps, with threshold 0 first in its group.

    The other videos of a group are compared with threshold 0.
    """

    def keys(shot: Shot) -> tuple[tuple[object, ...], ...]:
        """Equal for videos with the same noise, and for videos of the same group."""
        noise, job = (shot.image_sha256, shot.job.seed), shot.job
        return noise, (*noise, job.prompt, job.negative_prompt, job.num_infer_steps)

    first: dict[tuple[object, ...], int] = {}  # index of the first shot with a key
    for index, shot in enumerate(shots):
        for key in keys(shot):
            first.setdefault(key, index)
    return sorted(
        shots,
        key=lambda shot: (*map(first.__getitem__, keys(shot)), shot.job.rel_l1_thresh != 0),
    )


def hint_at_short_prompts(shots: Sequence[Shot], setup: Setup, console: Console) -> None:
    """Print a hint if a prompt is short for a full-size checkpoint."""
    shortest = min((shot.job.prompt for shot in shots), key=lambda prompt: len(prompt.split()))
    if is_full_size(setup.checkpoint) and len(shortest.split()) < SHORT_PROMPT:
        console.say(
            f"hint        {shortest!r} is short: ConsisID was trained with long descriptions of "
            "person, scene, light and camera, and makes better videos from them"
        )
