"""The request of a run as frozen values, made from the command's arguments."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from teacache.command.jobs import CHOICES, FIELDS, Job, read_jobs
from teacache.command.readers import Shard
from teacache.command.shards import part_of
from teacache.core.rule import PUBLISHED, Coefficients, Limits


@dataclass(frozen=True)
class Format:
    """Size, guidance and encoding of the videos. None is the checkpoint's own size."""

    width: int | None
    height: int | None
    num_frames: int | None
    guidance_scale: float
    quality: float


@dataclass(frozen=True)
class Machine:
    """Device and acceleration, by the names of the arguments.

    `teacache.command.card` replaces `auto`.
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
    """The whole request.

    Attributes:
        jobs: the videos of this run.
        all_jobs: the videos of all shards; without `--shard` the same as `jobs`.
        ignored: file names of records that do not count as finished videos.
    """

    jobs: tuple[Job, ...]
    all_jobs: tuple[Job, ...]
    shard: Shard | None
    format: Format
    machine: Machine
    coefficients: Coefficients
    scheduler: str | None
    ckpts_path: str
    output_path: Path
    resume: bool
    loras: tuple[tuple[str, float], ...]
    ignored: frozenset[str] = frozenset()

    @classmethod
    def of(cls, args: argparse.Namespace) -> Order:
        """The request of parsed arguments, see `teacache.command.arguments`.

        Raises:
            ArgumentError: naming the line of `--jobs` and what is wrong with it.
        """
        jobs = _jobs_of(args)
        return cls(
            jobs=tuple(part_of(jobs, args.shard)) if args.shard else jobs,
            all_jobs=jobs,
            shard=args.shard,
            format=Format(**_fields_of(Format, args)),
            machine=Machine(**_fields_of(Machine, args)),
            coefficients=args.coefficients,
            scheduler=args.scheduler,
            ckpts_path=args.ckpts_path,
            output_path=args.output_path,
            resume=args.resume,
            loras=tuple(args.lora),
        )


def in_order(jobs: Sequence[Job], digests: dict[str, str]) -> list[Job]:
    """Sort jobs by face and seed, then by prompt and steps, with threshold 0 first in its group.

    The other videos of a group are compared with threshold 0.

    Args:
        digests: of each image's pixels, by the image's source.
    """

    def keys(job: Job) -> tuple[tuple[object, ...], ...]:
        """Equal for jobs with the same noise, and for jobs of the same group."""
        noise = digests[job.image], job.seed
        return noise, (*noise, job.prompt, job.negative_prompt, job.num_infer_steps)

    first: dict[tuple[object, ...], int] = {}  # index of the first job with a key
    for index, job in enumerate(jobs):
        for key in keys(job):
            first.setdefault(key, index)
    return sorted(
        jobs, key=lambda job: (*map(first.__getitem__, keys(job)), job.rel_l1_thresh != 0)
    )


def _fields_of(kind: type, args: argparse.Namespace) -> dict[str, Any]:
    """The arguments with the names of a dataclass's fields."""
    return {field.name: getattr(args, field.name) for field in fields(kind)}


def _jobs_of(args: argparse.Namespace) -> tuple[Job, ...]:
    """The product of the lines of --jobs, the seeds, and the thresholds and schedules.

    A field that a line lacks has the command line's value, or several values. A line with a
    threshold or a number of computed steps uses no threshold or schedule of the command line.
    """
    lines = read_jobs(args.jobs) if args.jobs else [{}]
    choices: list[dict[str, Any]] = [
        *({"rel_l1_thresh": threshold} for threshold in args.rel_l1_thresh),
        *({"computed_steps": count} for count in args.computed_steps or ()),
        *({"steps": steps} for steps in args.schedule or ()),
    ]
    jobs = []
    for line in lines:
        values = {
            name: line.get(name, getattr(args, name)) for name in FIELDS if name not in CHOICES
        }
        limits = Limits(**{name: values.pop(name) for name in vars(PUBLISHED)})
        reuse = values.pop("reuse")
        seeds = [line["seed"]] if "seed" in line else args.seed
        own = [{name: line[name]} for name in CHOICES if name in line]
        for seed, choice in itertools.product(seeds, own or choices):
            how = reuse or ("forecast" if "computed_steps" in choice else "residual")
            job = Job(**{**values, "seed": seed, **choice, "reuse": how, "limits": limits})
            if job.rel_l1_thresh == 0:  # no step is reused
                job = replace(job, reuse="residual", limits=PUBLISHED)
            elif job.steps is not None:  # whatever the limits
                job = replace(job, limits=PUBLISHED)
            jobs.append(job)
    return tuple(dict.fromkeys(jobs))
