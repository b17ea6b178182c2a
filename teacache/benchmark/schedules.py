"""Schedules against each other, at the same number of computed steps, on the embedded checkpoint.

`python3 -m teacache.benchmark.schedules` samples videos of faces that nothing was trained on, and
measures how near each schedule's latents come to those of every step computed. What is calibrated
is calibrated on other videos, of the training's faces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from teacache.base.environment import prepare_environment
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.benchmark.rules import PUBLISHED, rules_by_name
from teacache.command import readers
from teacache.command.arguments import OneLineParser
from teacache.comparison.tables import aligned

if TYPE_CHECKING:
    import torch
    from diffusers import ConsisIDPipeline

    from teacache.benchmark.adaptive import Sampled
    from teacache.calibrate.measure import Run
    from teacache.embedded.videos import Video
    from teacache.inputs.identity import FaceModels
    from teacache.inputs.text import Text
    from teacache.sampling.sampler import Loop, Start

STEPS, GUIDANCE_SCALE = 50, 6.0
COMPUTED = (30, 22, 16, 12)
VIDEOS = range(1, 17)  # as many as a set of videos holds
# Rules that are measured with extrapolated residuals too.
EXTRAPOLATED = (PUBLISHED, f"{PUBLISHED}, --retain_last 3", "even, last 3", "calibrated")
SCHEDULERS = ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")


class Case(NamedTuple):
    """A video to sample."""

    start: Start
    text: Text


class Figure(NamedTuple):
    """What came of a video: dB to its latents with every step computed, and the steps it took."""

    psnr: float
    computed: int


# By rule and number of computed steps, a figure for each video.
Found = dict[tuple[str, int], list[Figure]]


def main(argv: list[str] | None = None) -> int:
    """Run the comparison. Returns its exit code, as the sampler's command does."""
    args = _parse(argv)
    silence_libraries()
    return run_command(lambda: compare(args.scheduler, args.videos, args.calibrated_on))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python3 -m teacache.benchmark.schedules",
        description="Compare schedules of the same number of computed steps on the embedded "
        "checkpoint, by the PSNR of their latents to those of every step computed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--scheduler", choices=SCHEDULERS, default=SCHEDULERS[0], help="(default: %(default)s)")
    add(
        "--videos",
        type=readers.positive,
        choices=VIDEOS,
        default=16,
        metavar="N",
        help="(default: %(default)s)",
    )
    add(
        "--calibrated_on",
        type=readers.positive,
        choices=VIDEOS,
        default=10,
        metavar="N",
        help="videos, others than those (default: %(default)s)",
    )
    return parser.parse_args(argv)


def compare(scheduler: str, videos: int, calibrated_on: int) -> None:
    """Print the table, and what it grows from."""
    prepare_environment()
    import diffusers
    import torch

    from teacache.checkpoint.distances import step_distances
    from teacache.checkpoint.pipeline import load_pipeline
    from teacache.embedded.build import cached_tiny_checkpoint
    from teacache.inputs.identity import load_face_models

    device, dtype = torch.device("cpu"), torch.float32
    checkpoint = cached_tiny_checkpoint()
    pipe = load_pipeline(checkpoint, device, dtype)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    models = load_face_models(checkpoint, device, dtype)
    distances = step_distances(checkpoint, GUIDANCE_SCALE, device, dtype, STEPS)
    rules = rules_by_name(distances, list(_calibrated(pipe, models, calibrated_on)))
    chosen = {
        (name, computed): steps
        for name, rule in rules.items()
        for computed in COMPUTED
        if (steps := rule(computed)) is not None
    }
    for (name, computed), steps in chosen.items():
        print(f"{name}, {computed}: {' '.join(map(str, steps))}", flush=True)
    found: Found = {}
    for number, case in enumerate(_held_out(pipe, models, videos)):
        full = _latents(pipe, case, tuple(range(STEPS)))
        for (name, computed), steps in chosen.items():
            for extrapolate in (False, True) if name in EXTRAPOLATED else (False,):
                key = f"{name}, extrapolated" if extrapolate else name, computed
                latents = _latents(pipe, case, steps, extrapolate)
                found.setdefault(key, []).append(Figure(psnr(latents, full), len(steps)))
        for key, sampled in _adaptive(pipe, case):
            found.setdefault(key, []).append(
                Figure(psnr(sampled.latents, full), len(sampled.computed_steps))
            )
        print(f"video {number + 1} of {videos}", file=sys.stderr, flush=True)
    print(
        f"\n{scheduler}, {videos} videos; PSNR of the latents in dB: mean, worst; and against the"
    )
    print(f"{PUBLISHED} the mean difference with its standard error; where they are others, the")
    print("mean number of computed steps\n")
    print(table(found))


def psnr(latents: torch.Tensor, full: torch.Tensor) -> float:
    """In dB, against the range of `full`."""
    error = (latents - full).square().mean().sqrt()
    return 20 * float(((full.max() - full.min()) / error).log10())


def table(found: Found) -> str:
    """A line for each rule, a column for each number of computed steps."""
    lines = [["", *map(str, COMPUTED)]]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [
            _cell(found.get((name, computed)), found[PUBLISHED, computed], computed)
            for computed in COMPUTED
        ]
        lines.append([name, *cells])
    return aligned(lines)


def _cell(own: list[Figure] | None, published: list[Figure], computed: int) -> str:
    if own is None or len(own) < len(published):  # some video has no schedule of so many steps
        return "-"
    decibels = np.array([figure.psnr for figure in own])
    said = f"{decibels.mean():.1f}, {decibels.min():.1f}"
    if own is not published:
        gain = decibels - [figure.psnr for figure in published]
        error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.nan
        said += f" {gain.mean():+.1f} +- {error:.1f}"
    steps = np.mean([figure.computed for figure in own])
    return said if steps == computed else f"{said} ({steps:.1f})"


def _adaptive(pipe: ConsisIDPipeline, case: Case) -> Iterator[tuple[tuple[str, int], Sampled]]:
    """A video of each cache that decides while it samples, for each number of computed steps."""
    from teacache.benchmark import adaptive

    def sea_cache(order: int) -> Callable[[float], Sampled]:
        return lambda threshold: adaptive.sea_cache(pipe, _loop(pipe, case), threshold, order=order)

    def db_cache(threshold: float) -> Sampled:
        return adaptive.db_cache(pipe.transformer, lambda: _denoised(pipe, case), STEPS, threshold)

    caches = {"SeaCache": sea_cache(1), "SeaCache, not extrapolated": sea_cache(0)}
    if adaptive.has_cache_dit():
        caches["DBCache"] = db_cache
    for name, sample in caches.items():
        for computed in COMPUTED:
            sampled = adaptive.with_computed(sample, computed)
            if sampled is not None:
                yield (name, computed), sampled


def _calibrated(
    pipe: ConsisIDPipeline, models: FaceModels, videos: int
) -> Iterator[tuple[Run, torch.Tensor]]:
    """What reuse costs on videos of faces that the checkpoint was trained on."""
    import torch

    from teacache.calibrate.measure import error_left, full_run
    from teacache.core.forward import apply_teacache
    from teacache.embedded.videos import videos as videos_of

    for number, video in enumerate(videos_of("training")[:videos]):
        case = _case(pipe, models, video)
        loop = _loop(pipe, case)
        with apply_teacache(pipe) as handle:
            run = full_run(handle, loop, STEPS, lambda: None)
            left = [torch.zeros_like(run.final)] * STEPS
            for step in range(1, STEPS - 1):
                left[step] = error_left(handle, loop, run, step, lambda: None)
        print(
            f"calibrated on {number + 1} of {videos}: {video.prompt}", file=sys.stderr, flush=True
        )
        yield run, torch.stack(left).flatten(1)


def _held_out(pipe: ConsisIDPipeline, models: FaceModels, videos: int) -> Iterator[Case]:
    from teacache.embedded.videos import videos as videos_of

    for video in videos_of("held_out")[:videos]:
        yield _case(pipe, models, video)


def _case(pipe: ConsisIDPipeline, models: FaceModels, video: Video) -> Case:
    from teacache.embedded.videos import SIZE, identity_of
    from teacache.inputs.text import Text, embed_text
    from teacache.sampling import sampler

    start = sampler.prepare(pipe, identity_of(video.portrait, models), SIZE, video.seed)
    return Case(start, Text(*(embed_text(pipe, text).embeds for text in (video.prompt, ""))))


def _latents(
    pipe: ConsisIDPipeline, case: Case, steps: tuple[int, ...], extrapolate: bool = False
) -> torch.Tensor:
    from teacache.core.forward import apply_teacache

    with apply_teacache(pipe, schedule=steps, extrapolate=extrapolate):
        return _denoised(pipe, case)


def _denoised(pipe: ConsisIDPipeline, case: Case) -> torch.Tensor:
    """The latents that the pipeline samples as it is."""
    from teacache.embedded.videos import SIZE
    from teacache.sampling.sampler import denoise

    return denoise(
        pipe,
        case.start,
        case.text,
        SIZE,
        num_infer_steps=STEPS,
        guidance_scale=GUIDANCE_SCALE,
    ).latents


def _loop(pipe: ConsisIDPipeline, case: Case) -> Loop:
    from teacache.embedded.videos import SIZE
    from teacache.sampling.sampler import Loop

    return Loop(pipe, case.start, case.text, SIZE, STEPS, GUIDANCE_SCALE)


if __name__ == "__main__":
    sys.exit(main())
