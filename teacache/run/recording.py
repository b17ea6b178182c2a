"""The record of a video: its settings and its measurements."""

import dataclasses
from pathlib import Path

from teacache.base.console import Stages
from teacache.base.device import device_name, dtype_name, peak_memory_bytes, peak_reserved_bytes
from teacache.base.errors import without_credentials
from teacache.preflight.setup import Setup, Shot
from teacache.request.repeat import command_of
from teacache.results.record import Record, Settings, finite, median_seconds, versions
from teacache.sampling import attention


def settings_of(shot: Shot, setup: Setup) -> Settings:
    """The settings of a video's record, which are known before sampling."""
    job, options, machine = shot.job, setup.options, setup.machine
    approximations = []
    if not attention.is_exact(setup.backend):
        approximations.append(f"attention {setup.backend}")
    if machine.quantize:
        approximations.append(f"quantize {machine.quantize}")
    if shot.schedule.reused_steps:
        approximations.append(f"reuse {job.reuse}")
    return Settings(
        image=without_credentials(job.image),
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        num_infer_steps=job.num_infer_steps,
        rel_l1_thresh=job.rel_l1_thresh,
        image_sha256=shot.image_sha256,
        ckpts_path=options.ckpts_path,
        output_path=str(options.output_path),
        guidance_scale=options.format.guidance_scale,
        **setup.size._asdict(),
        device=str(setup.device),
        dtype=dtype_name(setup.dtype),
        offload=machine.offload,
        vae_tiling=machine.vae_tiling == "on",
        attention=setup.backend,
        compile=machine.compile,
        quantize=machine.quantize,
        approximations=approximations,
        coefficients=options.coefficients_for(job).as_json(),
        **vars(job.limits),
        schedule=job.schedule,
        selected_steps=list(shot.schedule.computed_steps) if job.rel_l1_thresh is None else None,
        reuse=job.reuse,
        scheduler=setup.scheduler,
        num_gpus=machine.num_gpus,
        ranks=str(setup.ranks) if machine.num_gpus > 1 else None,
        lora=[f"{source}:{scale:g}" for source, scale in options.loras],
        mp4_quality=options.format.quality,
        checkpoint_sha256=setup.checkpoint_sha256,
    )


def record_of(shot: Shot, setup: Setup, step_seconds: list[float], stages: Stages) -> Record:
    """The record of a video after denoising."""
    done = shot.schedule
    return Record(
        settings=settings_of(shot, setup),
        computed_steps=list(done.computed_steps),
        reused_steps=list(done.reused_steps),
        distances=finite(done.distances),
        rescaled=finite(done.rescaled),
        steps_outside_fitted_range=list(done.steps_outside_fitted_range),
        why_nothing_was_reused=done.why_nothing_was_reused(),
        computed_step_seconds=median_seconds(step_seconds, done.computed_steps),
        reused_step_seconds=median_seconds(step_seconds, done.reused_steps),
        seconds=stages.with_total(),
        peak_memory_bytes=peak_memory_bytes(setup.device),
        peak_reserved_bytes=peak_reserved_bytes(setup.device),
        device_name=device_name(setup.device),
        versions=versions(),
    )


def completed(
    record: Record, shot: Shot, setup: Setup, stages: Stages, video: Path, video_bytes: int
) -> Record:
    """The record of a video after decoding, with the path that it has soon."""
    file, tiling = video.with_suffix(".json"), record.settings.vae_tiling
    return dataclasses.replace(
        record,
        seconds=stages.with_total(),
        peak_memory_bytes=peak_memory_bytes(setup.device),
        peak_reserved_bytes=peak_reserved_bytes(setup.device),
        command=command_of(shot.job, setup.options, file, tiling),
        video_bytes=video_bytes,
    )
