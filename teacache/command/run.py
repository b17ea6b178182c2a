"""A run: identities and texts, then latents, frames, mp4 and record, video by video."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.base.console import Console, Stages
from teacache.base.files import cache_folder
from teacache.checkpoint.folder import is_full_size
from teacache.command.finished import add_others, find_earlier, kept_latents, left_to_do
from teacache.command.jobs import Job
from teacache.command.loading import load
from teacache.command.memory import explained_out_of_memory
from teacache.command.order import Order, in_order
from teacache.command.other_ranks import OtherRanks
from teacache.command.preflight import Ready
from teacache.command.recording import completed, record_of
from teacache.command.report import write_report, write_report_of_shards
from teacache.comparison.comparison import Comparison
from teacache.core.forward import apply_teacache
from teacache.core.handle import TeaCacheHandle
from teacache.inputs.conditioning import Conditioning
from teacache.inputs.embedding_cache import EmbeddingCache
from teacache.inputs.identity import Identity, load_analyser
from teacache.inputs.text import TEXT_TOKENS, Text
from teacache.results.record import Record, summary
from teacache.results.slot import claimed_slot
from teacache.sampling import acceleration, sampler
from teacache.sampling.room import Room

if TYPE_CHECKING:
    import torch
    from diffusers import ConsisIDPipeline

logger = logging.getLogger(__name__)

SHORT_PROMPT = 30  # words; the published one has 110


class Video(NamedTuple):
    """A job's video. earlier: whether it was there before, or another process has made it."""

    job: Job
    path: Path
    record: Record
    earlier: bool = False


class Loaded(NamedTuple):
    """A pipeline, TeaCache on its transformer, and the memory that it decodes in."""

    pipe: ConsisIDPipeline
    handle: TeaCacheHandle
    room: Room


def run(order: Order, ready: Ready, stages: Stages, console: Console) -> None:
    """Sample every video of an order; several of them are compared."""
    jobs = order.all_jobs
    session = Session(order, ready, stages, console)
    comparison = session.comparison
    try:
        for video in session.videos(order.jobs, ready, final=True):
            if not video.earlier and (console.quiet or len(jobs) == 1):
                console.done(video.path, summary(video.path, video.record))
        session.end()
        missing = add_others(comparison, session.places, order, ready) if comparison else 0
        if comparison and order.shard:
            write_report_of_shards(comparison, order, missing, console)
    finally:
        # Also of a sweep that failed or was interrupted: what is done is done.
        if len(jobs) > 1 and comparison and not order.shard:
            write_report(comparison, order, len(jobs), console)


class Session:
    """What samples job after job, and compares their videos: it loads the models once.

    Args:
        order: its jobs are all that may come; ready: for them, or for none of them yet.
        stages: that the videos share.

    Attributes:
        comparison: of several videos, else None.
        places: of every job, in the order asked for.
    """

    def __init__(self, order: Order, ready: Ready, stages: Stages, console: Console):
        self.order, self.stages, self.console = order, stages, console
        self.places = {job: place for place, job in enumerate(order.all_jobs)}
        self.comparison: Comparison | None = None
        if len(order.all_jobs) > 1:
            self.comparison = Comparison(
                len(order.all_jobs), load_analyser=lambda: load_analyser(ready.checkpoint)
            )
        self._others = OtherRanks(ready)
        self._loaded: Loaded | None = None
        self._start: sampler.Start | None = None
        self._drawn_for: tuple[str, int] | None = None

    def videos(self, jobs: Sequence[Job], ready: Ready, final: bool) -> Iterator[Video]:
        """The jobs' videos, each written when it comes; with `--resume` first those that are there.

        Args:
            ready: for these jobs.
            final: whether none follow, see `teacache.sampling.room.Room`.
        """
        order, console = self.order, self.console
        if order.resume:
            earlier = find_earlier(jobs, self.places, order, ready, console, self.comparison)
            yield from (Video(job, *found, earlier=True) for job, found in earlier.items())
            jobs = [job for job in jobs if job not in earlier]
        if not jobs:
            return
        jobs = in_order(jobs, ready.digests)
        with explained_out_of_memory(ready.machine, console):
            loaded, identities, texts = self._prepare(jobs, ready)
            for job in jobs:
                with left_to_do(job, order, ready, console) as (ours, found):
                    if found:
                        yield Video(job, *found, earlier=True)
                    elif ours:
                        if len(order.jobs) > 1:
                            console.say(f"seed {job.seed}, {job.which}")
                        inputs = identities[job.image], texts[job]
                        yield self._sample(loaded, job, ready, *inputs, final and job is jobs[-1])

    def end(self) -> None:
        """Let the other ranks end: no job follows."""
        self._others.end()

    def _prepare(
        self, jobs: list[Job], ready: Ready
    ) -> tuple[Loaded, dict[str, Identity], dict[Job, Text]]:
        """The pipeline, loaded with the first jobs, and what the jobs are conditioned on."""
        if self._loaded is None:
            self._others.begin(self.order, ready)
        hint_at_short_prompts(jobs, ready, self.console)
        # The text encoder and the face models take less than decoding.
        with self._loaded.room.to_decode(last=False) if self._loaded else nullcontext():
            identities, texts = condition(jobs, self.order, ready, self.stages)
        if self._loaded is None:
            self._loaded = self._load(ready, identities[jobs[0].image], texts[jobs[0]])
        return self._loaded, identities, texts

    def _load(self, ready: Ready, identity: Identity, text: Text) -> Loaded:
        """The pipeline, compiled ahead where that is asked for."""
        with self.stages.stage("loading"):
            pipe = load(self.order, ready)
        room = Room(pipe, ready.size, ready.machine.offload)
        handle = apply_teacache(pipe)
        handle.ranks = self._others.join(pipe.transformer)
        if self.order.machine.compile:
            with self.stages.stage("compiling"):
                compile_ahead(pipe, identity, text, self.order, ready, self._others, room)
        return Loaded(pipe, handle, room)

    def _sample(
        self, loaded: Loaded, job: Job, ready: Ready, identity: Identity, text: Text, last: bool
    ) -> Video:
        """Sample one job's video, write it with its record, and compare it."""
        order, own = self.order, Stages(self.console, shared=self.stages)
        latents, record, kept = kept_latents(job, order, ready, own, self.console) or (
            *self._denoise(loaded, job, ready, identity, text, own),
            None,
        )
        with claimed_slot(order.output_path, record.settings.prefix, kept) as slot:
            slot.keep(latents, record)
            with own.stage("decoding"), loaded.room.to_decode(last):
                frames = sampler.decode(loaded.pipe, latents)
            with own.stage("writing"):
                slot.write(frames)
            record = completed(record, job, order, ready, own, slot.video)
            slot.finish(record)
        if self.comparison:
            with Stages(self.console).stage("quality"):  # of no video's seconds
                place = self.places[job]
                record = self.comparison.add(place, slot.video, record, frames, identity)
        return Video(job, slot.video, record)

    def _denoise(
        self, loaded: Loaded, job: Job, ready: Ready, identity: Identity, text: Text, own: Stages
    ) -> tuple[torch.Tensor, Record]:
        """The latents of a job's video, and the record so far."""
        with own.stage("encoding"):
            start = self._start_of(loaded.pipe, job, ready, identity)
        loaded.handle.follow(ready.schedules[job])
        self._others.denoise(ready.schedules[job], start, text, job.num_infer_steps)
        bar = self.console.bar(job.num_infer_steps, loaded.handle.counts)
        with own.stage("denoising"), bar as on_step:
            latents, step_seconds = sampler.denoise(
                loaded.pipe,
                start,
                text,
                ready.size,
                num_infer_steps=job.num_infer_steps,
                guidance_scale=self.order.format.guidance_scale,
                on_step=on_step,
            )
        return latents, record_of(job, self.order, ready, step_seconds, own)

    def _start_of(
        self, pipe: ConsisIDPipeline, job: Job, ready: Ready, identity: Identity
    ) -> sampler.Start:
        """The start of a video; the one before is dropped first, and kept where it is the same."""
        if self._start is None or self._drawn_for != (job.image, job.seed):
            self._start, self._drawn_for = None, (job.image, job.seed)
            self._start = sampler.prepare(pipe, identity, ready.size, job.seed)
        return self._start


def hint_at_short_prompts(jobs: list[Job], ready: Ready, console: Console) -> None:
    """Say of what prompts the model makes its best videos, where one is short."""
    shortest = min((job.prompt for job in jobs), key=lambda prompt: len(prompt.split()))
    if is_full_size(ready.checkpoint) and len(shortest.split()) < SHORT_PROMPT:
        console.say(
            f"hint        {shortest!r} is short: ConsisID was trained with long descriptions of "
            "person, scene, light and camera, and videos of such prompts are better"
        )


def condition(
    jobs: list[Job], order: Order, ready: Ready, stages: Stages
) -> tuple[dict[str, Identity], dict[Job, Text]]:
    """The identity in each image by its source, and the text of each job."""
    cache = EmbeddingCache(cache_folder() / "embeddings")
    conditioning = Conditioning(
        ready.checkpoint, ready.device, ready.dtype, ready.machine.offload, cache
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
    others: OtherRanks,
    room: Room,
) -> None:
    """Call what is to be compiled once, so that no video's seconds hold the compilation."""
    start = sampler.prepare(pipe, identity, ready.size, seed=0)
    others.denoise(None, start, text, num_infer_steps=1)  # whose one step is computed
    guidance_scale = order.format.guidance_scale
    latents, _ = sampler.denoise(
        pipe, start, text, ready.size, num_infer_steps=1, guidance_scale=guidance_scale
    )
    if acceleration.is_compiled(pipe.vae):
        with room.to_decode(last=False):
            sampler.decode(pipe, latents)
