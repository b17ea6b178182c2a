"""What the user asks for, as frozen values: here the command's arguments end."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from teacache.command.jobs import CHOICES, FIELDS, Job, read_jobs
from teacache.command.readers import Shard
from teacache.command.shards import part_of
from teacache.core.rule import Coefficients, Limits


@dataclass(frozen=True)
class Format:
    """The form of the videos; what is None is the checkpoint's own."""

    width: int | None
    height: int | None
    num_frames: int | None
    guidance_scale: float


@dataclass(frozen=True)
class Machine:
    """What to compute on and how, by the names of the arguments.

    `teacache.command.card` settles what is `auto`.
    """

    device: str
    num_gpus: int
    dtype: str
    attention: str
    compile: bool
    quantize: str | None
    offload: str
    vae_tiling: str


@dataclass(frozen=True)
class Order:
    """Everything that a run is asked for.

    Attributes:
        jobs: the videos of this run.
        all_jobs: those of all shards together; without `--shard` the same.
        ignored: names of records that do not count as finished videos.
    """

    jobs: tuple[Job, ...]
    all_jobs: tuple[Job, ...]
    shard: Shard | None
    format: Format
    machine: Machine
    coefficients: Coefficients
    limits: Limits
    scheduler: str | None
    ckpts_path: str
    output_path: Path
    resume: bool
    loras: tuple[tuple[str, float], ...]
    ignored: frozenset[str] = frozenset()

    @classmethod
    def of(cls, args: argparse.Namespace) -> Order:
        """What the parsed arguments ask for, see `teacache.command.arguments`.

        Raises:
            ArgumentError: naming the line of `--jobs` and what is wrong with it.
        """
        jobs = _jobs_of(args)
        return cls(
            jobs=tuple(part_of(jobs, args.shard)) if args.shard else jobs,
            all_jobs=jobs,
            shard=args.shard,
            format=Format(**_named(Format, args)),
            machine=Machine(**_named(Machine, args)),
            coefficients=args.coefficients,
            limits=Limits(**_named(Limits, args)),
            scheduler=args.scheduler,
            ckpts_path=args.ckpts_path,
            output_path=args.output_path,
            resume=args.resume,
            loras=tuple(args.lora),
        )


def in_order(jobs: Sequence[Job], digests: dict[str, str]) -> list[Job]:
    """The jobs, same face and seed adjacent; within them same prompt and steps, threshold 0 first.

    The others of a group are compared with threshold 0.

    Args:
        digests: of each image's pixels, by its source.
    """

    def noise(job: Job) -> tuple[object, ...]:
        return digests[job.image], job.seed

    def group(job: Job) -> tuple[object, ...]:
        return *noise(job), job.prompt, job.negative_prompt, job.num_infer_steps

    first: dict[tuple[object, ...], int] = {}  # place of each noise and group; they differ in form
    for place, job in enumerate(jobs):
        first.setdefault(noise(job), place)
        first.setdefault(group(job), place)
    return sorted(
        jobs, key=lambda job: (first[noise(job)], first[group(job)], job.rel_l1_thresh != 0)
    )


def _named(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that have the names of a dataclass's fields."""
    return {field.name: getattr(args, field.name) for field in fields(kind)}


def _jobs_of(args: argparse.Namespace) -> tuple[Job, ...]:
    """Every video asked for: each line of --jobs, each seed, each threshold, each schedule.

    What a line leaves out comes from the command line, where seeds, thresholds and schedules may be
    several. A line that says which steps are computed takes none of those of the command line.
    """
    lines = read_jobs(args.jobs) if args.jobs else [{}]
    every: list[dict[str, Any]] = [
        *({"rel_l1_thresh": threshold} for threshold in args.rel_l1_thresh),
        *({"computed_steps": count} for count in args.computed_steps or ()),
        *({"steps": steps} for steps in args.schedule or ()),
    ]
    jobs = []
    for line in lines:
        values = {
            name: line.get(name, getattr(args, name)) for name in FIELDS if name not in CHOICES
        }
        seeds = [line["seed"]] if "seed" in line else args.seed
        own = [{name: line[name]} for name in CHOICES if name in line]
        for seed, chosen in itertools.product(seeds, own or every):
            reuse = _reuse_of(chosen, args.reuse)
            jobs.append(Job(**{**values, "seed": seed, **chosen, "reuse": reuse}))
    return tuple(dict.fromkeys(jobs))


def _reuse_of(chosen: dict[str, Any], reuse: str | None) -> str:
    """How the steps of a job are reused, which at threshold 0 none is."""
    if chosen.get("rel_l1_thresh") == 0:
        return "residual"
    return reuse or ("forecast" if "computed_steps" in chosen else "residual")
