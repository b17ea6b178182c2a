"""One run of the command: what is loaded once, the videos sampled with it, their report."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from teacache import acceleration, attention, rescue, sampler, sweep
from teacache import device as devices
from teacache import identity as faces
from teacache.cache import EmbeddingCache, cache_folder
from teacache.conditioning import Conditioning, condition
from teacache.errors import without_credentials
from teacache.jobs import Job
from teacache.output import written_whole
from teacache.report import Stages, build_record, denoising_bar, print_now, summary, write_record
from teacache.transformer import apply_teacache

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline
    from PIL import Image

    from teacache.handle import TeaCacheHandle
    from teacache.size import VideoSize

logger = logging.getLogger(__name__)


class Run:
    """Everything that the videos of a run share, and the results so far.

    Args:
        args: the command's arguments.
        jobs: what to sample, every threshold known.
        images: each job's face image, by its source.
        backend: of the attention, see `teacache.attention.choose_backend`.
        stages: those that have passed already.
        say: takes a line for the user.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        jobs: list[Job],
        checkpoint: Path,
        images: dict[str, Image.Image],
        size: VideoSize,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        stages: Stages,
        say: Callable[[str], None],
    ):
        self.args, self.jobs, self.checkpoint, self.images = args, jobs, checkpoint, images
        self.size, self.device, self.dtype, self.backend = size, device, dtype, backend
        self.stages, self.say = stages, say
        self.results: dict[Job, sweep.Result] = {}
        self._digests = {
            source: hashlib.sha256(image.tobytes()).hexdigest() for source, image in images.items()
        }
        given = sweep.read_baseline(args.baseline, jobs, size) if args.baseline else None
        self.baselines = sweep.Baselines(self.results, given)
        if args.resume:
            self._take_over_finished()

    def sample(self) -> None:
        """Load what the remaining jobs need, and sample them, writing each as it is done."""
        to_do = [job for job in sweep.in_order(self.jobs) if job not in self.results]
        if not to_do:
            return
        args = self.args
        cache = EmbeddingCache(cache_folder() / "embeddings") if args.reuse_conditioning else None
        conditioning = Conditioning(self.checkpoint, self.device, self.dtype, args.offload, cache)
        identities, texts = condition(
            conditioning, to_do, self.images, args.guidance_scale > 1, self.stages
        )
        with self.stages.stage("loading"):
            pipe = self._load_pipeline()
        starts: dict[tuple[str, int], sampler.Start] = {}
        with apply_teacache(pipe, coefficients=args.coefficients) as handle:
            if args.compile:
                with self.stages.stage("compiling"):
                    start = sampler.prepare(pipe, identities[to_do[0].image], self.size, seed=0)
                    self._compile(pipe, start, texts[to_do[0]])
            for job in to_do:
                own, face_and_noise = Stages(self.say, shared=self.stages), (job.image, job.seed)
                self._drop_frames_before(job)
                if len(self.jobs) > 1:
                    self.say(f"seed {job.seed}, rel_l1_thresh {job.rel_l1_thresh}")
                with own.stage("encoding"):
                    if face_and_noise not in starts:  # only those of one group are kept
                        starts = {
                            face_and_noise: sampler.prepare(
                                pipe, identities[job.image], self.size, job.seed
                            )
                        }
                self._sample_one(
                    *(job, pipe, handle, starts[face_and_noise], texts[job], own),
                    last=job is to_do[-1],
                )

    def _load_pipeline(self) -> ConsisIDPipeline:
        """Transformer, VAE and scheduler, accelerated as the arguments say."""
        args = self.args
        pipe = sampler.load_pipeline(
            *(self.checkpoint, self.device, self.dtype, args.offload, args.vae_tiling),
            parts=("transformer", "vae"),
        )
        attention.use_attention(pipe.transformer, self.backend)
        if args.quantize:
            acceleration.quantize_fp8(pipe.transformer)
        if args.compile:
            acceleration.compile_transformer(pipe.transformer)
            if len(self.jobs) >= acceleration.COMPILED_DECODER_PAYS_FROM:
                acceleration.compile_decoder(pipe.vae)
        return pipe

    def _compile(self, pipe: ConsisIDPipeline, start: sampler.Start, text: sampler.Text) -> None:
        """Call what is to be compiled once, so that no video's seconds hold the compilation."""
        latents, _ = sampler.denoise(
            *(pipe, start, text, self.size),
            num_infer_steps=1,
            guidance_scale=self.args.guidance_scale,
        )
        if acceleration.is_compiled(pipe.vae):
            with self._room_to_decode(pipe, last=False):
                sampler.decode(pipe, latents)

    def _sample_one(
        self,
        job: Job,
        pipe: ConsisIDPipeline,
        handle: TeaCacheHandle,
        start: sampler.Start,
        text: sampler.Text,
        stages: Stages,
        last: bool,
    ) -> None:
        """Sample, decode and write one video, and add it to the results."""
        handle.rel_l1_thresh = job.rel_l1_thresh
        with (
            stages.stage("denoising"),
            denoising_bar(job.num_infer_steps, handle, self.args.quiet) as on_step,
        ):
            latents, step_seconds = sampler.denoise(
                pipe,
                start,
                text,
                self.size,
                num_infer_steps=job.num_infer_steps,
                guidance_scale=self.args.guidance_scale,
                on_step=on_step,
            )

        def record() -> dict[str, object]:
            return build_record(
                self._settings(job),
                handle.schedule,
                step_seconds,
                stages.with_total(),
                devices.device_name(self.device),
                devices.peak_memory_bytes(self.device),
            )

        with rescue.latents_survive(latents, record, stages, self.args):
            with self._room_to_decode(pipe, last), stages.stage("decoding"):
                pictures = sampler.decode(pipe, latents)
            prefix = f"{job.seed}_{job.rel_l1_thresh}"
            video, written = rescue.write_with_record(pictures, prefix, record, stages, self.args)
        frames = np.stack([np.array(picture) for picture in pictures])
        self.results[job] = sweep.Result(job, video, written, frames)
        if len(self.jobs) > 1 or self.baselines.given is not None:
            # Only now, and into a record that is whole already: a video that is done is safe.
            with stages.stage("quality"):
                written["quality"] = sweep.judge(
                    frames, *self.baselines.of(job), start.identity, self._analyser
                )
            _write_again(written, video)
        if self.args.quiet:
            print_now(str(video))
        elif len(self.jobs) == 1:
            self.say(summary(video, written))

    def _room_to_decode(self, pipe: ConsisIDPipeline, last: bool) -> AbstractContextManager:
        """The GPU without the transformer, where it would stand in the VAE's way."""
        if self.args.offload != "none":  # it has left already
            return contextlib.nullcontext()
        stay = not last and (
            self.device.type == "cpu"
            or (self.args.keep_loaded and sampler.fits_beside_decoding(self.size, self.device))
        )
        return contextlib.nullcontext() if stay else sampler.without_transformer(pipe, last)

    @functools.cached_property
    def _analyser(self) -> object:
        return faces.load_analyser(self.checkpoint)

    def report(self, in_full: bool) -> None:
        """Write the report of a sweep, as far as it got, and show its table.

        Args:
            in_full: with what takes seconds: decoding videos to compare them, drawing, encoding.
        """
        results = [self.results[job] for job in self.jobs if job in self.results]
        if len(self.jobs) > 1 and results:
            if in_full:
                self.baselines.compare_the_rest()
            table, files = sweep.write_sweep(self.args.output_path, results, self.args.fps, in_full)
            self.say(f"\n{table}\n")
            for file in files:
                self.say(f"sweep       {file}")
            if len(results) < len(self.jobs):
                self.say(f"            {len(results)} of {len(self.jobs)} videos: see --resume")

    def _take_over_finished(self) -> None:
        for job in self.jobs:
            found = sweep.find_finished(self.args.output_path, job, self._settings(job))
            if found:
                self.results[job] = found
                self.say(f"done before {found.path}")
                if self.args.quiet:
                    print_now(str(found.path))

    def _drop_frames_before(self, job: Job) -> None:
        """In a long list of jobs, keep in memory only the frames of the group under way."""
        if len(self.jobs) > sweep.MOST_SIDE_BY_SIDE:
            for other, result in self.results.items():
                if sweep.group_of(other) != sweep.group_of(job):
                    self.results[other] = result._replace(own_frames=None)

    def _settings(self, job: Job) -> dict[str, object]:
        """What goes on record before sampling: the arguments, with what was chosen for them."""
        args = self.args
        return {
            **dataclasses.asdict(job),
            "image": without_credentials(job.image),
            "image_sha256": self._digests[job.image],
            "ckpts_path": args.ckpts_path,
            "output_path": str(args.output_path),
            "guidance_scale": args.guidance_scale,
            **self.size._asdict(),
            "fps": args.fps,
            "device": str(self.device),
            "dtype": devices.dtype_name(self.dtype),
            "offload": args.offload,
            "vae_tiling": args.vae_tiling,
            "attention": attention.short_name(self.backend),
            "compile": args.compile,
            "quantize": args.quantize,
            "approximations": self._approximations(),
            "keep_loaded": args.keep_loaded,
            "reuse_conditioning": args.reuse_conditioning,
            "coefficients": args.coefficients.as_json(),
        }

    def _approximations(self) -> list[str]:
        """What makes the video differ from the original sampler's by more than rounding."""
        found = []
        if not attention.is_exact(self.backend):
            found.append(f"attention {attention.short_name(self.backend)}")
        if self.args.quantize:
            found.append(f"quantize {self.args.quantize}")
        return found


def _write_again(record: dict[str, object], video: Path) -> None:
    """The record of a video that has one, with more in it."""
    try:
        with written_whole(video.with_suffix(""), ".json") as (path,):
            write_record(record, path)
    except OSError as error:
        logger.warning(
            "%s: its record stays without the figures of quality: %s",
            *(video, error.strerror or error),
        )
