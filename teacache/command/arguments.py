"""The command line of the sampler: its parser, and what its arguments mean together."""

from __future__ import annotations

import argparse
import secrets
from typing import NoReturn

from teacache.base.errors import one_line, without_credentials
from teacache.command import flags, readers
from teacache.command.repeating import arguments_of

DEFAULT_IMAGE = (
    "https://github.com/PKU-YuanGroup/ConsisID/blob/main/asserts/example_images/2.png?raw=true"
)
DEFAULT_PROMPT = (
    "The video captures a boy walking along a city street, filmed in black and white on a classic "
    "35mm camera. His expression is thoughtful, his brow slightly furrowed as if he's lost in "
    "contemplation. The film grain adds a textured, timeless quality to the image, evoking a sense "
    "of nostalgia. Around him, the cityscape is filled with vintage buildings, cobblestone "
    "sidewalks, and softly blurred figures passing by, their outlines faint and indistinct. "
    "Streetlights cast a gentle glow, while shadows play across the boy's path, adding depth to "
    "the scene. The lighting highlights the boy's subtle smile, hinting at a fleeting moment of "
    "curiosity. The overall cinematic atmosphere, complete with classic film still aesthetics and "
    "dramatic contrasts, gives the scene an evocative and introspective feel."
)
TINY_PROMPT = "An astronaut comes closer in front of a blue background in bright light."


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exit with 2 and one line where an argument is wrong.

    Fills in defaults that depend on other arguments. With `--latents`, `ckpts_path` and `fps` may
    be None: use the record's.
    """
    return parse_with(build_parser(), argv)


def parse_with(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The same with the parser of another command that samples videos, see `add_sampling`."""
    args = parser.parse_args(argv)
    if getattr(args, "from_record", None):
        parser.set_defaults(**arguments_of(args.from_record, args))
        args = parser.parse_args(argv)
    args.drawn = "random" in args.seed
    if args.drawn and getattr(args, "shard", None):
        parser.error("argument --seed: random would be another seed in each --shard")
    args.seed = [secrets.randbelow(2**32) if seed == "random" else seed for seed in args.seed]
    for other in (
        "plan",
        "jobs",
        "resume",
        "shard",
        "baseline",
        "rel_l1_thresh",
        "schedule",
        "computed_steps",
    ):
        if args.latents and getattr(args, other):
            parser.error(f"argument --{other}: not allowed with argument --latents")
    if args.latents and args.num_gpus > 1:
        parser.error("argument --num_gpus: not allowed with argument --latents")
    if args.rel_l1_thresh is None:
        if args.schedule or args.computed_steps:
            args.rel_l1_thresh = []
        elif args.plan:
            args.rel_l1_thresh = list(flags.PLANNED_THRESHOLDS)
            args.computed_steps = [n for n in flags.PLANNED_STEPS if n < args.num_infer_steps]
        else:
            args.rel_l1_thresh = [flags.DEFAULT_THRESHOLD]
    if not args.latents:
        args.ckpts_path = args.ckpts_path or flags.DEFAULT_CHECKPOINT
        args.fps = args.fps or flags.DEFAULT_FPS
    choose_inputs(args)
    return args


def choose_inputs(args: argparse.Namespace) -> None:
    """Fill in the image and the prompt that the checkpoint has for a default."""
    tiny = args.ckpts_path == "tiny"
    args.image = args.image or ("astronaut" if tiny else DEFAULT_IMAGE)
    args.prompt = args.prompt or (TINY_PROMPT if tiny else DEFAULT_PROMPT)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a line each."""

    def error(self, message: str) -> NoReturn:
        """One line: the usage, thirty lines of it, is what --help is for."""
        self.exit(2, f"error: {one_line(without_credentials(message))} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser, published arguments first."""
    parser = OneLineParser(
        prog="teacache_sample_video.py",
        description="Sample an identity-preserving video with ConsisID and TeaCache.",
        allow_abbrev=False,
    )
    several = add_sampling(parser, "several videos, and what to expect of one")
    flags.add_command(several)
    return parser


def add_sampling(parser: argparse.ArgumentParser, several: str) -> argparse._ActionsContainer:
    """Every argument of a command that samples videos.

    Args:
        several: title of the group of arguments for several videos.

    Returns:
        that group, for what else belongs to it.
    """
    flags.add_published(parser.add_argument_group("as published"))
    video = parser.add_argument_group("the video")
    flags.add_video(video)
    video.add_argument(
        "--fps",
        type=readers.fps,
        metavar="N",
        help=f"frames a second (default: {flags.DEFAULT_FPS})",
    )
    flags.add_schedules(parser.add_argument_group("which steps are computed"))
    machine = parser.add_argument_group("the machine")
    flags.add_machine(machine)
    flags.add_acceleration(machine)
    group = parser.add_argument_group(several)
    flags.add_sweep(group)
    return group
