#!/usr/bin/env python3
"""Sample identity-preserving videos with ConsisID and TeaCache: from a photograph to an mp4."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator

from teacache import checkpoint as checkpoints
from teacache import interruption, pictures
from teacache.arguments import parse_arguments
from teacache.download import download_checkpoint
from teacache.errors import CheckpointError, DeviceError
from teacache.jobs import Job, jobs_of
from teacache.output import check_space, prepare_folder
from teacache.quiet import allow_any_encoding, silence_libraries
from teacache.report import Stages, print_now, summary
from teacache.size import VideoSize, check_memory, video_size
from teacache.video import check_encoder

logger = logging.getLogger("teacache")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit code, see `teacache.interruption.exit_code`."""
    args = parse_arguments(argv)
    silence_libraries()
    allow_any_encoding()
    say = (lambda line: None) if args.quiet else print_now

    def work() -> None:
        if args.latents:
            decode(args, say)
        elif args.plan:
            show_plan(args, jobs_of(args))
        else:
            sample(args, jobs_of(args), say)

    return interruption.exit_code(work)


def sample(args: argparse.Namespace, jobs: list[Job], say: Callable[[str], None]) -> None:
    """Every job, stage by stage: what is cheap to check comes before what is slow to load."""
    stages = Stages(say)
    prepare_folder(args.output_path)
    check_encoder()
    with stages.stage("checkpoint"):
        checkpoint = checkpoints.local_checkpoint(args.ckpts_path)
        if checkpoint is not None:
            checkpoints.check_checkpoint(checkpoint)
    full_size = checkpoint is None or checkpoints.is_full_size(checkpoint)
    with stages.stage("torch"):
        from teacache.acceleration import prepare_acceleration
        from teacache.device import choose_device, choose_dtype

        device = choose_device(args.device, full_size, args.offload)
        dtype = choose_dtype(args.dtype, device)
        prepare_acceleration(args.compile, args.quantize, args.offload, device, dtype)
    with stages.stage("image"):
        images = {source: pictures.load_image(source) for source in {job.image for job in jobs}}
    if checkpoint is None:
        with stages.stage("download"):
            checkpoint = download_checkpoint(args.ckpts_path)
    size = video_size(checkpoint, args.width, args.height, args.num_frames)
    check_memory(size)
    check_space(args.output_path, size, len(jobs))
    with stages.stage("diffusers"):
        from teacache import plan
        from teacache.attention import choose_backend

        for num_infer_steps in {job.num_infer_steps for job in jobs}:
            plan.scheduler_timesteps(checkpoint, num_infer_steps)  # refuses more than there are
        distances = plan.distances_of(checkpoint, args.guidance_scale, device, dtype)
        jobs = plan.with_thresholds(jobs, args.target_speedup, args.coefficients, distances)
        backend = choose_backend(args.attention, device, dtype)
        from teacache.run import Run

    run = Run(args, jobs, checkpoint, images, size, device, dtype, backend, stages, say)
    try:
        with explained_out_of_memory(args, stages):
            run.sample()
    finally:
        try:
            # Also of a sweep that failed or was interrupted: what is done is done.
            run.report(in_full=not interruption.asked())
        except OSError as error:
            logger.warning("the sweep's report cannot be written: %s", error.strerror or error)


def decode(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Make the video of latents that an earlier run has kept."""
    stages = Stages(say)
    prepare_folder(args.output_path)
    check_encoder()
    with stages.stage("latents"):
        from teacache import rescue
        from teacache.device import choose_device

        latents, sampled = rescue.read_latents(args.latents)
    args.ckpts_path = args.ckpts_path or sampled["ckpts_path"]
    args.fps = args.fps or sampled["fps"]
    size = VideoSize(*(sampled[name] for name in VideoSize._fields))
    check_space(args.output_path, size, videos=1)
    with stages.stage("checkpoint"):
        checkpoint = checkpoints.local_checkpoint(args.ckpts_path)
        if checkpoint is None:
            raise CheckpointError(f"--latents needs a checkpoint: {args.ckpts_path} is not here")
        checkpoints.check_checkpoint(checkpoint)
    device = choose_device(args.device, checkpoints.is_full_size(checkpoint), args.offload)
    with explained_out_of_memory(args, stages):
        video, record = rescue.decode_latents(latents, sampled, checkpoint, device, stages, args)
    if args.quiet:
        print_now(str(video))
    else:
        say(summary(video, record))


@contextlib.contextmanager
def explained_out_of_memory(args: argparse.Namespace, stages: Stages) -> Iterator[None]:
    """Say in one line where memory ran out and which flags take less."""
    from teacache.device import is_out_of_memory, out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError(out_of_memory(error, stages.under_way, args)) from error


def show_plan(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Print which steps each threshold computes, without sampling."""
    checkpoint = checkpoints.local_checkpoint(args.ckpts_path)
    if checkpoint is None:
        raise CheckpointError(
            f"--plan reads a checkpoint folder: {args.ckpts_path} is not here yet"
        )
    from teacache import plan
    from teacache.device import choose_device, choose_dtype
    from teacache.policy import schedule

    device = choose_device(args.device)
    # A full-size checkpoint is planned for the GPU that it will be sampled on, wherever this is.
    for_gpu = args.dtype == "auto" and checkpoints.is_full_size(checkpoint)
    dtype = choose_dtype("bfloat16" if for_gpu else args.dtype, device)
    video_size(checkpoint, args.width, args.height, args.num_frames)
    distances = plan.distances_of(checkpoint, args.guidance_scale, device, dtype)
    jobs = plan.with_thresholds(jobs, args.target_speedup, args.coefficients, distances)
    runs = dict.fromkeys((job.num_infer_steps, job.rel_l1_thresh) for job in jobs)
    schedules = [
        schedule(distances(steps), threshold, args.coefficients) for steps, threshold in runs
    ]
    print_now(plan.describe(schedules))


if __name__ == "__main__":
    code = main()
    gc.freeze()  # else Python's end looks through all that torch and diffusers made: a second more
    sys.exit(code)
