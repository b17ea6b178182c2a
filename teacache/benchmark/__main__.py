"""Measures steps, decoding and a whole video on random weights: `python3 -m teacache.benchmark`.

`teacache.benchmark.everything` measures more, by this command and others.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from teacache.base.environment import prepare_environment
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.benchmark.table import Row, Table
from teacache.command import readers
from teacache.command.arguments import OneLineParser
from teacache.command.flags import FLAGS, add_flags
from teacache.parallel.launch import (
    check_variables,
    is_one_of_several,
    launch,
    rank,
    run_as_rank,
    world_size,
)
from teacache.results.output_folder import claimed_stem, prepare_folder

if TYPE_CHECKING:
    from teacache.benchmark.timing import Bench

# In the order in which they are measured.
ROWS = ("ceilings", "attention", "plain", "exact", "decoding", "compile", "fp8", "video")
SIZES = ("full", "half", "tiny")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark. Returns its exit code, as the sampler's command does."""
    args = _parse(argv)
    if is_one_of_several():
        if code := run_command(check_variables):
            return code
        args.num_gpus = world_size()
    elif args.num_gpus > 1:
        # `-m` runs this file as `__main__`, which another process cannot import.
        from teacache.benchmark import __main__ as importable

        return launch(args.num_gpus, importable.main, argv)
    silence_libraries()
    if is_one_of_several():
        return run_as_rank(lambda: _benchmark(args), helping=rank() > 0)
    return run_command(lambda: _benchmark(args))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python3 -m teacache.benchmark",
        description="Measure steps, decoding and a whole video on random weights.",
        allow_abbrev=False,
    )
    add_rows(parser)
    parser.add_argument("--profile", action="store_true", help="list the kernels of the last step")
    FLAGS["attention"].add_to(parser)
    FLAGS["num_gpus"].add_to(parser, "sample on N GPUs")
    add_flags(parser, "device", "dtype")
    return parser.parse_args(argv)


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `teacache.benchmark.everything` has, too."""
    add = parser.add_argument
    add(
        "--random_weights",
        choices=SIZES,
        default="tiny",
        help="ConsisID with random weights: as large as the real one; half as wide and half as "
        "deep; or as small as the embedded checkpoint (default: tiny)",
    )
    add("--num_infer_steps", type=readers.positive, default=50, metavar="N", help="of a video")
    steps = "computed steps of a video, by the forecast (default: 12)"
    add("--computed_steps", type=readers.positive, default=12, metavar="N", help=steps)
    add(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=ROWS,
        help="what to measure: a large product and a copy; attention alone; a step as diffusers "
        "has it; exact steps; the decoder; --compile; --compile --quantize fp8; a whole video with "
        "exact steps and with the fastest (default: all)",
    )
    FLAGS["output_path"].add_to(parser, "folder of the table, as .md and .json")


def _benchmark(args: argparse.Namespace) -> None:
    """Measure every row. All ranks measure together; the first one reports."""
    prepare_folder(args.output_path)
    prepare_environment()
    from teacache.base import device as devices
    from teacache.command.machine import check_number, choose_device, choose_dtype
    from teacache.command.other_ranks import own_device

    device = choose_device(args.device, full_size=args.random_weights != "tiny")
    check_number(args.num_gpus, device)
    device = own_device(device)
    dtype = choose_dtype(args.dtype, device)
    from teacache.benchmark.timing import Bench

    bench = Bench(args.random_weights, args.attention, device, dtype)
    if args.num_gpus > 1:
        bench.share(args.num_gpus)
    bench.check_backend()
    if rank() > 0:
        measure(Table(None, {}), bench, args)
        return
    with claimed_stem(args.output_path, "benchmark") as stem:
        size = bench.size
        table = Table(
            stem,
            {
                "weights": f"random, {args.random_weights}, {devices.dtype_name(dtype)}",
                "video": f"{size.num_frames} frames of {size.width}x{size.height}, "
                f"{bench.tokens} tokens",
            },
        )
        table.describe(devices.device_name(device))
        measure(table, bench, args)
    print(table.markdown())
    print(f"{stem}.md\n{stem}.json", file=sys.stderr)


def measure(table: Table, bench: Bench, args: argparse.Namespace) -> None:
    """Add the rows that are asked for to a table. A row that fails leaves the others alone."""
    from teacache.benchmark.decoders import decodings

    alone, rows, settings, faster = args.num_gpus == 1, args.rows, "", ""
    if args.attention != "native":
        settings += f" --attention {args.attention}"
    if not alone:
        settings += f" --num_gpus {args.num_gpus}"

    def add(figure: str, work: Callable[[], Row]) -> bool:
        return table.measure(f"{figure}{settings}{faster}", work, alone)

    def video() -> None:
        figure = f"loaded model to mp4, {args.computed_steps} computed steps"
        add(figure, lambda: bench.video(args.num_infer_steps, args.computed_steps))

    if "ceilings" in rows:
        table.measure("a large product", bench.ceilings, alone)
    if "attention" in rows:
        add("attention of a layer", bench.attention)
    if "plain" in rows and alone:
        table.measure("computed step by diffusers", bench.plain)
    bench.use_command_models()
    if "exact" in rows and add("computed step", bench.exact):
        add("forecast step", bench.forecast)
    if "decoding" in rows and alone:
        for figure, work in decodings(bench):
            add(figure, work)
    if "exact" in rows and "video" in rows:
        video()
    for name, quantize in (("compile", None), ("fp8", "fp8")):
        before, faster = faster, " --compile" + (f" --quantize {quantize}" if quantize else "")
        if name not in rows or not add("computed step", partial(bench.accelerate, quantize)):
            faster = before
    if faster and "video" in rows:
        video()
    if args.profile:
        table.texts.append(f"Computed step{settings}{faster}: {bench.profile()}")
        table.write()


if __name__ == "__main__":
    sys.exit(main())
