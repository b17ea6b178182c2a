"""Samples many videos on all the GPUs of a Ray cluster: `python3 -m teacache.cluster --help`.

Records and report are those of one process. What each worker does is `teacache.cluster.worker`, who
gets what `teacache.cluster.dispatch`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from teacache.base.console import Console
from teacache.base.errors import DeviceError, SamplingError, TeaCacheError, reason
from teacache.base.interruption import run_command
from teacache.base.quiet import allow_any_encoding, silence_libraries
from teacache.command import readers
from teacache.command.arguments import OneLineParser, add_sampling, parse_with
from teacache.command.order import Order
from teacache.results.output_folder import prepare_folder

if TYPE_CHECKING:
    from teacache.cluster.dispatch import Dispatch

RAY = "ray==2.60.0"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit code, as the sampler's command does."""
    args = _parse(argv)
    silence_libraries()
    allow_any_encoding()
    console = Console(args.quiet)
    return run_command(lambda: sample(Order.of(args), args.workers, console))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python3 -m teacache.cluster",
        description="Sample many videos on all the GPUs of a Ray cluster, each on one or on "
        "--gpus_per_video: of the cluster that `ray start` has made, or else of this machine. The "
        "output folder must be the same for all machines.",
        allow_abbrev=False,
    )
    several = add_sampling(parser)
    several.add_argument(
        "--gpus_per_video",
        dest="num_gpus",
        type=readers.positive,
        metavar="N",
        help="sample each video on N GPUs of one machine, as --num_gpus does (default: 1)",
    )
    several.add_argument(
        "--workers",
        type=readers.positive,
        metavar="N",
        help="videos at a time (default: as many as the GPUs are enough for; without GPUs one for "
        "each machine)",
    )
    parser.set_defaults(plan=False, shard=None)
    args = parse_with(parser, argv)
    if args.device.startswith("cuda:"):
        parser.error(f"argument --device: which GPU is cuda:N is for Ray to choose: {args.device}")
    return args


def sample(order: Order, workers: int | None, console: Console) -> None:
    """Every video of an order, and the report over all of them.

    Raises:
        TeaCacheError: in one line, where Ray is missing, no worker can begin, or videos failed.
    """
    if importlib.util.find_spec("ray") is None:
        raise DeviceError(f"teacache.cluster needs the package ray: pip install {RAY}")
    prepare_folder(order.output_path)
    with _connected() as gpus:
        from teacache.cluster.dispatch import Dispatch

        on_cpus = order.machine.device == "cpu" or not any(gpus)
        gpus_per_video = 0 if on_cpus else order.machine.num_gpus
        most = len(gpus) if on_cpus else _videos_at_a_time(gpus, gpus_per_video)
        at_a_time = workers or most
        console.say(f"{len(order.jobs)} videos, {at_a_time} at a time")
        dispatch = Dispatch(order, at_a_time, gpus_per_video, console)
        try:
            dispatch.run()
        finally:
            _report(dispatch, order, console)
    _raise_failures(dispatch)


@contextlib.contextmanager
def _connected() -> Iterator[list[int]]:
    """Connect to the Ray cluster that there is, or begin one on this machine for the block.

    As `ray.init()` decides: the one that RAY_ADDRESS names, or that `ray start` has begun here.

    Yields:
        how many GPUs each machine in it has.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    # What Ray's own processes say of a lost one would come on standard output.
    ray._private.worker._worker_logs_enabled = False
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DeviceError(f"no Ray cluster can be reached: {reason(error)}") from error
        except SystemExit as end:  # as Ray's own handler of SIGTERM ends
            raise KeyboardInterrupt from end
        signal.signal(signal.SIGTERM, handler)  # in whose place Ray has put its own
        machines = [node for node in ray.nodes() if node["Alive"]]
        yield [int(machine["Resources"].get("GPU", 0)) for machine in machines]
    finally:
        ray.shutdown()


def _videos_at_a_time(gpus: list[int], gpus_per_video: int) -> int:
    """How many videos the machines have GPUs for, each of which needs all of its own on one.

    Raises:
        DeviceError: where no machine has so many.
    """
    at_a_time = sum(number // gpus_per_video for number in gpus)
    if not at_a_time:
        raise DeviceError(
            f"--gpus_per_video {gpus_per_video}: no machine of the cluster has so many; "
            f"the most are {max(gpus)}"
        )
    return at_a_time


def _check_address(address: str) -> None:
    """Raise DeviceError where nobody answers at `host:port`, for which Ray would wait for ever."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # auto, local, or a name that Ray makes something of
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise DeviceError(f"no Ray cluster at RAY_ADDRESS={address}: {reason(error)}") from error


def _report(dispatch: Dispatch, order: Order, console: Console) -> None:
    """What one process says at the end: of several videos the report, of one its summary."""
    if not dispatch.finished:
        return
    from teacache.command.report import write_report
    from teacache.comparison.comparison import Comparison
    from teacache.results.record import summary

    if len(order.jobs) == 1:
        (answer,) = dispatch.finished.values()
        console.say(summary(answer.path, answer.record))
        return
    comparison = Comparison(len(order.jobs), load_analyser=lambda: None)
    for place, answer in dispatch.finished.items():
        comparison.add_earlier(place, answer.path, answer.record)
    write_report(comparison, order, len(order.jobs), console)


def _raise_failures(dispatch: Dispatch) -> None:
    """End as one process would that met what a video failed of: with a fault's traceback, or 2."""
    from teacache.cluster.dispatch import said

    if not dispatch.failed:
        return
    for error in dispatch.failed.values():
        if not isinstance(error, TeaCacheError):
            raise error
    of = len(dispatch.order.jobs)
    first = said(next(iter(dispatch.failed.values())))
    raise SamplingError(
        f"{len(dispatch.failed)} of {of} videos could not be made, the first: {first}. "
        "--resume tries them again"
    )


if __name__ == "__main__":
    sys.exit(main())
