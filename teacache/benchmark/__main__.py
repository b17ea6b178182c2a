"""Measures steps, decoder, whole videos, the command on disk and smaller cards, in one table.

`python3 -m teacache.benchmark --random_weights full` is all of it, on random weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.environment import prepare_environment
from teacache.base.errors import ArgumentError
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.benchmark.processes import measure_command, measure_steps
from teacache.benchmark.table import Row, Table
from teacache.parallel.launch import check_variables, is_one_of_several, world_size
from teacache.request import readers
from teacache.request.arguments import OneLineParser
from teacache.request.flags import FLAGS, add_flags
from teacache.results.output_folder import claimed_stem, prepared_folder

if TYPE_CHECKING:
    import torch

# In the order in which they are measured, and what the help says.
ROWS = {
    "ceilings": "a large product and a copy",
    "attention": "attention of a layer alone",
    "plain": "a step by diffusers",
    "exact": "a computed and a forecast step",
    "decoding": "the decoder, as it is and with changes",
    "compile": "a step with --compile",
    "fp8": "a step with --compile --quantize fp8",
    "video": "loaded model to mp4, after exact and after the fastest steps",
    "profile": "the kernels of the fastest step",
    "command": "the whole command on a checkpoint on disk, twice",
    "memory": "the command with the memory of smaller cards",
}
BY_COMMAND = {"command", "memory"}
OF_EACH_BACKEND = {"attention", "exact", "compile", "fp8"}
# The attention backends that are measured beside torch's own, if their module is there.
BACKENDS = {"flash3": "flash_attn_interface", "flash4": "flash_attn", "sage": "sageattention"}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Returns its exit code, as the sampler's command does."""
    args = _parse(argv)
    silence_libraries()

    def work() -> None:
        with prepared_folder(args.output_path):
            _benchmark(args)

    return run_command(work)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python3 -m teacache.benchmark",
        description="Measure ConsisID with random weights on this machine.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--random_weights",
        choices=("full", "half", "tiny"),
        default="tiny",
        help="as large as the real ones; of a model half as wide and half as deep; or of one as "
        "small as the embedded checkpoint (default: tiny)",
    )
    add("--num_infer_steps", type=readers.positive, default=50, metavar="N", help="of a video")
    steps = "computed steps of a video, by the forecast (default: 12)"
    add("--computed_steps", type=readers.positive, default=12, metavar="N", help=steps)
    shown = "; ".join(f"{name}: {meaning}" for name, meaning in ROWS.items())
    add("--rows", nargs="+", choices=ROWS, default=[*ROWS], help=f"{shown} (default: all)")
    add(
        "--attention",
        nargs="+",
        metavar="BACKEND",
        default=["native", *(name for name, module in BACKENDS.items() if find_spec(module))],
        help=f"backends (default: native, and of {', '.join(BACKENDS)} what is installed)",
    )
    stays = "checkpoint of the command; if there is none, one is written (default: temporary)"
    add("--ckpts_path", type=Path, metavar="PATH", help=stays)
    only = "write a checkpoint of random weights to a new folder, at full size 22 GB, and end"
    add("--write", type=Path, metavar="DIR", help=only)
    FLAGS["num_gpus"].add_to(parser, "GPUs of the whole command")
    add_flags(parser, "device", "dtype")
    FLAGS["output_path"].add_to(parser, "folder of benchmark_{index:04d}.md and .json")
    return parser.parse_args(argv)


def _benchmark(args: argparse.Namespace) -> None:
    """Fill a table, in this process if that is enough."""
    if is_one_of_several():
        check_variables()
        if world_size() > 1:
            raise ArgumentError("the benchmark starts ranks itself, by --num_gpus: unset RANK")
    prepare_environment()
    from teacache.preflight.machine import choose_device

    device = choose_device(args.device, full_size=args.random_weights != "tiny")
    if args.write:
        from teacache.benchmark.random_weights import write_checkpoint

        write_checkpoint(args.write, args.random_weights, device)
        return
    one = len(args.attention) == 1 and not BY_COMMAND & {*args.rows}
    with claimed_stem(args.output_path, "benchmark") as stem:
        table = Table(stem)
        if one:
            measure(table, args, device)
        else:
            measure_in_processes(table, args)
    print(table.markdown())
    print(f"{stem}.md\n{stem}.json", file=sys.stderr)


def measure_in_processes(table: Table, args: argparse.Namespace) -> None:
    """All rows, each part in a process: every backend, the writing, every run of the command."""
    for backend in args.attention:
        wanted = {*args.rows} - BY_COMMAND if backend == "native" else OF_EACH_BACKEND
        if rows := [row for row in args.rows if row in wanted]:
            measure_steps(table, args, backend, rows)
    if BY_COMMAND & {*args.rows}:
        with tempfile.TemporaryDirectory() as scratch:
            measure_command(table, args, Path(scratch))


def measure(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    """The rows of one attention backend. A row that fails leaves the others alone."""
    from teacache.base.device import device_name
    from teacache.benchmark.timing import Bench
    from teacache.preflight.machine import choose_dtype
    from teacache.run.models import use_lean_models

    rows, (backend,), faster = args.rows, args.attention, ""
    bench = Bench(args.random_weights, backend, device, choose_dtype(args.dtype, device))
    table.about |= bench.about
    table.describe(device_name(device))
    setting = "" if backend == "native" else f" --attention {backend}"

    def add(figure: str, work: Callable[[], Row]) -> bool:
        return table.measure(f"{figure}{setting}{faster}", work)

    def video() -> None:
        if "video" in rows:
            figure = f"loaded model to mp4, {args.computed_steps} computed steps"
            add(figure, partial(bench.video, args.num_infer_steps, args.computed_steps))

    if "ceilings" in rows:
        table.measure("a large product", bench.ceilings)
    if "attention" in rows:
        add("attention of a layer", bench.attention)
    if "plain" in rows:
        table.measure("computed step by diffusers", bench.plain)
    use_lean_models(bench.pipe, backend)
    if "exact" in rows and add("computed step", bench.exact):
        add("forecast step", lambda: bench.forecast)
        video()
    if "decoding" in rows:
        for figure, work in bench.decodings():
            add(figure, work)
    for row, quantize in (("compile", None), ("fp8", "fp8")):
        before, faster = faster, " --compile" + (f" --quantize {quantize}" if quantize else "")
        if row not in rows or not add("computed step", partial(bench.accelerate, quantize)):
            faster = before
    if faster:
        video()
    if "profile" in rows:
        add("kernels of a computed step", partial(bench.profile, table.texts))


if __name__ == "__main__":
    sys.exit(main())
