"""The command's flags, by group: their names, defaults, help, and how each value is read."""

from __future__ import annotations

import argparse
from pathlib import Path

from teacache.command import readers
from teacache.core.rule import COGVIDEOX_5B, REUSES

DEFAULT_CHECKPOINT = "BestWishYsh/ConsisID-preview"
DEFAULT_THRESHOLD = 0.1
DEFAULT_FPS = 8
PLANNED_THRESHOLDS = (0, 0.1, 0.15, 0.2)
PLANNED_STEPS = (22, 16, 12, 10, 8)


def add_published(group: argparse._ActionsContainer) -> None:
    """The published README's arguments."""
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
        type=readers.seed_or_random,
        nargs="+",
        default=[42],
        metavar="N",
        help="seed of everything random, or random: one is drawn, said and recorded; several make "
        "a sweep (default: 42)",
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
    add(
        "--lora",
        type=readers.lora,
        action="append",
        default=[],
        metavar="LORA[:SCALE]",
        help="a LoRA of the transformer as diffusers saves it, by file, folder or Hugging Face "
        "repository, and how much of it (default: 1); may be given several times; needs peft",
    )
    add(
        "--scheduler",
        choices=("dpm", "ddim"),
        help="dpm (CogVideoXDPMScheduler, draws noise at each step) or ddim "
        "(CogVideoXDDIMScheduler, draws none) (default: the checkpoint's)",
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


def add_machine(group: argparse._ActionsContainer) -> None:
    """What the machine is, and what it has to spare."""
    add = group.add_argument
    add_device(group)
    add(
        "--num_gpus",
        type=readers.positive,
        default=1,
        metavar="N",
        help="compute each video on N GPUs of this machine: 2, 4 or 8 at published settings; with "
        "--device cpu on N processes (default: %(default)s)",
    )
    add_offload(group)
    add(
        "--vae_tiling",
        action="store_true",
        default=None,
        help="run the VAE in tiles: less memory, not bit for bit (default: where a GPU has too "
        "little for the whole)",
    )
    add(
        "--no_vae_tiling",
        action="store_false",
        dest="vae_tiling",
        help="never run it in tiles",
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
        choices=("auto", "none", "blocks", "model", "sequential"),
        default="auto",
        help="keep weights in host memory and bring them to the GPU: the transformer's blocks one "
        "ahead of the computation, whole models, or layer by layer, slowly; auto keeps them on "
        "the GPU where they fit, else the first of these that does (default: %(default)s)",
    )


def add_attention(group: argparse._ActionsContainer) -> None:
    """`--attention`."""
    group.add_argument(
        "--attention",
        default="native",
        metavar="BACKEND",
        help="attention of diffusers' dispatcher: native (torch's own choice), cudnn, flash, "
        "flash3, sage (not exact) and others (default: %(default)s)",
    )


def add_jobs(group: argparse._ActionsContainer) -> None:
    """`--jobs`."""
    group.add_argument(
        "--jobs",
        type=readers.path,
        metavar="FILE",
        help="a video for each line of a CSV file or of JSON lines, with any of image, prompt, "
        "negative_prompt, seed, num_infer_steps, and rel_l1_thresh or computed_steps; the rest as "
        "on the command line",
    )


def add_schedules(group: argparse._ActionsContainer) -> None:
    """Which steps are computed, beside a threshold, and how the others are reused."""
    add = group.add_argument
    add(
        "--computed_steps",
        type=readers.positive,
        nargs="+",
        metavar="N",
        help="instead of a threshold, or beside some: compute N steps and reuse the others by the "
        "forecast; several make a sweep",
    )
    add(
        "--reuse",
        choices=REUSES,
        help="what a reused step takes: the residual of the last computed step, as published, or a "
        "forecast of the clean latents from the last two (default: residual with a threshold or "
        "listed steps, forecast with --computed_steps)",
    )
    add(
        "--schedule",
        type=readers.schedule,
        nargs="+",
        metavar="FILE",
        help="instead of a threshold, or beside some: compute the steps that a JSON file lists, or "
        "a video's record; several make a sweep",
    )
    add(
        "--coefficients",
        type=readers.coefficients,
        default=COGVIDEOX_5B,
        metavar="FILE",
        help="JSON with other coefficients of the rescaling polynomial: values, highest power "
        "first, and fitted_range, as python3 -m teacache.fit writes it; or a record that has them "
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


def add_acceleration(group: argparse._ActionsContainer) -> None:
    """What makes a computed step faster."""
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


def add_sweep(group: argparse._ActionsContainer) -> None:
    """Several videos in one run, of every command that samples them."""
    add_jobs(group)
    add = group.add_argument
    add(
        "--resume",
        action="store_true",
        help="skip the videos whose records in --output_path have the same settings, and those "
        "that another process with --resume is at",
    )
    add(
        "--baseline",
        type=readers.file,
        metavar="VIDEO",
        help="an earlier video to compare with, where a sweep has none of threshold 0",
    )


def add_command(group: argparse._ActionsContainer) -> None:
    """What the sampler's command alone has: a part of the videos, a plan, kept latents."""
    add = group.add_argument
    add(
        "--shard",
        type=readers.shard,
        metavar="I/N",
        help="sample part I of N, counted from 0, of the videos that --jobs or a sweep asks for; "
        "the shard that ends last reports on all",
    )
    add(
        "--from_record",
        type=readers.record,
        metavar="FILE",
        help="repeat the run of a record, a video's .json; other arguments overrule it",
    )
    add(
        "--gif",
        action="store_true",
        help="make an animated GIF beside each video",
    )
    add(
        "--plan",
        action="store_true",
        help="print which steps would be computed, and exit; unless others are given, at "
        f"thresholds {' '.join(map(str, PLANNED_THRESHOLDS))} and at "
        f"{' '.join(map(str, PLANNED_STEPS))} computed steps",
    )
    add(
        "--latents",
        type=readers.file,
        metavar="FILE",
        help="make the video of latents that a run has kept when it failed or was ended before "
        "there was one; --ckpts_path and --fps default to that run's",
    )
