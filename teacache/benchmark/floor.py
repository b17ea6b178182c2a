"""What a step must take at least, by arithmetic, and what each acceleration can bring of it.

`python3 -m teacache.benchmark.floor` counts the work of one computed step at full size: the real
forward runs on tensors without data, and each operation is booked as attention, as a matrix
product, or by the bytes that it reads and writes. Rates of a GPU turn that into seconds. It needs
no GPU, no checkpoint and half a minute; `--measured` puts what `teacache.benchmark` has found
beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from teacache.base.environment import prepare_environment
from teacache.base.errors import ArgumentError
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.command.arguments import OneLineParser
from teacache.comparison.tables import markdown_table

if TYPE_CHECKING:
    from teacache.benchmark.work import Work

COMPUTED, STEPS = 22, 50  # of the video that table and picture are of
Settings = tuple[bool, bool, bool]  # of a benchmark's variant: TeaCache, compiled, float8


class Rates(NamedTuple):
    """What a GPU does in a second: operations, and bytes read and written.

    Those of an H100 (80 GB HBM3) were measured on one, in bfloat16, but for float8: there twice the
    rate of bfloat16 is what the data sheet has.
    """

    attention: float = 415e12
    product: float = 785e12
    product_fp8: float = 1570e12
    memory: float = 2.9e12


class Row(NamedTuple):
    """A way to sample, and the least seconds of its computed and its reused steps."""

    name: str
    settings: Settings
    computed: float
    reused: float | None

    def video(self, computed_steps: int, num_infer_steps: int) -> float:
        """Seconds of denoising."""
        if self.reused is None:
            return num_infer_steps * self.computed
        return computed_steps * self.computed + (num_infer_steps - computed_steps) * self.reused


def floors(rates: Rates) -> list[Row]:
    """The least seconds of each way to sample, the slowest first."""
    from teacache.benchmark.work import count

    (plain, _), (ours, reused) = count(ours=False), count(ours=True)

    def seconds(work: Work, elsewhere: int, product: float) -> float:
        attention = work.attention / rates.attention
        return attention + work.product / product + elsewhere / rates.memory

    fused = plain.between  # where none writes in place, each tensor is counted
    again = seconds(reused.work, reused.work.elsewhere, rates.product)
    as_it_is = [seconds(each.work, each.work.elsewhere, rates.product) for each in (plain, ours)]
    compiled = [seconds(ours.work, fused, rate) for rate in (rates.product, rates.product_fp8)]
    return [
        Row("plain pipeline", (False, False, False), as_it_is[0], None),
        Row("TeaCache", (True, False, False), as_it_is[1], again),
        Row("and `--compile`", (True, True, False), compiled[0], again),
        Row("and `--quantize fp8`", (True, True, True), compiled[1], again),
    ]


def measured_steps(path: Path) -> dict[Settings, float]:
    """Seconds of a computed step by settings, from a benchmark's JSON.

    Raises:
        ArgumentError: where it is none.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            (
                row["settings"]["threshold"] is not None,
                row["settings"]["compile"],
                row["settings"]["quantize"] is not None,
            ): row["computed step"]["median"]
            for row in reversed(rows)
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"--measured {path}: not a benchmark's JSON: {error}") from error


def table(rows: list[Row], measured: dict[Settings, float], computed: int, steps: int) -> str:
    """The floors as Markdown, with what was measured of them."""
    lines = [["", "a computed step, at least", "measured", f"{steps} steps, {computed} computed"]]
    for row in rows:
        found = measured.get(row.settings)
        lines.append(
            [
                row.name,
                f"{row.computed:.2f} s",
                f"{found:.2f} s" if found else "",
                f"{row.video(computed, steps):.1f} s",
            ]
        )
    return markdown_table(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table, and draw it. Returns the exit code, as the sampler's command does."""
    parser = OneLineParser(
        prog="python3 -m teacache.benchmark.floor",
        description="What a step of ConsisID must take at least on an H100, by arithmetic.",
        allow_abbrev=False,
    )
    parser.add_argument("--measured", type=Path, metavar="JSON", help="what a benchmark has found")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw what each one brings")
    args = parser.parse_args(argv)
    return run_command(lambda: _show(args))


def _show(args: argparse.Namespace) -> None:
    measured = measured_steps(args.measured) if args.measured else {}
    prepare_environment()
    silence_libraries()
    rows = floors(Rates())
    print(table(rows, measured, COMPUTED, STEPS))
    if args.picture:
        from teacache.benchmark.waterfall import draw

        draw(rows, measured, COMPUTED, STEPS, args.picture)


if __name__ == "__main__":
    sys.exit(main())
