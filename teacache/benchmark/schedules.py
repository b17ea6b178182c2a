"""Schedules against each other, at the same number of computed steps, on the embedded checkpoint.

`python3 -m teacache.benchmark.schedules` samples videos of faces that nothing was trained on, and
measures how near each schedule's latents come to those of every step computed. What is calibrated
is calibrated on other videos, of the training's faces.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from teacache.base.environment import check_environment
from teacache.base.interruption import run_command
from teacache.base.quiet import silence_libraries
from teacache.command import readers
from teacache.command.arguments import OneLineParser
from teacache.comparison.tables import aligned
from teacache.core.calibrated import best_steps, even_steps
from teacache.core.rule import Limits, schedule

if TYPE_CHECKING:
    import torch
    from diffusers import ConsisIDPipeline

    from teacache.calibrate.measure import Run
    from teacache.embedded.portraits import Picture
    from teacache.inputs.identity import FaceModels
    from teacache.inputs.text import Text
    from teacache.sampling.sampler import Start

STEPS, GUIDANCE_SCALE = 50, 6.0
COMPUTED = (30, 22, 16, 12)
CALIBRATED_SEED, HELD_OUT_SEED = 7, 100
SCHEDULERS = ("CogVideoXDPMScheduler", "CogVideoXDDIMScheduler")
PUBLISHED = "published rule"

Distances = tuple[float | None, ...]
Rule = Callable[[int], tuple[int, ...] | None]


class Case(NamedTuple):
    """A video to sample."""

    start: Start
    text: Text


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
    add("--videos", type=readers.positive, default=16, metavar="N", help="(default: %(default)s)")
    add(
        "--calibrated_on",
        type=readers.positive,
        default=4,
        metavar="N",
        help="videos, others than those (default: %(default)s)",
    )
    return parser.parse_args(argv)


def compare(scheduler: str, videos: int, calibrated_on: int) -> None:
    """Print the table, and what it grows from."""
    check_environment()
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
    runs = list(_calibrated(pipe, models, calibrated_on))
    rules = _rules(distances, runs)
    chosen = {
        (name, computed): steps
        for name, rule in rules.items()
        for computed in COMPUTED
        if (steps := rule(computed)) is not None
    }
    for (name, computed), steps in chosen.items():
        print(f"{name}, {computed}: {' '.join(map(str, steps))}", flush=True)
    found: dict[tuple[str, int], list[float]] = {key: [] for key in chosen}
    for number, case in enumerate(_held_out(pipe, models, videos)):
        full = _latents(pipe, case, tuple(range(STEPS)))
        for key in found:
            found[key].append(psnr(_latents(pipe, case, chosen[key]), full))
        print(f"video {number + 1} of {videos}", file=sys.stderr, flush=True)
    print(
        f"\n{scheduler}, {videos} videos; PSNR of the latents in dB: mean, worst; and against the"
    )
    print(f"{PUBLISHED} the mean difference with its standard error\n")
    print(table(found, list(rules)))


def psnr(latents: torch.Tensor, full: torch.Tensor) -> float:
    """In dB, against the range of `full`."""
    error = (latents - full).square().mean().sqrt()
    return 20 * float(((full.max() - full.min()) / error).log10())


def table(found: dict[tuple[str, int], list[float]], names: list[str]) -> str:
    """A line for each rule, a column for each number of computed steps."""
    lines = [["", *map(str, COMPUTED)]]
    for name in names:
        cells = []
        for computed in COMPUTED:
            own, other = found.get((name, computed)), found.get((PUBLISHED, computed))
            if own is None or other is None:
                cells.append("-")
                continue
            gain = np.array(own) - np.array(other)
            error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.nan
            difference = "" if name == PUBLISHED else f" {gain.mean():+.1f} +- {error:.1f}"
            cells.append(f"{np.mean(own):.1f}, {min(own):.1f}{difference}")
        lines.append([name, *cells])
    return aligned(lines)


def _rules(distances: Distances, runs: list[tuple[Run, torch.Tensor]]) -> dict[str, Rule]:
    """Each rule by its name: number of computed steps -> the steps, None where it has none."""
    from teacache.calibrate.measure import costs_of

    costs = costs_of(runs)
    magnitudes = np.mean([run.magnitudes for run, _ in runs], axis=0)
    rules: dict[str, Rule] = {PUBLISHED: partial(_at_threshold, distances, 1)}
    for last in (2, 3, 4):
        rules[f"published, --retain_last {last}"] = partial(_at_threshold, distances, last)
    for last in (1, 2, 3):
        rules[f"even, last {last}"] = partial(even_steps, STEPS, retain_last=last)
    rules["MagCache"] = partial(_mag_cache, magnitudes, retention=0.2, most=3)
    rules["MagCache, no retention"] = partial(_mag_cache, magnitudes, retention=0.02, most=STEPS)
    rules["calibrated"] = partial(best_steps, costs)
    return rules


def _at_threshold(distances: Distances, last: int, computed: int) -> tuple[int, ...] | None:
    """The published rule's schedule of so many steps, where a threshold has one."""
    for threshold in np.arange(0, 3, 0.001):
        limits = Limits(retain_last=last)
        found = schedule(distances, float(threshold), limits=limits).computed_steps
        if len(found) <= computed:
            return found if len(found) == computed else None
    return None


def _mag_cache(
    magnitudes: np.ndarray, computed: int, *, retention: float, most: int
) -> tuple[int, ...] | None:
    """MagCache's rule, as diffusers 0.42.1 has it in hooks/mag_cache.py, at a threshold that gives
    so many steps; arXiv:2506.09045.

    Args:
        magnitudes: [steps], of the residuals; NaN for the last.
        retention: the share of the first steps that are computed.
        most: steps reused in a row.
    """
    ratios = np.append(1.0, magnitudes[1:] / magnitudes[:-1])

    def at(threshold: float) -> tuple[int, ...]:
        steps, ratio, error, reused = [], 1.0, 0.0, 0
        for step in range(STEPS):
            if step >= int(retention * STEPS + 0.5):
                ratio *= ratios[step]
                error += abs(1 - ratio)
                reused += 1
                if error <= threshold and reused <= most and step < STEPS - 1:
                    continue
            steps.append(step)
            ratio, error, reused = 1.0, 0.0, 0
        return tuple(steps)

    for threshold in np.geomspace(1e-4, 10, 2000):
        found = at(threshold)
        if len(found) <= computed:
            return found if len(found) == computed else None
    return None


def _calibrated(
    pipe: ConsisIDPipeline, models: FaceModels, videos: int
) -> Iterator[tuple[Run, torch.Tensor]]:
    """What reuse costs on videos of faces that the checkpoint was trained on."""
    import torch

    from teacache.calibrate.measure import error_left, full_run
    from teacache.core.forward import apply_teacache
    from teacache.embedded import clips, portraits
    from teacache.sampling.sampler import Loop

    rng = np.random.default_rng(CALIBRATED_SEED)
    for number in range(videos):
        portrait = portraits.training_portrait(rng)
        prompt = clips.prompt_of(clips.random_scene(rng), rng)
        case = _case(pipe, models, portrait, prompt, CALIBRATED_SEED + number)
        loop = Loop(pipe, case.start, case.text, _size(), STEPS, GUIDANCE_SCALE)
        with apply_teacache(pipe) as handle:
            run = full_run(handle, loop, STEPS, lambda: None)
            left = [torch.zeros_like(run.final)] * STEPS
            for step in range(1, STEPS - 1):
                left[step] = error_left(handle, loop, run, step, lambda: None)
        print(f"calibrated on {number + 1} of {videos}: {prompt}", file=sys.stderr, flush=True)
        yield run, torch.stack(left).flatten(1)


def _held_out(pipe: ConsisIDPipeline, models: FaceModels, videos: int) -> Iterator[Case]:
    from teacache.embedded import clips, portraits

    rng = np.random.default_rng(HELD_OUT_SEED)
    pictures = [picture for _, picture in portraits.held_out_portraits()]
    for number in range(videos):
        prompt = clips.prompt_of(clips.random_scene(rng), rng)
        picture = pictures[-1 - number % len(pictures)]
        yield _case(pipe, models, picture, prompt, HELD_OUT_SEED + number)


def _case(
    pipe: ConsisIDPipeline, models: FaceModels, portrait: Picture, prompt: str, seed: int
) -> Case:
    from teacache.embedded.material import identity_of
    from teacache.inputs.text import Text, embed_text
    from teacache.sampling import sampler

    start = sampler.prepare(pipe, identity_of(portrait, models), _size(), seed)
    return Case(start, Text(*(embed_text(pipe, text).embeds for text in (prompt, ""))))


def _latents(pipe: ConsisIDPipeline, case: Case, steps: tuple[int, ...]) -> torch.Tensor:
    from teacache.core.forward import apply_teacache
    from teacache.sampling import sampler

    with apply_teacache(pipe, schedule=steps):
        return sampler.denoise(
            pipe,
            case.start,
            case.text,
            _size(),
            num_infer_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
        ).latents


def _size():  # type: ignore[no-untyped-def]
    from teacache.checkpoint.size import VideoSize
    from teacache.embedded import clips

    return VideoSize(clips.WIDTH, clips.HEIGHT, clips.FRAMES)


if __name__ == "__main__":
    sys.exit(main())
