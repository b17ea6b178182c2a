"""A run: identities and texts, then latents, frames, mp4 and record, video by video."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.base.console import Console, Stages
from teacache.base.files import cache_folder
from teacache.checkpoint.folder import is_full_size
from teacache.command.finished import add_others, kept_latents, left_to_do, without_finished
from teacache.command.jobs import Job
from teacache.command.loading import load
from teacache.command.memory import explained_out_of_memory
from teacache.command.order import Order, in_order
from teacache.command.preflight import Ready
from teacache.command.ranks import Ranks
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
    from PIL import Image

logger = logging.getLogger(__name__)

SHORT_PROMPT = 30  # words; the published one has 110


class Sampled(NamedTuple):
    """A video that is written: its mp4, its record, and what else it is compared by."""

    job: Job
    path: Path
    record: Record
    frames: list[Image.Image]
    identity: Identity


def run(order: Order, ready: Ready, stages: Stages, console: Console) -> None:
    """Sample every video of an order; several of them are compared."""
    jobs, comparison, to_do = order.all_jobs, None, list(order.jobs)
    if len(jobs) > 1:
        comparison = comparison_of(ready, len(jobs))
    places = {job: place for place, job in enumerate(jobs)}
    if order.resume:
        to_do = without_finished(places, order, ready, console, comparison)
    to_do = in_order(to_do, ready.digests)
    try:
        with explained_out_of_memory(ready.machine, console):
            for video in sampled(to_do, order, ready, stages, console):
                record = video.record
                if comparison:
                    with Stages(console).stage("quality"):  # of no video's seconds
                        record = comparison.add(
                            places[video.job], video.path, record, video.frames, video.identity
                        )
                if console.quiet or len(jobs) == 1:
                    console.done(video.path, summary(video.path, record))
        missing = add_others(comparison, places, order, ready) if comparison else 0
        if comparison and order.shard:
            write_report_of_shards(comparison, order, missing, console)
    finally:
        # Also of a sweep that failed or was interrupted: what is done is done.
        if len(jobs) > 1 and comparison and not order.shard:
            write_report(comparison, order, len(jobs), console)


def comparison_of(ready: Ready, videos: int | None) -> Comparison:
    """What several videos are compared by.

    Args:
        videos: how many are expected, see `Comparison`.
    """
    return Comparison(videos, load_analyser=lambda: load_analyser(ready.checkpoint))


def sampled(
    jobs: list[Job], order: Order, ready: Ready, stages: Stages, console: Console
) -> Iterator[Sampled]:
    """Load what the jobs need, and sample one after the other: each is written when it comes."""
    ranks = Ranks(ready)
    if not jobs:
        ranks.end()
        return
    ranks.begin(order, ready)
    hint_at_short_prompts(jobs, ready, console)
    identities, texts = condition(jobs, order, ready, stages)
    with stages.stage("loading"):
        pipe = load(order, ready)
    room = Room(pipe, ready.size, ready.machine.offload)
    with apply_teacache(pipe) as handle:
        handle.team = ranks.join(pipe.transformer)
        if order.machine.compile:
            with stages.stage("compiling"):
                identity, text = identities[jobs[0].image], texts[jobs[0]]
                compile_ahead(pipe, identity, text, order, ready, ranks, room)
        loaded = Loaded(pipe, handle, order, stages, console, ranks, room)
        for job in jobs:
            with left_to_do(job, order, ready, console) as to_do:
                if to_do:
                    if len(order.jobs) > 1:
                        console.say(f"seed {job.seed}, {job.which}")
                    last = job is jobs[-1]
                    yield loaded.sample(job, ready, identities[job.image], texts[job], last)
    ranks.end()


def hint_at_short_prompts(jobs: list[Job], ready: Ready, console: Console) -> None:
    """Say of what prompts the model makes its best videos, where one is short."""
    shortest = min((job.prompt for job in jobs), key=lambda prompt: len(prompt.split()))
    if is_full_size(ready.checkpoint) and len(shortest.split()) < SHORT_PROMPT:
        console.say(
            f"hint        {shortest!r} is short: ConsisID was trained with long descriptions of "
            "person, scene, light and camera, and videos of such prompts are better"
        )


class Loaded:
    """What is loaded once and samples job after job: a pipeline that TeaCache is applied to.

    Args:
        stages: that the videos share.
        ranks: that denoise with this one.
        room: that videos are decoded in.
    """

    def __init__(
        self,
        pipe: ConsisIDPipeline,
        handle: TeaCacheHandle,
        order: Order,
        stages: Stages,
        console: Console,
        ranks: Ranks,
        room: Room,
    ):
        self.pipe, self.handle, self.order = pipe, handle, order
        self.stages, self.console, self.ranks, self.room = stages, console, ranks, room
        self._start: sampler.Start | None = None
        self._drawn_for: tuple[str, int] | None = None

    def sample(self, job: Job, ready: Ready, identity: Identity, text: Text, last: bool) -> Sampled:
        """Sample one job's video, and write it with its record.

        Args:
            last: whether no other follows, see `teacache.sampling.room.Room`.
        """
        order, own = self.order, Stages(self.console, shared=self.stages)
        latents, record, kept = kept_latents(job, order, ready, own, self.console) or (
            *self._denoise(job, ready, identity, text, own),
            None,
        )
        with claimed_slot(order.output_path, record.settings.prefix) as slot:
            slot.keep(latents, record, kept)
            with own.stage("decoding"), self.room.to_decode(last):
                frames = sampler.decode(self.pipe, latents)
            with own.stage("writing"):
                slot.write(frames)
            record = completed(record, job, order, ready, own, slot.video)
            slot.finish(record)
        return Sampled(job, slot.video, record, frames, identity)

    def _denoise(
        self, job: Job, ready: Ready, identity: Identity, text: Text, own: Stages
    ) -> tuple[torch.Tensor, Record]:
        """The latents of a job's video, and the record so far."""
        with own.stage("encoding"):
            start = self._start_of(job, ready, identity)
        self.handle.follow(ready.schedules[job])
        self.ranks.denoise(ready.schedules[job], start, text, job.num_infer_steps)
        bar = self.console.bar(job.num_infer_steps, self.handle.counts)
        with own.stage("denoising"), bar as on_step:
            latents, step_seconds = sampler.denoise(
                self.pipe,
                start,
                text,
                ready.size,
                num_infer_steps=job.num_infer_steps,
                guidance_scale=self.order.format.guidance_scale,
                on_step=on_step,
            )
        return latents, record_of(job, self.order, ready, step_seconds, own)

    def _start_of(self, job: Job, ready: Ready, identity: Identity) -> sampler.Start:
        """The start of a video; the one before is dropped first, and kept where it is the same."""
        if self._start is None or self._drawn_for != (job.image, job.seed):
            self._start, self._drawn_for = None, (job.image, job.seed)
            self._start = sampler.prepare(self.pipe, identity, ready.size, job.seed)
        return self._start


def condition(
    jobs: list[Job], order: Order, ready: Ready, stages: Stages, skip_failures: bool = False
) -> tuple[dict[str, Identity], dict[Job, Text]]:
    """The identity in each image by its source, and the text of each job.

    Args:
        skip_failures: leave images without a face out, instead of raising.
    """
    cache = EmbeddingCache(cache_folder() / "embeddings")
    conditioning = Conditioning(
        ready.checkpoint, ready.device, ready.dtype, ready.machine.offload, cache
    )
    with stages.stage("identity"):
        sources = dict.fromkeys(job.image for job in jobs)
        identities = conditioning.find_identities(
            {source: ready.images[source] for source in sources}, skip_failures
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
    room: Room,
) -> None:
    """Call what is to be compiled once, so that no video's seconds hold the compilation."""
    start = sampler.prepare(pipe, identity, ready.size, seed=0)
    ranks.denoise(None, start, text, num_infer_steps=1)  # whose one step is computed
    guidance_scale = order.format.guidance_scale
    latents, _ = sampler.denoise(
        pipe, start, text, ready.size, num_infer_steps=1, guidance_scale=guidance_scale
    )
    if acceleration.is_compiled(pipe.vae):
        with room.to_decode(last=False):
            sampler.decode(pipe, latents)
