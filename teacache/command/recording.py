"""The record of a video: its settings, its measurements, and the command that repeats it."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from teacache.base.console import Stages
from teacache.base.device import device_name, dtype_name, peak_memory_bytes, peak_reserved_bytes
from teacache.base.errors import without_credentials
from teacache.command.arguments import parse_arguments
from teacache.command.flags import FLAGS
from teacache.command.jobs import Job
from teacache.command.order import Order
from teacache.command.preflight import Ready
from teacache.core.rule import COGVIDEOX_5B
from teacache.results.record import Record, Settings, finite, median_seconds, versions
from teacache.sampling import attention


def settings_of(job: Job, order: Order, ready: Ready) -> Settings:
    """The settings of a job's record, which are known before sampling."""
    machine = ready.machine
    approximations = []
    if not attention.is_exact(ready.backend):
        approximations.append(f"attention {ready.backend}")
    if machine.quantize:
        approximations.append(f"quantize {machine.quantize}")
    schedule = ready.schedules[job]
    if schedule.reused_steps:
        approximations.append(f"reuse {job.reuse}")
    return Settings(
        image=without_credentials(job.image),
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        seed=job.seed,
        num_infer_steps=job.num_infer_steps,
        rel_l1_thresh=job.rel_l1_thresh,
        image_sha256=ready.digests[job.image],
        ckpts_path=order.ckpts_path,
        output_path=str(order.output_path),
        guidance_scale=order.format.guidance_scale,
        **ready.size._asdict(),
        device=str(ready.device),
        dtype=dtype_name(ready.dtype),
        offload=machine.offload,
        vae_tiling=machine.vae_tiling == "on",
        attention=ready.backend,
        compile=machine.compile,
        quantize=machine.quantize,
        approximations=approximations,
        coefficients=order.coefficients.as_json(),
        **vars(order.limits),
        schedule=job.schedule,
        selected_steps=list(schedule.computed_steps) if job.rel_l1_thresh is None else None,
        reuse=job.reuse,
        scheduler=ready.scheduler,
        num_gpus=machine.num_gpus,
        ranks=str(ready.ranks) if machine.num_gpus > 1 else None,
        lora=[f"{source}:{scale:g}" for source, scale in order.loras],
        checkpoint_sha256=ready.checkpoint_sha256,
    )


def record_of(
    job: Job, order: Order, ready: Ready, step_seconds: list[float], stages: Stages
) -> Record:
    """The record of a video after denoising.

    Args:
        step_seconds: of each denoising step.
    """
    done = ready.schedules[job]
    return Record(
        settings=settings_of(job, order, ready),
        computed_steps=list(done.computed_steps),
        reused_steps=list(done.reused_steps),
        distances=finite(done.distances),
        rescaled=finite(done.rescaled),
        extrapolated_steps=list(done.extrapolated_steps),
        why_nothing_was_reused=done.why_nothing_was_reused(),
        computed_step_seconds=median_seconds(step_seconds, done.computed_steps),
        reused_step_seconds=median_seconds(step_seconds, done.reused_steps),
        seconds=stages.with_total(),
        peak_memory_bytes=peak_memory_bytes(ready.device),
        peak_reserved_bytes=peak_reserved_bytes(ready.device),
        device_name=device_name(ready.device),
        versions=versions(),
    )


def completed(
    record: Record, job: Job, order: Order, ready: Ready, stages: Stages, video: Path
) -> Record:
    """The record of a video after decoding. `video` is its path."""
    return dataclasses.replace(
        record,
        seconds=stages.with_total(),
        peak_memory_bytes=peak_memory_bytes(ready.device),
        peak_reserved_bytes=peak_reserved_bytes(ready.device),
        command=command_of(job, order, record.settings, video.with_suffix(".json")),
    )


def command_of(job: Job, order: Order, settings: Settings, record: Path) -> str:
    """A shell command that repeats one video, with the flags that differ from their defaults.

    Credentials in the URL of an image are masked. `--vae_tiling` is in it if the VAE was tiled,
    because `auto` depends on the free memory.

    Args:
        record: path of the record, from which listed steps and coefficients are read.
    """
    values: dict[str, object] = {
        **vars(job),
        **vars(order.format),
        **vars(order.machine),
        **vars(order.limits),
        "image": settings.image,
        "seed": [job.seed],
        "lora": [f"{source}:{scale}" for source, scale in order.loras],
        "scheduler": order.scheduler,
        "ckpts_path": order.ckpts_path,
        "output_path": order.output_path,
        "vae_tiling": "on" if settings.vae_tiling else order.machine.vae_tiling,
        "schedule": record if job.steps is not None else None,
        "coefficients": record if order.coefficients != COGVIDEOX_5B else COGVIDEOX_5B,
    }
    defaults = vars(parse_arguments(["--ckpts_path", order.ckpts_path]))
    defaults["ckpts_path"] = FLAGS["ckpts_path"].default
    defaults["reuse"] = "residual" if job.computed_steps is None else "forecast"
    words = ["python3", "teacache_sample_video.py"]
    for name, flag in FLAGS.items():
        value = values.get(name)
        if value is not None and value != defaults[name] and [value] != defaults[name]:
            words += flag.words(value)
    return shlex.join(words)
