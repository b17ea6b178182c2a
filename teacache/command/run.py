"""A run: identities and texts, then latents, frames, mp4 and record, video by video."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.base.console import Console, Stages
from teacache.base.errors import ArgumentError, reason
from teacache.base.files import cache_folder
from teacache.base.interruption import stop_requested
from teacache.command.jobs import Job
from teacache.command.loading import load
from teacache.command.memory import explained_out_of_memory
from teacache.command.order import Order, in_order
from teacache.command.preflight import Ready
from teacache.command.ranks import Ranks
from teacache.command.recording import record_of, settings_of
from teacache.comparison.comparison import Comparison, read_baseline
from teacache.core.forward import apply_teacache
from teacache.inputs.conditioning import Conditioning
from teacache.inputs.embedding_cache import EmbeddingCache
from teacache.inputs.identity import Identity, load_analyser
from teacache.inputs.text import TEXT_TOKENS, Text
from teacache.results.record import Record, read_record, summary
from teacache.results.slot import claimed_slot
from teacache.results.video import count_frames
from teacache.sampling import acceleration, sampler

if TYPE_CHECKING:
    import numpy as np
    from diffusers import ConsisIDPipeline
    from PIL import Image

logger = logging.getLogger(__name__)


class Sampled(NamedTuple):
    """A video that is written: its mp4, its record, and what else it is compared by."""

    job: Job
    path: Path
    record: Record
    frames: list[Image.Image]
    identity: Identity


def run(order: Order, ready: Ready, stages: Stages, console: Console) -> None:
    """Sample every video of an order; several of them, or one with a baseline, are compared."""
    jobs, comparison = ready.jobs, None
    if len(jobs) > 1 or order.baseline:
        comparison = Comparison(
            videos=len(jobs),
            baseline=_baseline(order, ready),
            load_analyser=lambda: load_analyser(ready.checkpoint),
        )
    to_do, places = jobs, {job: place for place, job in enumerate(jobs)}
    if order.resume:
        to_do = _without_finished(places, order, ready, console, comparison)
    to_do = in_order(to_do, ready.digests)
    try:
        with explained_out_of_memory(order.machine, console):
            for video in sampled(to_do, order, ready, stages, console):
                record = video.record
                if comparison:
                    with Stages(console).stage("quality"):  # of no video's seconds
                        record = comparison.add(
                            places[video.job], video.path, record, video.frames, video.identity
                        )
                if console.quiet or len(jobs) == 1:
                    console.done(video.path, summary(video.path, record))
    finally:
        # Also of a sweep that failed or was interrupted: what is done is done.
        if len(jobs) > 1 and comparison:
            _report(comparison, order, len(jobs), console)


def sampled(
    jobs: list[Job], order: Order, ready: Ready, stages: Stages, console: Console
) -> Iterator[Sampled]:
    """Load what the jobs need, and sample one after the other: each is written when it comes."""
    ranks = Ranks(ready)
    if not jobs:
        ranks.end()
        return
    ranks.begin(order, ready)
    identities, texts = condition(jobs, order, ready, stages)
    with stages.stage("loading"):
        pipe = load(order, ready)
    machine, guidance_scale = order.machine, order.format.guidance_scale
    start, drawn_for = None, None
    with apply_teacache(pipe) as handle:
        handle.team = ranks.join(pipe.transformer)
        if machine.compile:
            with stages.stage("compiling"):
                compile_ahead(pipe, identities[jobs[0].image], texts[jobs[0]], order, ready, ranks)
        for job in jobs:
            own, identity = Stages(console, shared=stages), identities[job.image]
            if len(ready.jobs) > 1:
                which = job.schedule or f"rel_l1_thresh {job.rel_l1_thresh}"
                console.say(f"seed {job.seed}, {which}")
            with own.stage("encoding"):
                if start is None or drawn_for != (job.image, job.seed):
                    start, drawn_for = None, (job.image, job.seed)
                    start = sampler.prepare(pipe, identity, ready.size, job.seed)
            handle.follow(ready.schedules[job])
            ranks.denoise(ready.schedules[job], start, texts[job], job.num_infer_steps)
            with own.stage("denoising"), console.bar(job.num_infer_steps, handle.counts) as on_step:
                latents, step_seconds = sampler.denoise(
                    pipe,
                    start,
                    texts[job],
                    ready.size,
                    num_infer_steps=job.num_infer_steps,
                    guidance_scale=guidance_scale,
                    on_step=on_step,
                )
            record = record_of(job, order, ready, step_seconds, own)
            with claimed_slot(order.output_path, record.settings.prefix) as slot:
                slot.keep(latents, record)
                room = sampler.room_to_decode(
                    pipe, ready.size, machine.offload, last=job is jobs[-1]
                )
                with own.stage("decoding"), room:
                    frames = sampler.decode(pipe, latents)
                with own.stage("writing"):
                    slot.write(frames, order.format.fps)
                record = record_of(job, order, ready, step_seconds, own)
                slot.finish(record)
            yield Sampled(job, slot.video, record, frames, identity)
    ranks.end()


def condition(
    jobs: list[Job], order: Order, ready: Ready, stages: Stages
) -> tuple[dict[str, Identity], dict[Job, Text]]:
    """The identity in each image by its source, and the text of each job."""
    cache = EmbeddingCache(cache_folder() / "embeddings") if order.reuse_conditioning else None
    conditioning = Conditioning(
        ready.checkpoint, ready.device, ready.dtype, order.machine.offload, cache
    )
    with stages.stage("identity"):
        sources = dict.fromkeys(job.image for job in jobs)
        identities = conditioning.find_identities(
            {source: ready.images[source] for source in sources}
        )
    guided = order.format.guidance_scale > 1
    wanted = {"prompt": dict.fromkeys(job.prompt for job in jobs)}
    if guided:
        wanted["negative_prompt"] = dict.fromkeys(job.negative_prompt for job in jobs)
    with stages.stage("text"):
        embedded = conditioning.embed_texts([text for texts in wanted.values() for text in texts])
    for name, texts in wanted.items():
        for text in texts:
            if embedded[text].lost:
                logger.warning(
                    "--%s is longer than %d tokens: without %r",
                    name,
                    TEXT_TOKENS,
                    embedded[text].lost,
                )
    return identities, {
        job: Text(
            embedded[job.prompt].embeds,
            embedded[job.negative_prompt].embeds if guided else None,
        )
        for job in jobs
    }


def compile_ahead(
    pipe: ConsisIDPipeline,
    identity: Identity,
    text: Text,
    order: Order,
    ready: Ready,
    ranks: Ranks,
) -> None:
    """Call what is to be compiled once, so that no video's seconds hold the compilation."""
    start = sampler.prepare(pipe, identity, ready.size, seed=0)
    ranks.denoise(None, start, text, num_infer_steps=1)  # whose one step is computed
    guidance_scale = order.format.guidance_scale
    latents, _ = sampler.denoise(
        pipe, start, text, ready.size, num_infer_steps=1, guidance_scale=guidance_scale
    )
    if acceleration.is_compiled(pipe.vae):
        with sampler.room_to_decode(pipe, ready.size, order.machine.offload, last=False):
            sampler.decode(pipe, latents)


def _baseline(order: Order, ready: Ready) -> np.ndarray | None:
    """The frames of `--baseline`, which one group of videos can be compared with."""
    if order.baseline is None:
        return None
    if len({settings_of(job, order, ready).group for job in ready.jobs}) > 1:
        raise ArgumentError(
            f"--baseline {order.baseline} is one video, and cannot be compared with those of "
            "several faces, prompts, seeds or numbers of steps: sample --rel_l1_thresh 0 with them "
            "instead"
        )
    return read_baseline(order.baseline, ready.size)


def _without_finished(
    places: dict[Job, int],
    order: Order,
    ready: Ready,
    console: Console,
    comparison: Comparison | None,
) -> list[Job]:
    """The jobs that no video, whole, in the output folder has the settings of; say which have.

    Args:
        places: of every job, in the order asked for.
    """
    left = []
    for job, place in places.items():
        finished = _find_finished(job, order, ready)
        if finished is None:
            left.append(job)
            continue
        video, record = finished
        console.done(video, f"done before {video}")
        if comparison:
            comparison.add_earlier(place, video, record)
    return left


def _find_finished(job: Job, order: Order, ready: Ready) -> tuple[Path, Record] | None:
    settings = settings_of(job, order, ready)
    for path in sorted(order.output_path.glob(f"{settings.prefix}_*.json")):
        video, record = path.with_suffix(".mp4"), read_record(path)
        if record and record.settings == settings and count_frames(video) == settings.num_frames:
            return video, record
    return None


def _report(comparison: Comparison, order: Order, videos: int, console: Console) -> None:
    """Write the report of a sweep, as far as it got, and show its table."""
    try:
        # Decoding videos to compare them, drawing and encoding take seconds: not after a signal.
        table, files = comparison.report(
            order.output_path, order.format.fps, in_full=not stop_requested()
        )
    except OSError as error:
        logger.warning("the sweep's report cannot be written: %s", reason(error))
        return
    if files:
        console.say(f"\n{table}\n")
        for file in files:
            console.say(f"sweep       {file}")
        if len(comparison.videos) < videos:
            console.say(f"            {len(comparison.videos)} of {videos} videos: see --resume")
