"""Fits the coefficients of the rescaling polynomial on a checkpoint, for `--coefficients`."""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from teacache.base.console import Console, Stages
from teacache.base.errors import ArgumentError
from teacache.base.files import written_whole
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.inputs.photograph_store import PhotographStore
from teacache.request import readers
from teacache.request.arguments import OneLineParser, build_parser, choose_inputs
from teacache.request.flags import add_flags
from teacache.request.values import Request
from teacache.results.output_folder import prepared_folder
from teacache.results.record import versions, write_json

if TYPE_CHECKING:
    from teacache.preflight.setup import Setup, Shot

logger = logging.getLogger(__name__)

LEAST_STEPS = readers.DEGREE + 4  # DEGREE + 1 points determine the polynomial, more test it
POOR = 0.5  # an R2 below this gives a warning


def main(argv: list[str] | None = None) -> int:
    """Run the fit. Returns its exit code, as the sampler's command does."""
    args = _parse(argv)
    silence_libraries()

    def work() -> None:
        with prepared_folder(args.output_path):
            fit_coefficients(args)

    return run_command(work)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python3 -m teacache.fit",
        description="Fit the coefficients of the rescaling polynomial on videos that are sampled "
        "with every step computed.",
        allow_abbrev=False,
    )
    add_flags(parser, "ckpts_path", "image", "prompt", "seed", "num_infer_steps", "jobs")
    add_flags(parser, "negative_prompt", "guidance_scale", "lora", "scheduler")
    add_flags(parser, "num_frames", "height", "width", "device", "dtype", "offload", "attention")
    what = "the file for --coefficients, a .json"
    parser.add_argument("--output", type=readers.path, required=True, metavar="FILE", help=what)
    # All other arguments have the defaults of the sampler's command; every step is computed.
    parser.set_defaults(**vars(build_parser().parse_args(["--rel_l1_thresh", "0"])))
    args = parser.parse_args(argv)
    if args.output.suffix != ".json":
        parser.error(f"argument --output: {args.output} does not end in .json")
    args.output_path = args.output.parent
    choose_inputs(args)
    return args


def fit_coefficients(args: argparse.Namespace) -> None:
    """Measure the videos, fit the polynomial, and write the coefficients."""
    console = Console(quiet=False)
    stages, photographs = Stages(console), PhotographStore()
    request = Request.of(args)
    numbers = {job.num_infer_steps for job in request.jobs}
    if len(numbers) > 1 or min(numbers) < LEAST_STEPS:
        raise ArgumentError(
            f"--num_infer_steps: a fit needs one number, {LEAST_STEPS} or more: found "
            f"{', '.join(map(str, sorted(numbers)))}"
        )
    steps = numbers.pop()
    # Late, see `teacache.command.main`.
    from teacache.checkpoint.folder import read_json
    from teacache.preflight.checks import preflight

    setup, shots = preflight(request, photographs, stages)
    changes = _measure(setup, shots, photographs, stages)
    from teacache.fit.residuals import fit  # imports torch: not for `--help`

    distances = shots[0].schedule.distances
    coefficients, r2 = fit(distances, changes, f"fitted on {args.ckpts_path} at {steps} steps")
    if r2 < POOR:
        logger.warning(
            "R2 is %.2f: the polynomial explains little of the change of the residual, and a "
            "threshold with these coefficients says little about this model",
            r2,
        )
    scheduler = read_json(setup.checkpoint / "scheduler" / "scheduler_config.json")
    provenance = {
        "r2": round(r2, 4),
        "videos": len(changes),
        "checkpoint": args.ckpts_path,
        "checkpoint_sha256": setup.checkpoint_sha256,
        "scheduler": scheduler.get("_class_name"),
        "num_infer_steps": steps,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    with written_whole(args.output.with_suffix(""), ".json") as (file,):
        write_json({**coefficients.as_json(), **provenance}, file)
    console.say(f"coefficients {args.output}, R2 {r2:.2f}")


def _measure(
    setup: Setup, shots: Sequence[Shot], photographs: PhotographStore, stages: Stages
) -> list[list[float]]:
    """Sample the videos; return the changes of each, see `residual_changes`."""
    from teacache.fit.residuals import residual_changes
    from teacache.run.conditions import Conditions
    from teacache.run.models import open_models
    from teacache.sampling.sampler import Loop, prepare

    conditions = Conditions(setup, photographs, stages).of(shots)
    with stages.stage("loading"):
        models = open_models(setup)
    models.handle.rel_l1_thresh = 0
    device, guidance_scale = setup.device, setup.options.format.guidance_scale
    changes = []
    for number, (shot, condition) in enumerate(zip(shots, conditions, strict=True)):
        steps = shot.job.num_infer_steps
        identity = condition.identity(device)
        start = prepare(models.pipe, identity, setup.size, shot.job.seed)
        text = condition.text(device)
        loop = Loop(models.pipe, start, text, setup.size, steps, guidance_scale)
        with stages.console.bar(steps, what=f"video {number + 1} of {len(shots)}") as on_step:
            changes.append(residual_changes(models.pipe.transformer, loop, steps, on_step))
    return changes


if __name__ == "__main__":
    sys.exit(main())
