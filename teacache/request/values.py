"""The request of a run as frozen values, made from the command's arguments."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from teacache.core.rule import COGVIDEOX_5B, PUBLISHED, Coefficients, Limits
from teacache.request.job import Job
from teacache.request.jobs_file import CHOICES, FIELDS, read_jobs
from teacache.request.readers import Shard
from teacache.request.shards import part_of


@dataclass(frozen=True)
class Format:
    """Size, guidance and encoding of the videos. None is the checkpoint's own size."""

    width: int | None
    height: int | None
    num_frames: int | None
    guidance_scale: float
    quality: float

    @property
    def guided(self) -> bool:
        """Whether each step also predicts without the prompt (classifier-free guidance)."""
        return self.guidance_scale > 1


@dataclass(frozen=True)
class Machine:
    """Device and acceleration, by the names of the arguments.

    `teacache.preflight.card` replaces `auto`.
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
class Options:
    """The part of a request that is the same for all its videos."""

    ckpts_path: str
    output_path: Path
    format: Format
    machine: Machine
    scheduler: str | None
    coefficients: Coefficients
    loras: tuple[tuple[str, float], ...]

    def coefficients_for(self, job: Job) -> Coefficients:
        """The coefficients that a video follows; the published ones where none matter."""
        return self.coefficients if job.rel_l1_thresh else COGVIDEOX_5B


@dataclass(frozen=True)
class Request:
    """The whole request. jobs: the videos of this run; all_jobs: those of all shards."""

    options: Options
    jobs: tuple[Job, ...]
    all_jobs: tuple[Job, ...]
    shard: Shard | None
    resume: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        """The request of parsed arguments, see `teacache.request.arguments`.

        Raises:
            ArgumentError: naming the line of `--jobs` and what is wrong with it.
        """
        jobs = _jobs_of(args)
        options = Options(
            ckpts_path=args.ckpts_path,
            output_path=args.output_path,
            format=Format(**_fields_of(Format, args)),
            machine=Machine(**_fields_of(Machine, args)),
            scheduler=args.scheduler,
            coefficients=args.coefficients,
            loras=tuple(args.lora),
        )
        own = tuple(part_of(jobs, args.shard)) if args.shard else jobs
        return cls(options, own, jobs, args.shard, args.resume)


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
