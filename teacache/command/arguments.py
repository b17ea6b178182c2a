"""The command's arguments: their names, defaults and help, and what each of them refuses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from teacache.base.errors import one_line, without_credentials
from teacache.command import readers
from teacache.core.rule import COGVIDEOX_5B

DEFAULT_CHECKPOINT = "BestWishYsh/ConsisID-preview"
DEFAULT_THRESHOLD = 0.1
DEFAULT_FPS = 8
PLANNED_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
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
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.target_speedup and args.rel_l1_thresh:
        parser.error("argument --target_speedup: not allowed with argument --rel_l1_thresh")
    alone = ("plan", "jobs", "resume", "baseline", "rel_l1_thresh", "schedule", "target_speedup")
    for other in alone:
        if args.latents and getattr(args, other):
            parser.error(f"argument --{other}: not allowed with argument --latents")
    _check_schedules(parser, args)
    if args.rel_l1_thresh is None:
        if args.plan:
            args.rel_l1_thresh = list(PLANNED_THRESHOLDS)
        else:
            args.rel_l1_thresh = [] if args.schedule else [DEFAULT_THRESHOLD]
    if not args.latents:
        args.ckpts_path = args.ckpts_path or DEFAULT_CHECKPOINT
        args.fps = args.fps or DEFAULT_FPS
    choose_inputs(args)
    return args


def choose_inputs(args: argparse.Namespace) -> None:
    """Fill in the image and the prompt that the checkpoint has for a default."""
    tiny = args.ckpts_path == "tiny"
    args.image = args.image or ("astronaut" if tiny else DEFAULT_IMAGE)
    args.prompt = args.prompt or (TINY_PROMPT if tiny else DEFAULT_PROMPT)


def _check_schedules(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit where --schedule lacks a number of computed steps, or a number has no use."""
    counted = [kind for kind in args.schedule or () if isinstance(kind, str)]
    if counted and not (args.computed_steps or args.target_speedup):
        parser.error(
            f"argument --schedule {counted[0]}: how many steps to compute is said by "
            "--computed_steps or --target_speedup"
        )
    if args.computed_steps and not counted:
        parser.error("argument --computed_steps: needs --schedule even or calibrated")
    if args.computed_steps and args.target_speedup:
        parser.error("argument --target_speedup: not allowed with argument --computed_steps")
    if args.calibration and "calibrated" not in counted:
        parser.error("argument --calibration: needs --schedule calibrated")


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
    _add_published(parser.add_argument_group("as published"))
    video = parser.add_argument_group("the video")
    add_video(video)
    video.add_argument(
        "--fps",
        type=readers.fps,
        metavar="N",
        help=f"frames a second (default: {DEFAULT_FPS})",
    )
    _add_schedules(parser.add_argument_group("which steps are computed"))
    machine = parser.add_argument_group("the machine")
    _add_machine(machine)
    _add_acceleration(machine)
    _add_sweep(parser.add_argument_group("several videos, and what to expect of one"))
    return parser


def _add_published(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rel_l1_thresh",
        type=readers.not_negative,
        nargs="+",
        metavar="X",
        help="threshold on the accumulated distance; 0 is the original sampler, higher is faster; "
        f"several make a sweep (default: {DEFAULT_THRESHOLD})",
    )
    add_inputs(group)
    add_output_path(group, "the results, {seed}_{rel_l1_thresh}_{index:04d}.mp4 and .json")


def add_inputs(group: argparse._ActionsContainer) -> None:
    """What a video is sampled from, of every command that samples one."""
    add = group.add_argument
    add(
        "--ckpts_path",
        type=readers.name,
        metavar="PATH",
        help="checkpoint folder; or a Hugging Face repository, downloaded into a folder of its "
        "name; or tiny, a small trained checkpoint for machines without a GPU "
        f"(default: {DEFAULT_CHECKPOINT})",
    )
    add(
        "--image",
        type=readers.image,
        metavar="IMAGE",
        help="URL or path of the face image, or astronaut, scikit-image's photograph "
        "(default: the boy of the ConsisID examples; with --ckpts_path tiny the astronaut)",
    )
    add(
        "--prompt",
        type=readers.prompt,
        metavar="TEXT",
        help="what the video shows (default: the published one, a boy in a city street; with "
        "--ckpts_path tiny a face that comes closer)",
    )
    add(
        "--seed",
        type=readers.seed,
        nargs="+",
        default=[42],
        metavar="N",
        help="seed of everything random; several make a sweep (default: 42)",
    )
    add(
        "--num_infer_steps",
        type=readers.positive,
        default=50,
        metavar="N",
        help="denoising steps (default: %(default)s)",
    )


def add_video(group: argparse._ActionsContainer) -> None:
    """The form of a video's latents, of every command that samples one."""
    add = group.add_argument
    add(
        "--negative_prompt",
        type=readers.text,
        default="",
        metavar="TEXT",
        help="what the video should not show (default: empty)",
    )
    add(
        "--guidance_scale",
        type=readers.not_negative,
        default=6.0,
        metavar="X",
        help="classifier-free guidance; 1 samples without it, in half the time "
        "(default: %(default)s)",
    )
    for name, what in (
        ("--num_frames", "frames"),
        ("--height", "height in pixels"),
        ("--width", "width in pixels"),
    ):
        add(
            name,
            type=readers.positive,
            metavar="N",
            help=f"{what} (default: what the checkpoint was trained at)",
        )


def add_device(group: argparse._ActionsContainer) -> None:
    """`--device` and `--dtype`, of every command that computes."""
    add = group.add_argument
    add(
        "--device",
        type=readers.device,
        default="auto",
        metavar="DEVICE",
        help="auto (CUDA where there is one, else the CPU), cuda, cuda:N or cpu (default: auto)",
    )
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="auto is bfloat16 on CUDA and float32 on a CPU (default: auto)",
    )


def add_output_path(group: argparse._ActionsContainer, what: str) -> None:
    """`--output_path`.

    Args:
        what: the files that come there.
    """
    group.add_argument(
        "--output_path",
        type=readers.path,
        default=Path("./teacache_results"),
        metavar="DIR",
        help=f"folder of {what} (default: %(default)s)",
    )


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add_device(group)
    add_offload(group)
    add(
        "--vae_tiling",
        action="store_true",
        help="run the VAE in tiles: less memory, not bit for bit",
    )
    add(
        "--quiet",
        action="store_true",
        help="print nothing on standard output but the videos' paths",
    )


def add_offload(group: argparse._ActionsContainer) -> None:
    """`--offload`."""
    group.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="keep weights in host memory and bring them to the GPU model by model, or layer by "
        "layer: less GPU memory, more time (default: %(default)s)",
    )


def add_attention(group: argparse._ActionsContainer) -> None:
    """`--attention`."""
    group.add_argument(
        "--attention",
        default="auto",
        metavar="BACKEND",
        help="attention of diffusers' dispatcher: native, cudnn, flash, flash3, sage (not exact) "
        "and others; auto, the default, is cudnn on GPUs from Hopper on, else native",
    )


def add_jobs(group: argparse._ActionsContainer) -> None:
    """`--jobs`."""
    group.add_argument(
        "--jobs",
        type=readers.path,
        metavar="FILE",
        help="a video for each line of a CSV file or of JSON lines, with any of image, prompt, "
        "negative_prompt, seed, rel_l1_thresh, num_infer_steps; the rest as on the command line",
    )


def _add_schedules(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--schedule",
        type=readers.schedule,
        nargs="+",
        metavar="KIND",
        help="instead of a threshold, or beside some: even (spread evenly, and the last three), "
        "calibrated (the best by a calibration, see python3 -m teacache.calibrate), or a JSON file "
        "that lists steps; several make a sweep",
    )
    add(
        "--computed_steps",
        type=readers.positive,
        nargs="+",
        metavar="N",
        help="how many steps --schedule even and calibrated compute; several make a sweep",
    )
    add(
        "--calibration",
        type=readers.file,
        metavar="FILE",
        help="for --schedule calibrated (default: the one in the checkpoint folder, or in the "
        "cache folder)",
    )
    add(
        "--coefficients",
        type=readers.coefficients,
        default=COGVIDEOX_5B,
        metavar="FILE",
        help="JSON with other coefficients of the rescaling polynomial: values, highest power "
        "first, and fitted_range; or a calibration or record that has them "
        f"(default: {COGVIDEOX_5B.source})",
    )
    for name, default, what in (
        ("--retain_first", 1, "compute the first N steps, whatever the threshold"),
        ("--retain_last", 1, "compute the last N steps, whose errors no later step corrects"),
        ("--max_reuse", None, "reuse no more than N steps in a row"),
    ):
        add(
            name,
            type=readers.positive,
            default=default,
            metavar="N",
            help=f"{what} (default: {default or 'any number'})",
        )


def _add_acceleration(group: argparse._ArgumentGroup) -> None:
    add_attention(group)
    add = group.add_argument
    add(
        "--compile",
        action="store_true",
        help="compile the transformer's layers, and from 8 videos on the decoder's: some minutes "
        "the first time, seconds later; not bit for bit",
    )
    add(
        "--quantize",
        choices=("fp8",),
        help="fp8: float8 linear layers, on GPUs from Hopper on; not exact; needs torchao",
    )
    add(
        "--no_reuse_conditioning",
        dest="reuse_conditioning",
        action="store_false",
        help="compute the embeddings of face and prompt anew, not from the cache folder",
    )


def _add_sweep(group: argparse._ArgumentGroup) -> None:
    add_jobs(group)
    add = group.add_argument
    add(
        "--resume",
        action="store_true",
        help="skip the videos whose records in --output_path have the same settings",
    )
    add(
        "--latents",
        type=readers.file,
        metavar="FILE",
        help="make the video of latents that a run has kept when it failed or was ended before "
        "there was one; --ckpts_path and --fps default to that run's",
    )
    add(
        "--baseline",
        type=readers.file,
        metavar="VIDEO",
        help="an earlier video to compare with, where a sweep has none of threshold 0",
    )
    add(
        "--plan",
        action="store_true",
        help="print which steps would be computed, and exit; thresholds "
        f"{' '.join(map(str, PLANNED_THRESHOLDS))} unless others are given",
    )
    add(
        "--target_speedup",
        type=readers.speedup,
        metavar="X",
        help="instead of --rel_l1_thresh or --computed_steps: the smallest threshold, or the most "
        "steps, with which the denoising loop is planned to be X times as fast",
    )
