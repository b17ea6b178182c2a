"""Measures what reuse costs on a checkpoint: `python3 -m teacache.calibrate --help`.

`--schedule calibrated` then samples with the best schedule of any number of computed steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacache.base.console import Console, Stages
from teacache.base.errors import ArgumentError, without_credentials
from teacache.base.files import cache_folder, with_ending, written_whole
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.command import flags, readers
from teacache.command.arguments import OneLineParser, build_parser, choose_inputs
from teacache.command.order import Order
from teacache.command.preflight import Ready, preflight
from teacache.results.output_folder import prepare_folder
from teacache.results.record import versions, write_json

if TYPE_CHECKING:
    import torch

    from teacache.calibrate.fit import Fit
    from teacache.calibrate.measure import Run

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Run the calibration. Returns its exit code, as the sampler's command does."""
    args = _parse(argv)
    silence_libraries()
    return run_command(lambda: calibrate(args))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python3 -m teacache.calibrate",
        description="Measure what reuse costs, on videos that are sampled with every step "
        "computed. Each takes as long as about 26 videos; what is done is kept as it comes, and "
        "the same command goes on with it.",
        allow_abbrev=False,
    )
    flags.add_inputs(parser)
    flags.add_jobs(parser)
    flags.add_video(parser)
    flags.add_device(parser)
    flags.add_offload(parser)
    flags.add_attention(parser)
    parser.add_argument(
        "--output",
        type=readers.path,
        metavar="FILE",
        help="the calibration, a .json, with a figure beside it (default: in the cache folder, "
        "where --schedule calibrated looks for it)",
    )
    # What else a video is asked for with: as the sampler's command has it, every step computed.
    parser.set_defaults(**vars(build_parser().parse_args(["--rel_l1_thresh", "0"])))
    args = parser.parse_args(argv)
    args.ckpts_path = args.ckpts_path or flags.DEFAULT_CHECKPOINT
    args.fps = flags.DEFAULT_FPS
    args.output_path = args.output.parent if args.output else cache_folder()
    choose_inputs(args)
    return args


def calibrate(args: argparse.Namespace) -> None:
    """Measure each video, and write what they say together."""
    console = Console(quiet=False)
    stages = Stages(console)
    order = Order.of(args)
    ready = preflight(order, stages)
    from teacache.checkpoint.calibration import cached_calibration

    steps = _steps_of(ready)
    output = (args.output or cached_calibration(ready.checkpoint, steps)).with_suffix(".json")
    prepare_folder(output.parent)
    about = _about(order, ready)
    partial = _partial_folder(output, about)
    with stages.stage("diffusers"):
        from teacache.calibrate.fit import POOR, fit
    measured = list(_measured(order, ready, partial, stages, console))
    schedule = next(iter(ready.schedules.values()))
    fitted = fit(
        schedule.distances,
        [run.changes for run, _ in measured],
        f"fitted on {len(measured)} videos of {order.ckpts_path} at {steps} steps",
    )
    if fitted.r2 < POOR:
        logger.warning(
            "the coefficients explain %.0f %% of how far residuals move (R2 %.2f): a threshold "
            "on them says little about this model",
            100 * max(0.0, fitted.r2),
            fitted.r2,
        )
    _write(measured, fitted, about, output)
    shutil.rmtree(partial)
    console.say(f"calibration {output}\nfigure      {output.with_suffix('.png')}")


def _steps_of(ready: Ready) -> int:
    """The number of steps, which all videos share."""
    from teacache.calibrate.fit import LEAST_STEPS

    numbers = {job.num_infer_steps for job in ready.jobs}
    if len(numbers) > 1:
        raise ArgumentError(f"--jobs: a calibration is of one number of steps, not {numbers}")
    if min(numbers) < LEAST_STEPS:
        raise ArgumentError(f"--num_infer_steps: a calibration needs {LEAST_STEPS} or more")
    return numbers.pop()


def _about(order: Order, ready: Ready) -> dict[str, Any]:
    """What the calibration is of: what another one would differ in."""
    from teacache.base.device import device_name, dtype_name
    from teacache.checkpoint.calibration import checkpoint_digest, scheduler_of
    from teacache.sampling.attention import short_name

    return {
        "ckpts_path": order.ckpts_path,
        "checkpoint_digest": checkpoint_digest(ready.checkpoint),
        "scheduler": scheduler_of(ready.checkpoint),
        "videos": [
            {
                "image": without_credentials(job.image),
                "image_sha256": ready.digests[job.image],
                "prompt": job.prompt,
                "negative_prompt": job.negative_prompt,
                "seed": job.seed,
                "num_infer_steps": job.num_infer_steps,
            }
            for job in ready.jobs
        ],
        **ready.size._asdict(),
        "guidance_scale": order.format.guidance_scale,
        "dtype": dtype_name(ready.dtype),
        "attention": short_name(ready.backend),
        "device_name": device_name(ready.device),
        "versions": versions(),
    }


def _partial_folder(output: Path, about: dict[str, Any]) -> Path:
    """Where what is done is kept, beside the output.

    Raises:
        ArgumentError: where an unfinished calibration of something else is there.
    """
    folder = output.with_suffix(".partial")
    file = folder / "about.json"
    folder.mkdir(exist_ok=True)
    if not file.is_file():
        write_json(about, file)
    elif json.loads(file.read_text(encoding="utf-8")) != about:
        raise ArgumentError(
            f"{folder} holds an unfinished calibration with other settings: remove it, or name "
            "another --output"
        )
    return folder


def _measured(
    order: Order, ready: Ready, partial: Path, stages: Stages, console: Console
) -> Iterator[tuple[Run, torch.Tensor]]:
    """Each video's run, and what each step leaves, [steps, numbers of the latents]."""
    import torch

    from teacache.calibrate.measure import error_left, full_run
    from teacache.command.run import condition, load
    from teacache.core.forward import apply_teacache
    from teacache.sampling.sampler import Loop, prepare

    identities, texts = condition(ready.jobs, order, ready, stages)
    with stages.stage("loading"):
        pipe = load(order, ready)
    with apply_teacache(pipe) as handle:
        for number, job in enumerate(ready.jobs):
            steps = job.num_infer_steps
            start = prepare(pipe, identities[job.image], ready.size, job.seed)
            loop = Loop(pipe, start, texts[job], ready.size, steps, order.format.guidance_scale)
            files = {step: partial / f"{number}_{step}" for step in range(1, steps - 1)}
            to_do = [step for step in files if not with_ending(files[step], ".pt").is_file()]
            forwards = steps + sum(steps - 1 - step for step in to_do)
            what = f"video {number + 1} of {len(ready.jobs)}"
            console.say(f"{what}: {forwards} steps to compute")
            with console.bar(forwards, what=what) as on_step:
                run = full_run(handle, loop, steps, on_step)
                for step in to_do:
                    left = error_left(handle, loop, run, step, on_step)
                    with written_whole(files[step], ".pt") as (beside,):
                        torch.save(left.flatten(), beside)
            nothing = torch.zeros(run.final.numel())
            kept = [torch.load(with_ending(file, ".pt")) for file in files.values()]
            # Without what only the steps' errors needed, half a gigabyte of the GPU at full size.
            yield run._replace(states=[], tried=[]), torch.stack([nothing, *kept, nothing])


def _write(
    measured: list[tuple[Run, torch.Tensor]],
    fitted: Fit,
    about: dict[str, Any],
    output: Path,
) -> None:
    """The calibration and its figure, both or neither."""
    import numpy as np

    from teacache.calibrate.figure import draw
    from teacache.calibrate.measure import costs_of
    from teacache.checkpoint.calibration import Calibration, rounded

    costs = costs_of(measured)
    magnitudes = np.mean([run.magnitudes for run, _ in measured], axis=0)
    others = {
        **about,
        "coefficients": fitted.coefficients.as_json(),
        "r2": round(fitted.r2, 4),
        "magnitudes": rounded(magnitudes),
    }
    digest, scheduler = (others.pop(key) for key in ("checkpoint_digest", "scheduler"))
    calibration = Calibration(costs, digest, scheduler, others)
    with written_whole(output.with_suffix(""), ".json", ".png") as (file, figure):
        write_json(calibration.as_json(), file)
        draw(costs, fitted, figure)


if __name__ == "__main__":
    sys.exit(main())
