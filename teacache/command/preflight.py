"""All checks before models are loaded, the fastest first.

The order of the checks: output folder and checkpoint files need no import; the device needs torch;
the cache folder of compilation must be set before diffusers is imported; images are downloaded
before the 20 GB of a checkpoint; the size of the video needs the checkpoint; timesteps, schedules
and attention need parts of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.console import Stages
from teacache.base.environment import prepare_environment
from teacache.base.errors import ArgumentError
from teacache.checkpoint.download import download_checkpoint
from teacache.checkpoint.folder import (
    check_checkpoint,
    is_full_size,
    local_checkpoint,
    weight_files,
)
from teacache.checkpoint.size import Architecture, VideoSize, check_memory, video_size
from teacache.command.jobs import Job
from teacache.command.order import Machine, Order
from teacache.core.ranks import ALONE, Ranks
from teacache.core.rule import Schedule, schedule
from teacache.inputs.embedding_cache import fingerprint
from teacache.inputs.photograph import load_image, pixels_sha256
from teacache.parallel.division import divide
from teacache.results.output_folder import check_space, prepare_folder
from teacache.results.video import check_encoder

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Ready:
    """The values that the checks of an order determine.

    Attributes:
        checkpoint: its folder, complete.
        checkpoint_sha256: digest of the transformer's files.
        images: the photograph of each job, by the image's source.
        digests: sha256 of each image's pixels, by the image's source.
        machine: the order's, without `auto`.
        memory: the memory plan in one line; empty on a CPU.
        backend: of the attention, see `teacache.sampling.attention.choose_backend`.
        scheduler: `dpm` or `ddim`.
        ranks: how several GPUs share each denoising step.
        schedules: of each job.
    """

    checkpoint: Path
    checkpoint_sha256: str
    images: dict[str, Image.Image]
    digests: dict[str, str]
    size: VideoSize
    device: torch.device
    dtype: torch.dtype
    machine: Machine
    memory: str
    backend: str
    scheduler: str
    ranks: Ranks
    schedules: dict[Job, Schedule]


def preflight(order: Order, stages: Stages) -> Ready:
    """Check an order on this machine.

    Raises:
        TeaCacheError: in one line, for the first check that fails.
    """
    machine, form = order.machine, order.format
    prepare_folder(order.output_path)
    prepare_environment()
    check_encoder()
    with stages.stage("checkpoint"):
        checkpoint = find_checkpoint(order.ckpts_path)
    full_size = checkpoint is None or is_full_size(checkpoint)
    with stages.stage("torch"):
        from teacache.command.card import fit_to_card
        from teacache.command.machine import check_number, choose_device, choose_dtype
        from teacache.sampling.acceleration import prepare_acceleration

        device = choose_device(machine.device, full_size, machine.offload)
        check_number(machine.num_gpus, device)
        dtype = choose_dtype(machine.dtype, device)
        prepare_acceleration(machine.compile, machine.quantize, machine.offload, device, dtype)
    with stages.stage("image"):
        sources = dict.fromkeys(job.image for job in order.jobs)
        images = {source: load_image(source) for source in sources}
    if checkpoint is None:
        with stages.stage("download"):
            checkpoint = download_checkpoint(order.ckpts_path)
    size = video_size(checkpoint, form.width, form.height, form.num_frames)
    check_memory(size)
    for source, _ in order.loras:
        from teacache.sampling.lora import check_lora, lora_file

        check_lora(source, lora_file(source), checkpoint)
    ranks = ranks_of(order, checkpoint, size)
    check_space(order.output_path, size.width * size.height, size.num_frames, len(order.jobs))
    with stages.stage("schedule"):
        from teacache.checkpoint.distances import scheduler_name

        schedules = plan_jobs(order, checkpoint, device, dtype)
        backend = _choose_backend(machine, ranks, checkpoint, size, device, dtype)
    machine, memory = fit_to_card(machine, checkpoint, size, form.guidance_scale > 1, device, dtype)
    if order.loras and machine.offload == "sequential":
        raise ArgumentError("--lora does not go with --offload sequential: --offload blocks does")
    return Ready(
        checkpoint=checkpoint,
        checkpoint_sha256=fingerprint(weight_files(checkpoint / "transformer"), times=False),
        images=images,
        digests={source: pixels_sha256(image) for source, image in images.items()},
        size=size,
        device=device,
        dtype=dtype,
        machine=machine,
        memory=memory,
        backend=backend,
        scheduler=order.scheduler or scheduler_name(checkpoint),
        ranks=ranks,
        schedules=schedules,
    )


def _choose_backend(
    machine: Machine,
    ranks: Ranks,
    checkpoint: Path,
    size: VideoSize,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    from teacache.sampling.attention import BACKENDS, choose_backend

    model = Architecture.of(checkpoint)
    tokens = model.text_tokens + model.video_tokens(size)
    backend = choose_backend(machine.attention, device, dtype, tokens, model.head_dim)
    if ranks.parts > 1:
        from teacache.parallel.group import check_backend

        check_backend(machine.attention, BACKENDS.get(backend, backend))
    return backend


def check_ranks(order: Order) -> None:
    """Raise TeaCacheError if the order's GPUs cannot share a step.

    The command calls it before it starts the ranks. If the checkpoint is not downloaded yet, the
    first rank checks it in `preflight`.
    """
    prepare_environment()
    checkpoint = find_checkpoint(order.ckpts_path)
    if checkpoint is not None:
        form = order.format
        size = video_size(checkpoint, form.width, form.height, form.num_frames)
        ranks_of(order, checkpoint, size)


def ranks_of(order: Order, checkpoint: Path, size: VideoSize) -> Ranks:
    """How the order's GPUs share each denoising step.

    Raises:
        ArgumentError: if they cannot, naming the nearest valid numbers.
    """
    machine = order.machine
    if machine.num_gpus == 1:
        return ALONE
    if machine.offload not in ("auto", "none"):
        raise ArgumentError(
            f"--num_gpus {machine.num_gpus} does not go with --offload {machine.offload}: each GPU "
            "has the whole transformer"
        )
    model = Architecture.of(checkpoint)
    return divide(
        machine.num_gpus,
        guided=order.format.guidance_scale > 1,
        heads=model.heads,
        text=model.text_tokens,
        video=model.video_tokens(size),
    )


def find_checkpoint(name: str, complete: bool = True) -> Path | None:
    """The folder of a checkpoint, or None if it is not downloaded yet.

    Args:
        name: `tiny`, a folder, or a Hugging Face repository, `owner/name`.
        complete: check that no file is missing.

    Raises:
        CheckpointError: if the name is none of these, or a file is missing or cannot be used.
    """
    if name == "tiny":
        from teacache.embedded.cached import cached_tiny_checkpoint

        checkpoint: Path | None = cached_tiny_checkpoint()
    else:
        checkpoint = local_checkpoint(name)
    if complete and checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def plan_jobs(
    order: Order, checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> dict[Job, Schedule]:
    """The schedule of each job, also of other shards, whose finished videos are recognised by it.

    Raises:
        ArgumentError: if the scheduler has fewer steps, a listed step is out of range, or the
            forecast does not support the scheduler.
    """
    from teacache.checkpoint.distances import load_scheduler, step_distances
    from teacache.core.forecast import check_scheduler

    scheduler = load_scheduler(checkpoint, order.scheduler)
    if any(job.reuse == "forecast" for job in order.all_jobs):
        check_scheduler(scheduler)
    fixed = checkpoint, scheduler, order.format.guidance_scale, device, dtype
    return {
        job: schedule(
            step_distances(*fixed, job.num_infer_steps),
            job.rel_l1_thresh,
            order.coefficients,
            order.limits,
            reuse=job.reuse,
            computed_steps=job.steps if job.computed_steps is None else job.computed_steps,
        )
        for job in order.all_jobs
    }
