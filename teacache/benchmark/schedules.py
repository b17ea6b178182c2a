"""Residual and forecast at the same numbers of computed steps, on the embedded checkpoint.

`python3 -m teacache.benchmark.schedules` samples the videos of `teacache.embedded.videos` and
compares their latents with those of every step computed from the same noise. With DDIM, which draws
no noise at a step, it also samples with fewer steps, all computed.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import numpy as np

from teacache.base.environment import prepare_environment
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.comparison.tables import markdown_table
from teacache.core.rule import schedule
from teacache.request import readers
from teacache.request.arguments import OneLineParser

if TYPE_CHECKING:
    import torch
    from diffusers import ConsisIDPipeline

    from teacache.embedded.videos import BenchmarkVideo
    from teacache.inputs.identity import FaceModels
    from teacache.inputs.text import Text
    from teacache.sampling.sampler import Start

STEPS, GUIDANCE_SCALE = 50, 6.0
COMPUTED = (22, 16, 12, 10, 8)
PUBLISHED, FORECAST, FEWER = "published rule, residual", "forecast", "fewer steps, all computed"
SETS = ("held_out", "training", "fresh")

# By row of the table: [videos, len(COMPUTED)], PSNR in dB.
Figures = dict[str, list[list[float]]]


def main(argv: list[str] | None = None) -> int:
    """Run the comparison. Returns its exit code, as the sampler's command does."""
    parser = OneLineParser(
        prog="python3 -m teacache.benchmark.schedules",
        description="Compare residual and forecast at the same numbers of computed steps, on the "
        "embedded checkpoint, by the PSNR of their latents to those of every step computed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--scheduler", choices=("dpm", "ddim"), default="dpm", help="(default: %(default)s)")
    add("--sets", nargs="+", choices=SETS, default=SETS[:2], help="(default: held_out training)")
    add(
        "--videos", type=readers.positive, default=16, metavar="N", help="of each set (default: 16)"
    )
    args = parser.parse_args(argv)
    silence_libraries()
    return run_command(lambda: compare(args))


def compare(args: argparse.Namespace) -> None:
    """Sample every video, and print the table."""
    prepare_environment()
    # Late, here and below: after `silence_libraries`, and for a fast `--help`.
    import torch

    from teacache.checkpoint.distances import step_distances
    from teacache.checkpoint.pipeline import load_pipeline
    from teacache.embedded.cached import cached_tiny_checkpoint
    from teacache.embedded.videos import videos
    from teacache.inputs.identity import load_face_models

    device, dtype = torch.device("cpu"), torch.float32
    checkpoint = cached_tiny_checkpoint()
    pipe = load_pipeline(checkpoint, device, dtype, scheduler=args.scheduler)
    models = load_face_models(checkpoint, device, dtype)
    distances = step_distances(checkpoint, pipe.scheduler, GUIDANCE_SCALE, device, dtype, STEPS)
    figures: Figures = {}
    chosen = [video for name in args.sets for video in videos(name)[: args.videos]]
    for number, video in enumerate(chosen, start=1):
        for name, decibels in measure(pipe, models, video, distances).items():
            figures.setdefault(name, []).append(decibels)
        print(f"video {number} of {len(chosen)}", file=sys.stderr, flush=True)
    print(
        f"{args.scheduler}, {len(chosen)} videos ({', '.join(args.sets)}), {STEPS} steps.\n"
        "PSNR of the latents to those of every step computed: mean ± standard error, worst video,\n"
        f"share of videos below the worst of the {PUBLISHED} at {COMPUTED[0]}.\n"
    )
    print(table(figures))


def measure(
    pipe: ConsisIDPipeline,
    models: FaceModels,
    video: BenchmarkVideo,
    distances: tuple[float | None, ...],
) -> dict[str, list[float]]:
    """The PSNR of one video in dB: for each row of the table, a number for each of `COMPUTED`."""
    from diffusers import CogVideoXDDIMScheduler

    from teacache.embedded.videos import SIZE, identity_of
    from teacache.inputs.text import Text, embed_text
    from teacache.sampling import sampler

    start = sampler.prepare(pipe, identity_of(video.portrait, models), SIZE, video.seed)
    text = Text(*(embed_text(pipe, words).embeds for words in (video.prompt, "")))
    full = sample(pipe, start, text, STEPS, STEPS)

    def decibels(num_steps: int, computed: int | tuple[int, ...]) -> float:
        return psnr(sample(pipe, start, text, num_steps, computed), full)

    rows = {
        PUBLISHED: [decibels(STEPS, published_steps(distances, n)) for n in COMPUTED],
        FORECAST: [decibels(STEPS, n) for n in COMPUTED],
    }
    if isinstance(pipe.scheduler, CogVideoXDDIMScheduler):
        rows[FEWER] = [decibels(n, n) for n in COMPUTED]
    return rows


def sample(
    pipe: ConsisIDPipeline,
    start: Start,
    text: Text,
    num_steps: int,
    computed: int | tuple[int, ...],
) -> torch.Tensor:
    """The latents of a video.

    Args:
        computed: a number of computed steps, with the forecast; or their list, with the residual.
    """
    from teacache.core.forward import apply_teacache
    from teacache.embedded.videos import SIZE
    from teacache.sampling.sampler import denoise

    with apply_teacache(pipe) as handle:
        handle.follow(computed)
        return denoise(
            pipe, start, text, SIZE, num_infer_steps=num_steps, guidance_scale=GUIDANCE_SCALE
        ).latents


def published_steps(distances: tuple[float | None, ...], computed: int) -> tuple[int, ...]:
    """The steps of the lowest threshold, in thousandths, that computes at most `computed` steps."""
    for thousandths in range(100_000):
        steps = schedule(distances, thousandths / 1000).computed_steps
        if len(steps) <= computed:
            return steps
    raise AssertionError("a threshold of 100 computes only the first and the last step")


def psnr(latents: torch.Tensor, full: torch.Tensor) -> float:
    """PSNR in dB; the peak is the range of `full`."""
    error = (latents - full).square().mean().sqrt()
    return 20 * float(((full.max() - full.min()) / error).log10())


def table(figures: Figures) -> str:
    """Markdown: a line for each way to reuse, a column for each number of computed steps."""
    bound = min(decibels[0] for decibels in figures[PUBLISHED])
    lines = [["dB", *map(str, COMPUTED)]]
    for name, rows in figures.items():
        columns = np.array(rows).T  # [len(COMPUTED), videos]
        lines.append([name, *(_cell(column, bound) for column in columns)])
    return markdown_table(lines)


def _cell(decibels: np.ndarray, bound: float) -> str:
    error = decibels.std(ddof=1) / len(decibels) ** 0.5  # nan of a single video
    below = f"{(decibels < bound).mean():.0%}"
    return f"{decibels.mean():.1f} ± {error:.1f}, {decibels.min():.1f}, {below}"


if __name__ == "__main__":
    sys.exit(main())
