"""Samples many videos on all GPUs of a Ray cluster: `python3 -m teacache.cluster --help`."""

import argparse
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator

from teacache.base.console import Console
from teacache.base.errors import DeviceError, reason
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.request import readers
from teacache.request.arguments import OneLineParser, add_sampling, parse_arguments
from teacache.request.values import Request

RAY = "ray==2.60.0"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code, as the sampler's command does."""
    parser = OneLineParser(
        prog="python3 -m teacache.cluster",
        description="Sample many videos on all GPUs of a Ray cluster, or of this machine.",
        allow_abbrev=False,
    )
    workers = "videos at a time (default: one for each GPU; without GPUs one for each machine)"
    several = add_sampling(parser)
    several.add_argument("--workers", type=readers.positive, metavar="N", help=workers)
    parser.set_defaults(plan=False, shard=None, num_gpus=1)
    args = parse_arguments(argv, parser)
    silence_libraries()
    return run_command(lambda: _sample(args))


def _sample(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("ray") is None:
        raise DeviceError(f"teacache.cluster needs the package ray: pip install {RAY}")
    request = Request.of(args)
    with _connection() as gpus:
        from teacache.cluster.pool import Pool  # imports ray

        workers = args.workers or sum(gpus) or len(gpus)
        Pool(request, workers, int(any(gpus)), Console(args.quiet)).run()


@contextlib.contextmanager
def _connection() -> Iterator[list[int]]:
    """Connect to the Ray cluster, or start one here; yield the number of GPUs of each machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # optional

    # Ray's own processes would print on standard output when a worker is lost.
    ray._private.worker._worker_logs_enabled = False
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DeviceError(f"no Ray cluster can be reached: {reason(error)}") from error
        except SystemExit as end:  # raised by Ray's handler of SIGTERM
            raise KeyboardInterrupt from end
        signal.signal(signal.SIGTERM, handler)  # Ray has replaced it
        yield [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise DeviceError if nobody answers at `host:port`: Ray would wait for ever."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon and port.isdecimal():  # else auto, local, or another name that Ray knows
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise DeviceError(f"no Ray cluster at RAY_ADDRESS={address}: {reason(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
