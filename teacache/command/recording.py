"""What goes on record: an order's settings as they were chosen, and what became of a video."""

from __future__ import annotations

from teacache.base.console import Stages
from teacache.base.device import device_name, dtype_name, peak_memory_bytes, peak_reserved_bytes
from teacache.base.errors import without_credentials
from teacache.command.jobs import Job
from teacache.command.order import Order
from teacache.command.preflight import Ready
from teacache.results.record import Record, Settings, finite, median_seconds, versions
from teacache.sampling import attention


def settings_of(job: Job, order: Order, ready: Ready) -> Settings:
    """What goes on record before sampling."""
    machine, form = ready.machine, order.format
    approximations = []
    if not attention.is_exact(ready.backend):
        approximations.append(f"attention {attention.short_name(ready.backend)}")
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
        guidance_scale=form.guidance_scale,
        width=ready.size.width,
        height=ready.size.height,
        num_frames=ready.size.num_frames,
        fps=form.fps,
        device=str(ready.device),
        dtype=dtype_name(ready.dtype),
        offload=machine.offload,
        vae_tiling=bool(machine.vae_tiling),
        attention=attention.short_name(ready.backend),
        compile=machine.compile,
        quantize=machine.quantize,
        approximations=approximations,
        reuse_conditioning=order.reuse_conditioning,
        coefficients=order.coefficients.as_json(),
        retain_first=order.limits.retain_first,
        retain_last=order.limits.retain_last,
        max_reuse=order.limits.max_reuse,
        schedule=job.schedule,
        selected_steps=list(schedule.computed_steps) if job.rel_l1_thresh is None else None,
        reuse=job.reuse,
        scheduler=ready.scheduler,
        num_gpus=machine.num_gpus,
        division=str(ready.division) if machine.num_gpus > 1 else None,
        lora=[f"{source}:{scale:g}" for source, scale in order.loras],
        checkpoint_sha256=ready.checkpoint_sha256,
    )


def record_of(
    job: Job, order: Order, ready: Ready, step_seconds: list[float], stages: Stages
) -> Record:
    """The record of a video so far.

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
