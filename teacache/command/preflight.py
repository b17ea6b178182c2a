"""Every refusal that costs little, the cheapest first, before anything big is loaded.

The order has its reasons: the output folder and files of the checkpoint need nothing imported;
torch comes next, for the device; then what compiling needs, which settles on a folder before
diffusers is imported; an image is fetched before 20 GB are downloaded; the size of the video is
known from the checkpoint alone; timesteps, schedules and attention need parts of diffusers.
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
    """What an order comes to on this machine.

    Attributes:
        checkpoint: its folder, whole.
        images: each job's photograph, by its source.
        digests: sha256 of the pixels of each image, by its source.
        checkpoint_sha256: a digest of its transformer's files.
        machine: the order's, with nothing left open; memory: a line about it, for a GPU.
        backend: of the attention, see `teacache.sampling.attention.choose_backend`.
        scheduler: `dpm` or `ddim`.
        ranks: that share each denoising step.
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
    """Check and prepare all that comes before the loading of models.

    Raises:
        TeaCacheError: in one line, for whatever is found to be wrong.
    """
    machine, form = order.machine, order.format
    prepare_folder(order.output_path)
    prepare_environment()
    check_encoder()
    with stages.stage("checkpoint"):
        checkpoint = find_whole_checkpoint(order.ckpts_path)
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
        from teacache.sampling.attention import choose_backend

        backend = choose_backend(machine.attention, device, dtype)
        if ranks.parts > 1:
            from teacache.parallel.group import check_backend

            check_backend(machine.attention, backend)
    digests = {source: pixels_sha256(image) for source, image in images.items()}
    machine, memory = fit_to_card(machine, checkpoint, size, form.guidance_scale > 1, device, dtype)
    if order.loras and machine.offload == "sequential":
        raise ArgumentError("--lora does not go with --offload sequential: --offload blocks does")
    return Ready(
        checkpoint=checkpoint,
        checkpoint_sha256=fingerprint(weight_files(checkpoint / "transformer"), times=False),
        images=images,
        digests=digests,
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


def check_ranks(order: Order) -> None:
    """Raise TeaCacheError where the order's GPUs cannot share a step, as far as is known by now.

    Of a checkpoint that has to be downloaded the first rank says so later, in `preflight`.
    """
    checkpoint = find_whole_checkpoint(order.ckpts_path)
    if checkpoint is not None:
        form = order.format
        size = video_size(checkpoint, form.width, form.height, form.num_frames)
        ranks_of(order, checkpoint, size)


def ranks_of(order: Order, checkpoint: Path, size: VideoSize) -> Ranks:
    """How the order's GPUs share the denoising of a video.

    Raises:
        ArgumentError: where they cannot, naming the nearest numbers that can.
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


def find_whole_checkpoint(name: str) -> Path | None:
    """The same as `find_checkpoint`, where all that sampling reads is there.

    Raises:
        CheckpointError: too where something is missing, or cannot be used.
    """
    checkpoint = find_checkpoint(name)
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def find_checkpoint(name: str) -> Path | None:
    """The folder that `--ckpts_path` means, or None where it has to be downloaded first.

    Args:
        name: `tiny`, a folder, or a Hugging Face repository, `owner/name`.

    Raises:
        CheckpointError: where it is none of these.
    """
    if name == "tiny":
        from teacache.embedded.cached import cached_tiny_checkpoint

        return cached_tiny_checkpoint()
    return local_checkpoint(name)


def plan_jobs(
    order: Order, checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> dict[Job, Schedule]:
    """The schedule of each job, those of other shards included: they tell what is finished.

    Raises:
        ArgumentError: where the scheduler has not so many steps, a listed step is none of them, or
            a forecast is not derived for it.
    """
    from teacache.checkpoint.distances import load_scheduler, step_distances
    from teacache.core.forecast import check_scheduler

    scheduler = load_scheduler(checkpoint, order.scheduler)
    if any(job.reuse == "forecast" for job in order.all_jobs):
        check_scheduler(scheduler)
    fixed = checkpoint, scheduler, order.format.guidance_scale, device, dtype
    how = order.coefficients, order.limits
    return {
        job: schedule(
            step_distances(*fixed, job.num_infer_steps),
            job.rel_l1_thresh,
            *how,
            reuse=job.reuse,
            computed_steps=job.steps if job.computed_steps is None else job.computed_steps,
        )
        for job in order.all_jobs
    }
