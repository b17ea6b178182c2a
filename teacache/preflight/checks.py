"""All checks before models are loaded, the fastest first.

The order of the checks: checkpoint files need no import; the device needs torch;
the cache folder of compilation must be set before diffusers is imported; images are downloaded
before the 20 GB of a checkpoint; the size of the video needs the checkpoint; timesteps, schedules
and attention need parts of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.console import Stages
from teacache.base.environment import prepare_environment
from teacache.base.errors import ArgumentError
from teacache.base.files import fingerprint
from teacache.checkpoint.download import download_checkpoint
from teacache.checkpoint.find import local_checkpoint
from teacache.checkpoint.folder import check_checkpoint, is_full_size, weight_files
from teacache.checkpoint.size import Architecture, VideoSize, check_memory, video_size
from teacache.core.ranks import ALONE, Ranks
from teacache.core.rule import Schedule, schedule
from teacache.inputs.photograph_store import PhotographStore
from teacache.parallel.division import divide
from teacache.preflight.setup import Setup, Shot
from teacache.request.job import Job
from teacache.request.values import Machine, Options, Request
from teacache.results.output_folder import check_space
from teacache.results.video import check_encoder

if TYPE_CHECKING:
    import torch


def preflight(
    request: Request, photographs: PhotographStore, stages: Stages
) -> tuple[Setup, list[Shot]]:
    """Check a request on this machine; return its setup, and a shot for each of its jobs.

    Raises:
        TeaCacheError: in one line, for the first check that fails.
    """
    options, asked, form = request.options, request.options.machine, request.options.format
    prepare_environment()
    check_encoder()
    with stages.stage("checkpoint"):
        checkpoint = find_checkpoint(options.ckpts_path)
    full_size = checkpoint is None or is_full_size(checkpoint)
    with stages.stage("torch"):
        from teacache.preflight.card import fit_to_card
        from teacache.preflight.machine import check_number, choose_device, choose_dtype
        from teacache.sampling.acceleration import prepare_acceleration

        device = choose_device(asked.device, full_size, asked.offload)
        check_number(asked.num_gpus, device)
        dtype = choose_dtype(asked.dtype, device)
        prepare_acceleration(asked.compile, asked.quantize, asked.offload, device, dtype)
    with stages.stage("image"):
        for job in request.jobs:
            photographs.look_at(job.image)
    if checkpoint is None:
        with stages.stage("download"):
            checkpoint = download_checkpoint(options.ckpts_path)
    size = video_size(checkpoint, form.width, form.height, form.num_frames)
    check_memory(size)
    for source, _ in options.loras:
        from teacache.sampling.lora import check_lora, lora_file

        check_lora(source, lora_file(source), checkpoint)
    ranks = ranks_of(options, checkpoint, size)
    with stages.stage("schedule"):
        from teacache.checkpoint.distances import scheduler_name

        backend = _choose_backend(asked, ranks, checkpoint, size, device, dtype)
        machine, memory = fit_to_card(asked, checkpoint, size, form.guided, device, dtype)
        if options.loras and machine.offload == "sequential":
            raise ArgumentError(
                "--lora does not go with --offload sequential: --offload blocks does"
            )
        setup = Setup(
            options=options,
            checkpoint=checkpoint,
            checkpoint_sha256=fingerprint(weight_files(checkpoint / "transformer"), times=False),
            size=size,
            device=device,
            dtype=dtype,
            machine=machine,
            memory=memory,
            backend=backend,
            scheduler=options.scheduler or scheduler_name(checkpoint),
            ranks=ranks,
        )
        return setup, shots_of(request.jobs, setup, photographs)


def shots_of(jobs: Sequence[Job], setup: Setup, photographs: PhotographStore) -> list[Shot]:
    """A shot for each job.

    Raises:
        TeaCacheError: as `PhotographStore.look_at` and `plan`; if the disk has too little space.
    """
    form = setup.options.format
    check_space(setup.options.output_path, setup.size, len(jobs), form.quality)
    schedules = plan(jobs, setup.options, setup.checkpoint, setup.device, setup.dtype)
    return [
        Shot(job, photographs.look_at(job.image).sha256, schedule)
        for job, schedule in zip(jobs, schedules, strict=True)
    ]


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


def check_ranks(options: Options) -> None:
    """Raise TeaCacheError if the GPUs cannot share a step.

    The command calls it before it starts the ranks. If the checkpoint is not downloaded yet, the
    first rank checks.
    """
    prepare_environment()
    checkpoint = find_checkpoint(options.ckpts_path)
    if checkpoint is not None:
        form = options.format
        size = video_size(checkpoint, form.width, form.height, form.num_frames)
        ranks_of(options, checkpoint, size)


def ranks_of(options: Options, checkpoint: Path, size: VideoSize) -> Ranks:
    """How GPUs share each denoising step.

    Raises:
        ArgumentError: if they cannot, naming the nearest valid numbers.
    """
    machine = options.machine
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
        guided=options.format.guided,
        heads=model.heads,
        text=model.text_tokens,
        video=model.video_tokens(size),
    )


def find_checkpoint(name: str, complete: bool = True) -> Path | None:
    """The folder of `tiny`, of a folder's name or of a repository; None if it is not here yet.

    Raises:
        CheckpointError: if the name is none of these, or, where it must be complete, a file is
            missing or cannot be used.
    """
    if name == "tiny":
        from teacache.embedded.cached import cached_tiny_checkpoint

        checkpoint: Path | None = cached_tiny_checkpoint()
    else:
        checkpoint = local_checkpoint(name)
    if complete and checkpoint is not None:
        check_checkpoint(checkpoint)
    return checkpoint


def plan(
    jobs: Sequence[Job],
    options: Options,
    checkpoint: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Schedule]:
    """The schedule of each job.

    Raises:
        ArgumentError: if the scheduler has fewer steps, a listed step is out of range, or the
            forecast does not support the scheduler.
    """
    from teacache.checkpoint.distances import load_scheduler, step_distances
    from teacache.core.forecast import check_scheduler

    scheduler = load_scheduler(checkpoint, options.scheduler)
    if any(job.reuse == "forecast" for job in jobs):
        check_scheduler(scheduler)
    fixed = checkpoint, scheduler, options.format.guidance_scale, device, dtype
    return [
        schedule(
            step_distances(*fixed, job.num_infer_steps),
            job.rel_l1_thresh,
            options.coefficients,
            job.limits,
            reuse=job.reuse,
            computed_steps=job.steps if job.computed_steps is None else job.computed_steps,
        )
        for job in jobs
    ]
