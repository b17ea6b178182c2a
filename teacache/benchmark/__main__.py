"""Measures the plain pipeline, TeaCache and its accelerations in turn, in one run.

`python3 -m teacache.benchmark --help`. With `--random_weights` it needs no checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacache.base.environment import prepare_environment
from teacache.base.files import written_whole
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.command import readers
from teacache.command.arguments import OneLineParser
from teacache.command.flags import FLAGS, add_flags
from teacache.comparison.tables import markdown_table
from teacache.parallel.launch import (
    check_variables,
    is_one_of_several,
    launch,
    rank,
    run_as_rank,
    world_size,
)
from teacache.results.output_folder import claimed_stem, prepare_folder
from teacache.results.record import versions, write_json

if TYPE_CHECKING:
    from teacache.benchmark.timing import Bench, Measured, Variant

# The columns of the table, and their units.
COLUMNS = {
    "computed step": "s",
    "reused step": "ms",
    "denoising": "s",
    "encoding": "s",
    "decoding": "s",
    "writing": "s",
    "whole video": "s",
    "peak memory": "GiB",
}
UNITS = {"s": 1.0, "ms": 1e-3, "GiB": 2.0**30}
RATIOS = ("computed step", "whole video")  # columns that also show the first row's over this row's


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
        description="Measure the plain pipeline, TeaCache and its accelerations in turn.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--ckpts_path", metavar="PATH", help="checkpoint folder, or tiny")
    weights.add_argument(
        "--random_weights",
        choices=("full", "half", "small"),
        help="ConsisID with random weights, made on the device: as large as the real one; half as "
        "wide and half as deep; or small enough for a CPU (default: small)",
    )
    add(
        "--rel_l1_thresh",
        type=readers.not_negative,
        nargs="+",
        default=[0.15],
        metavar="X",
        help="thresholds, with a checkpoint (default: 0.15)",
    )
    add(
        "--computed_steps",
        type=readers.positive,
        metavar="N",
        help="with random weights: compute N steps, evenly spaced (default: 44 %% of all steps, "
        "about as many as at threshold 0.15)",
    )
    steps = "denoising steps (default: 50, with small 12)"
    add("--num_infer_steps", type=readers.positive, metavar="N", help=steps)
    rounds = "videos of each variant (default: %(default)s)"
    add("--rounds", type=readers.positive, default=3, metavar="N", help=rounds)
    FLAGS["attention"].add_to(parser, "also measure this attention backend")
    FLAGS["compile"].add_to(parser, "also measure compiled layers")
    FLAGS["quantize"].add_to(parser, "also measure float8 layers")
    FLAGS["num_gpus"].add_to(parser, "sample on N GPUs; the plain pipeline samples on one")
    add_flags(parser, "device", "dtype")
    FLAGS["output_path"].add_to(parser, "folder of benchmark_{index:04d}.md and .json")
    args = parser.parse_args(argv)
    _choose_steps(args, parser)
    return args


def _choose_steps(args: argparse.Namespace, parser: OneLineParser) -> None:
    """Set the defaults that depend on the weights."""
    if not args.ckpts_path and not args.random_weights:
        args.random_weights = "small"
    if args.num_infer_steps is None:
        args.num_infer_steps = 12 if args.random_weights == "small" else 50
    if args.random_weights and args.computed_steps is None:
        args.computed_steps = max(2, round(0.44 * args.num_infer_steps))
    if args.computed_steps and not args.random_weights:
        parser.error("--computed_steps needs --random_weights: a checkpoint has its own schedule")
    if args.computed_steps and not 2 <= args.computed_steps <= args.num_infer_steps:
        parser.error(f"--computed_steps must be from 2 to {args.num_infer_steps}")


def _benchmark(args: argparse.Namespace) -> None:
    """Measure every variant. All ranks measure together; the first one reports."""
    prepare_folder(args.output_path)
    prepare_environment()
    from teacache.command.machine import check_number, choose_device, choose_dtype
    from teacache.command.other_ranks import own_device
    from teacache.sampling.acceleration import prepare_acceleration

    device = choose_device(args.device, full_size=args.random_weights in ("full", "half"))
    check_number(args.num_gpus, device)
    device = own_device(device)
    dtype = choose_dtype(args.dtype, device)
    prepare_acceleration(args.compile, args.quantize, "none", device, dtype)
    from teacache.benchmark import timing
    from teacache.sampling.attention import choose_backend

    backend = choose_backend(args.attention, device, dtype)
    if args.random_weights:
        bench = timing.of_random_weights(
            args.random_weights, args.num_infer_steps, args.computed_steps, device, dtype
        )
    else:
        bench = timing.of_checkpoint(args.ckpts_path, args.num_infer_steps, device, dtype)
    bench.share(args.num_gpus)
    # --computed_steps overrides the threshold, so one threshold is enough.
    thresholds = args.rel_l1_thresh[:1] if args.random_weights else args.rel_l1_thresh
    variants = timing.variants(thresholds, backend, args.compile, args.quantize)

    compiling = {variant: bench.warm_up(variant) for variant in variants}
    measured: dict[Variant, list[Measured]] = {variant: [] for variant in variants}
    for n in range(args.rounds):
        for variant in variants:
            if rank() == 0:
                progress = f"round {n + 1} of {args.rounds}: {variant.name}"
                print(progress, file=sys.stderr, flush=True)
            measured[variant].append(bench.sample(variant))
    if rank() == 0:
        rows = [_row(variant, measured[variant], compiling[variant]) for variant in variants]
        _report(rows, _about(args, bench), args.output_path)


def _row(variant: Variant, videos: list[Measured], compiling: float) -> dict[str, Any]:
    """The figures of a variant: median, lowest and highest, over steps or over videos."""
    samples: dict[str, list[float]] = {
        "computed step": [second for video in videos for second in video.computed_steps],
        "reused step": [second for video in videos for second in video.reused_steps],
        "peak memory": [video.peak_memory_bytes for video in videos if video.peak_memory_bytes],
        "whole video": [sum(video.seconds.values()) for video in videos],
    }
    for name in videos[0].seconds:
        samples[name] = [video.seconds[name] for video in videos]
    return {
        "variant": variant.name,
        "settings": variant._asdict(),
        "steps": [len(videos[0].computed_steps), len(videos[0].reused_steps)],
        **{name: _spread(samples[name]) for name in COLUMNS},
        "compiling": compiling,
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _report(rows: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """Print the table, and write it and the figures."""
    for row in rows:
        row["ratios"] = {name: rows[0][name]["median"] / row[name]["median"] for name in RATIOS}
    report = _markdown(about, rows)
    print(report)
    with (
        claimed_stem(folder, "benchmark") as stem,
        written_whole(stem, ".md", ".json") as (table, figures),
    ):
        table.write_text(report + "\n", encoding="utf-8")
        write_json({"about": about, "rows": rows}, figures)
    print(f"{stem}.md\n{stem}.json", file=sys.stderr)


def _markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    units = [f"{name} ({unit})" for name, unit in COLUMNS.items()]
    lines = [["", "steps computed, reused", *units, "compiling (s)", *RATIOS]]
    for row in rows:
        lines.append(
            [
                row["variant"],
                "{}, {}".format(*row["steps"]),
                *(_cell(row[name], UNITS[unit]) for name, unit in COLUMNS.items()),
                f"{row['compiling']:.1f}" if row["settings"]["compile"] else "-",
                *(f"{ratio:.2f}x" for ratio in row["ratios"].values()),
            ]
        )
    title = "\n".join(f"- {name}: {value}" for name, value in about.items())
    return (
        f"# Benchmark\n\n{title}\n\n{markdown_table(lines)}\n\n"
        "Each cell: the median (lowest to highest). The last two columns: the median of the first "
        "row divided by this row's. Every variant is warmed up before; `compiling` is the time "
        "that the first warm-up takes longer than the second."
    )


def _cell(figures: dict[str, float] | None, unit: float) -> str:
    if figures is None:
        return "-"
    median, lowest, highest = (value / unit for value in figures.values())
    return f"{median:.3g} ({lowest:.3g} to {highest:.3g})"


def _about(args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """Machine, weights and settings of the measurement."""
    from teacache.base import device as devices

    weights = f"random, {args.random_weights}" if args.random_weights else args.ckpts_path
    listed = f", {args.computed_steps} computed with TeaCache" if args.computed_steps else ""
    size = bench.material.size
    return {
        "device": devices.device_name(bench.device),
        "dtype": devices.dtype_name(bench.dtype),
        "weights": weights,
        "video": f"{size.num_frames} frames of {size.width}x{size.height}",
        "denoising steps": f"{args.num_infer_steps}{listed}",
        "rounds": args.rounds,
        "versions": ", ".join(f"{package} {version}" for package, version in versions().items()),
        **bench.before_the_loop,
        **({"ranks": f"{bench.ranks}; the plain pipeline on one"} if args.num_gpus > 1 else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
