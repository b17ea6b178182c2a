"""The command: sampling, `--plan`, or one of several ranks."""

import argparse
import gc
import sys
from typing import NoReturn

from teacache.base import interruption
from teacache.base.console import Console, Stages
from teacache.base.environment import prepare_environment
from teacache.base.quiet import silence_libraries
from teacache.inputs.photograph_store import PhotographStore
from teacache.parallel import launch
from teacache.request.arguments import parse_arguments
from teacache.request.values import Request
from teacache.results.output_folder import prepared_folder


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code, see `teacache.base.interruption.run_command`."""
    args = parse_arguments(argv)
    silence_libraries()
    if launch.is_one_of_several():
        if code := interruption.run_command(launch.check_variables):
            return code
        args.num_gpus = launch.world_size()
    elif args.num_gpus > 1 and not args.plan:
        return interruption.run_command(lambda: _check_ranks(args)) or launch.launch(
            args.num_gpus, main, argv
        )
    console = Console(args.quiet)

    def work() -> None:
        if launch.rank() > 0:
            if Request.of(args).jobs:
                prepare_environment()
                from teacache.run.other_ranks import help_denoising

                help_denoising(args.device)
        elif args.plan:
            prepare_environment()
            from teacache.command.plan import show

            show(Request.of(args))
        else:
            if args.drawn:
                console.say(f"seed        {' '.join(map(str, args.seed))}, drawn")
            sample(Request.of(args), console)

    if launch.is_one_of_several():
        return launch.run_as_rank(work, helping=launch.rank() > 0)
    return interruption.run_command(work)


def _check_ranks(args: argparse.Namespace) -> None:
    from teacache.preflight.checks import check_ranks

    check_ranks(Request.of(args).options)


def run_and_exit() -> NoReturn:
    """Run the command, and end the process."""
    code = main()
    gc.freeze()  # skips the final garbage collection of torch's objects, which takes a second
    sys.exit(code)


def sample(request: Request, console: Console) -> None:
    """Check the request, then sample every job."""
    if not request.jobs:
        videos = len(request.all_jobs)
        console.say(f"shard {request.shard} has nothing to do: {videos} videos in all")
        return
    # Late, here and below, so that a missing package is one line and `--help` is fast.
    from teacache.preflight.checks import preflight

    stages, photographs = Stages(console), PhotographStore()
    with prepared_folder(request.options.output_path):
        setup, shots = preflight(request, photographs, stages)
        if setup.memory:
            console.say(setup.memory)
        with stages.stage("diffusers"):
            from teacache.run.loop import run
        run(request, setup, shots, photographs, stages)
