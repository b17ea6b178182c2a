"""The command line of the sampler: the parser, and defaults that depend on other arguments."""

import argparse
import secrets
from collections.abc import Iterable
from typing import NoReturn

from teacache.base.errors import one_line, without_credentials
from teacache.request import flags

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


def parse_arguments(
    argv: list[str] | None = None, parser: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """Parse the command line, and fill in defaults that depend on other arguments.

    Exits with code 2 and one line if an argument is wrong. Another command has its own parser, see
    `add_sampling`.
    """
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    args.drawn = "random" in args.seed
    if args.drawn and args.shard:
        parser.error("argument --seed: random would be another seed in each --shard")
    args.seed = [secrets.randbelow(2**32) if seed == "random" else seed for seed in args.seed]
    if args.rel_l1_thresh is None:
        if args.schedule or args.computed_steps:
            args.rel_l1_thresh = []
        elif args.plan and not args.jobs:
            args.rel_l1_thresh = list(flags.PLANNED_THRESHOLDS)
            args.computed_steps = [n for n in flags.PLANNED_STEPS if n < args.num_infer_steps]
        else:
            args.rel_l1_thresh = [flags.DEFAULT_THRESHOLD]
    choose_inputs(args)
    return args


def choose_inputs(args: argparse.Namespace) -> None:
    """Fill in the checkpoint's default image and prompt."""
    tiny = args.ckpts_path == "tiny"
    args.image = args.image or ("astronaut" if tiny else DEFAULT_IMAGE)
    args.prompt = args.prompt or (TINY_PROMPT if tiny else DEFAULT_PROMPT)


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with one line, without the usage of thirty lines."""
        self.exit(2, f"error: {one_line(without_credentials(message))} (see --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the sampler."""
    parser = OneLineParser(
        prog="teacache_sample_video.py",
        description="Sample an identity-preserving video with ConsisID and TeaCache.",
        epilog="careful: --computed_steps 16; draft: --computed_steps 8; as published: "
        "--rel_l1_thresh 0.15",
        allow_abbrev=False,
    )
    add_sampling(parser, flags.GROUPS)
    return parser


def add_sampling(
    parser: argparse.ArgumentParser, titles: Iterable[str] = flags.SHARED
) -> argparse._ActionsContainer:
    """Add groups of arguments, by default those of every command that samples; return the last."""
    for title in titles:
        group = parser.add_argument_group(title)
        for flag in flags.GROUPS[title]:
            flag.add_to(group)
    return group
