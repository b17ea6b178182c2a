"""The sampling loop: identities and texts, then latents, frames, mp4 and record of each video."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.base.console import Console, Stages
from teacache.base.files import cache_folder
from teacache.checkpoint.folder import is_full_size
from teacache.command.finished import add_finished, find_earlier, pending, saved_latents
from teacache.command.jobs import Job
from teacache.command.memory import explained_out_of_memory
from teacache.command.models import load
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
from teacache.inputs.text import Text
from teacache.results.record import Record, summary
from teacache.results.slot import claimed_slot
from teacache.sampling import acceleration, sampler
from teacache.sampling.decoder_memory import DecoderMemory

if TYPE_CHECKING:
    import torch
    from diffusers import ConsisIDPipeline

logger = logging.getLogger(__name__)

SHORT_PROMPT = 30  # words; the published one has 110


class FinishedVideo(NamedTuple):
    """A job's video. earlier: whether an earlier run or another process has sampled it."""

    job: Job
    path: Path
    record: Record
    earlier: bool = False


class Models(NamedTuple):
    """A pipeline, TeaCache on its transformer, and the memory for its decoder."""

    pipe: ConsisIDPipeline
    handle: TeaCacheHandle
    memory: DecoderMemory


def run(order: Order, ready: Ready, stages: Stages, console: Console) -> None:
    """Sample every video of an order; compare them if there are several."""
    jobs = order.all_jobs
    session = Session(order, ready, stages, console)
    comparison = session.comparison
    try:
        for video in session.videos(order.jobs, ready, final=True):
            if not video.earlier and (console.quiet or len(jobs) == 1):
                console.done(video.path, summary(video.path, video.record))
        session.end()
        missing = add_finished(comparison, session.places, order, ready) if comparison else 0
        if comparison and order.shard:
            write_report_of_shards(comparison, order, missing, console)
    finally:
        # A sweep that failed or was interrupted also has a report.
        if len(jobs) > 1 and comparison and not order.shard:
            write_report(comparison, order, console)


class Session:
    """Samples one job after the other, and compares their videos. It loads the models once.

    Args:
        order: with all jobs of the session.
        ready: of the same order; its images and schedules are not used.
        stages: shared by all videos.

    Attributes:
        comparison: None for a single video.
        places: index of every job in the request.
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
        self._models: Models | None = None
        self._start: sampler.Start | None = None
        self._start_key: tuple[str, int] | None = None

    def videos(self, jobs: Sequence[Job], ready: Ready, final: bool) -> Iterator[FinishedVideo]:
        """Sample jobs; yield each video after it is written. `--resume` yields finished ones first.

        Args:
            ready: of these jobs.
            final: whether these are the last jobs, see `DecoderMemory.to_decode`.
        """
        order, console = self.order, self.console
        if order.resume:
            earlier = find_earlier(jobs, self.places, order, ready, console, self.comparison)
            for job, finished in earlier.items():
                yield FinishedVideo(job, *finished, earlier=True)
            jobs = [job for job in jobs if job not in earlier]
        if not jobs:
            return
        jobs = in_order(jobs, ready.digests)
        with explained_out_of_memory(ready.machine, console):
            models, identities, texts = self._prepare(jobs, ready)
            for job in jobs:
                with pending(job, order, ready, console) as (locked, other):
                    if other:
                        yield FinishedVideo(job, *other, earlier=True)
                    elif locked:
                        if len(order.jobs) > 1:
                            console.say(f"seed {job.seed}, {job.which}")
                        inputs = identities[job.image], texts[job]
                        yield self._sample(models, job, ready, *inputs, final and job is jobs[-1])

    def end(self) -> None:
        """Let the other ranks end, after the last job."""
        self._others.end()

    def _prepare(
        self, jobs: list[Job], ready: Ready
    ) -> tuple[Models, dict[str, Identity], dict[Job, Text]]:
        """The pipeline, the identity by image, and the text of each job."""
        if self._models is None:
            self._others.begin(self.order, ready)
        hint_at_short_prompts(jobs, ready, self.console)
        # The text encoder and the face models need less memory than decoding.
        with self._models.memory.to_decode(last=False) if self._models else nullcontext():
            identities, texts = condition(jobs, self.order, ready, self.stages)
        if self._models is None:
            self._models = self._load(ready, identities[jobs[0].image], texts[jobs[0]])
        return self._models, identities, texts

    def _load(self, ready: Ready, identity: Identity, text: Text) -> Models:
        """Load the pipeline, and compile it if `--compile` is set."""
        with self.stages.stage("loading"):
            pipe = load(self.order, ready)
        memory = DecoderMemory(pipe, ready.size, ready.machine.offload)
        handle = apply_teacache(pipe)
        handle.ranks = self._others.join(pipe.transformer)
        if self.order.machine.compile:
            with self.stages.stage("compiling"):
                self._compile(pipe, identity, text, ready, memory)
        return Models(pipe, handle, memory)

    def _compile(
        self,
        pipe: ConsisIDPipeline,
        identity: Identity,
        text: Text,
        ready: Ready,
        memory: DecoderMemory,
    ) -> None:
        """Denoise one step and decode, so that the seconds of no video include compilation."""
        start = sampler.prepare(pipe, identity, ready.size, seed=0)
        self._others.denoise(None, start, text, num_infer_steps=1)
        guidance_scale = self.order.format.guidance_scale
        latents, _ = sampler.denoise(
            pipe, start, text, ready.size, num_infer_steps=1, guidance_scale=guidance_scale
        )
        if acceleration.is_compiled(pipe.vae):
            with memory.to_decode(last=False):
                sampler.decode(pipe, latents)

    def _sample(
        self, models: Models, job: Job, ready: Ready, identity: Identity, text: Text, last: bool
    ) -> FinishedVideo:
        """Sample a job's video, write it with its record, and compare it."""
        order, own = self.order, Stages(self.console, shared=self.stages)
        latents, record, file = saved_latents(job, order, ready, own, self.console) or (
            *self._denoise(models, job, ready, identity, text, own),
            None,
        )
        with claimed_slot(order.output_path, record.settings.prefix, file) as slot:
            slot.keep(latents, record)
            with own.stage("decoding"), models.memory.to_decode(last):
                frames = sampler.decode(models.pipe, latents)
            with own.stage("writing"):
                slot.write(frames, record.settings.mp4_quality)
            record = completed(record, job, order, ready, own, slot.video)
            slot.finish(record)
        if self.comparison:
            with Stages(self.console).stage("quality"):  # not part of the video's seconds
                place = self.places[job]
                record = self.comparison.add(place, slot.video, record, frames, identity)
        return FinishedVideo(job, slot.video, record)

    def _denoise(
        self, models: Models, job: Job, ready: Ready, identity: Identity, text: Text, own: Stages
    ) -> tuple[torch.Tensor, Record]:
        """The latents of a job's video, and the record after denoising."""
        with own.stage("encoding"):
            start = self._start_of(models.pipe, job, ready, identity)
        models.handle.follow(ready.schedules[job])
        self._others.denoise(ready.schedules[job], start, text, job.num_infer_steps)
        bar = self.console.bar(job.num_infer_steps, models.handle.counts)
        with own.stage("denoising"), bar as on_step:
            latents, step_seconds = sampler.denoise(
                models.pipe,
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
        """The start of a job's video. Jobs with the same image and seed share it."""
        if self._start is None or self._start_key != (job.image, job.seed):
            self._start, self._start_key = None, (job.image, job.seed)
            self._start = sampler.prepare(pipe, identity, ready.size, job.seed)
        return self._start


def hint_at_short_prompts(jobs: list[Job], ready: Ready, console: Console) -> None:
    """Print a hint if a prompt is short for a full-size checkpoint."""
    shortest = min((job.prompt for job in jobs), key=lambda prompt: len(prompt.split()))
    if is_full_size(ready.checkpoint) and len(shortest.split()) < SHORT_PROMPT:
        console.say(
            f"hint        {shortest!r} is short: ConsisID was trained with long descriptions of "
            "person, scene, light and camera, and makes better videos from them"
        )


def condition(
    jobs: list[Job], order: Order, ready: Ready, stages: Stages
) -> tuple[dict[str, Identity], dict[Job, Text]]:
    """The identity in each image, by the image's source; and the text of each job."""
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
    prompts = [("prompt", job.prompt) for job in jobs]
    if guided:
        prompts += [("negative_prompt", job.negative_prompt) for job in jobs]
    prompts = list(dict.fromkeys(prompts))
    with stages.stage("text"):
        embedded = conditioning.embed_texts([text for _, text in prompts])
    for flag, text in prompts:
        if complaint := embedded[text].complaint:
            logger.warning("--%s %s", flag, complaint)
    return identities, {
        job: Text(
            embedded[job.prompt].embeds,
            embedded[job.negative_prompt].embeds if guided else None,
        )
        for job in jobs
    }
