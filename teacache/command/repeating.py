"""`--from_record`: the arguments of a run on record, and whether what it was made from is there."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from teacache.base.errors import ArgumentError
from teacache.command.readers import coefficients_of, lora
from teacache.results.record import Record

if TYPE_CHECKING:
    from teacache.command.preflight import Ready

SCHEDULES = ("rel_l1_thresh", "computed_steps", "schedule")
# On record by the names of the arguments. What the machine is best at is chosen anew.
BY_NAME = (
    *("image", "prompt", "negative_prompt", "num_infer_steps", "guidance_scale"),
    *("width", "height", "num_frames", "fps", "ckpts_path", "dtype", "vae_tiling", "attention"),
    *("compile", "quantize", "retain_first", "retain_last", "max_reuse", "scheduler"),
)


def arguments_of(record: Record, parsed: argparse.Namespace) -> dict[str, Any]:
    """The arguments that make a record's video again, to be the defaults of others.

    Args:
        parsed: the arguments without them: another way to choose the steps overrules the record's.
    """
    settings = record.settings
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in BY_NAME}
    arguments["seed"] = [settings.seed]
    arguments["lora"] = [lora(each) for each in settings.lora]
    arguments["coefficients"] = coefficients_of(settings.coefficients)
    if not any(getattr(parsed, name) for name in SCHEDULES):
        arguments["reuse"] = settings.reuse
        if settings.rel_l1_thresh is not None:
            arguments["rel_l1_thresh"] = [settings.rel_l1_thresh]
        elif settings.schedule == f"{settings.reuse} {len(record.computed_steps)}":
            arguments["computed_steps"] = [len(record.computed_steps)]
        else:
            arguments["schedule"] = [tuple(record.computed_steps)]
    return arguments


def check_repeated(record: Record, ready: Ready, ckpts_path: str) -> None:
    """See that a run has the image and the checkpoint of the record that it repeats.

    Raises:
        ArgumentError: where one of the same name is another.
    """
    settings = record.settings
    digest = ready.digests.get(settings.image)
    if digest not in (None, settings.image_sha256):
        raise ArgumentError(
            f"--from_record: {settings.image} is another picture than on record. To sample with "
            "another, name a copy of it with --image"
        )
    known = settings.checkpoint_sha256
    if ckpts_path == settings.ckpts_path and known not in (None, ready.checkpoint_sha256):
        raise ArgumentError(
            f"--from_record: the checkpoint {ckpts_path} is another than on record. To sample "
            "with another, name its folder another way with --ckpts_path"
        )
