"""The command's flags, a row each. The parser, `--help` and the README's table come from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from teacache.command import readers as read
from teacache.core.rule import COGVIDEOX_5B, REUSES

DEFAULT_THRESHOLD = 0.1
PLANNED_THRESHOLDS = (0, 0.1, 0.15, 0.2)
PLANNED_STEPS = (22, 16, 12, 10, 8)


class Flag:
    """A row of the table.

    Args:
        spelling: its name and what stands for its value, with dots where several may follow.
        meaning: in Markdown.
        default: its value; a default that depends on other flags is None, and filled in later.
        shown: the default in words, where the value does not say it.
        reading: what else `argparse` is told: `type`, `choices` and so on.
    """

    def __init__(
        self, spelling: str, meaning: str, default: Any = None, shown: str = "", **reading: Any
    ):
        self.spelling, self.meaning, self.reading = spelling, meaning, reading
        self.name, _, value = spelling.partition(" ")
        self.is_switch = "action" in reading and not value
        if value:
            reading["metavar"] = value.removesuffix(" ...")
            reading["nargs"] = "+" if value.endswith("...") else reading.get("nargs")
        self.default = False if self.is_switch else default
        self.shown = shown or ("off" if self.is_switch else str(default or "none"))

    def add_to(self, group: argparse._ActionsContainer, meaning: str = "") -> None:
        """Add it to a parser.

        Args:
            meaning: of the flag in another command than the sampler's.
        """
        text = meaning or self.meaning
        if not self.is_switch:
            text += f" (default: {self.shown})"
        text = text.replace("`", "")
        group.add_argument(f"--{self.name}", default=self.default, help=text, **self.reading)

    def words(self, value: Any) -> list[str]:
        """The flag with a value, as one types it."""
        if self.is_switch:
            return [f"--{self.name}"]
        values = [str(each) for each in (value if isinstance(value, list) else [value])]
        if self.reading.get("action") == "append" or values[0].startswith("-"):
            return [f"--{self.name}={value}" for value in values]
        return [f"--{self.name}", *values]

    def row(self) -> str:
        """Its line of the README's table."""
        return f"| `--{self.spelling}` | {self.shown} | {self.meaning} |"


PUBLISHED = (
    Flag(
        "rel_l1_thresh X ...",
        "threshold on the accumulated distance; 0 is the original sampler, higher is faster; "
        "several make a sweep",
        shown=str(DEFAULT_THRESHOLD),
        type=read.not_negative,
    ),
    Flag(
        "ckpts_path PATH",
        "checkpoint folder; or a Hugging Face repository, downloaded into a folder of its name; "
        "or `tiny`, a small trained checkpoint for machines without a GPU",
        "BestWishYsh/ConsisID-preview",
        type=read.name,
    ),
    Flag(
        "image IMAGE",
        "URL or path of the face image, or `astronaut`, scikit-image's photograph",
        shown="the boy of the ConsisID examples; with `tiny` the astronaut",
        type=read.image,
    ),
    Flag(
        "prompt TEXT",
        "what the video shows",
        shown="the published one, a boy in a city street; with `tiny` a face that comes closer",
        type=read.prompt,
    ),
    Flag(
        "seed N ...",
        "seed of everything random, or `random`: one is drawn, printed and recorded; several make "
        "a sweep",
        [42],
        "42",
        type=read.seed_or_random,
    ),
    Flag("num_infer_steps N", "denoising steps", 50, type=read.positive),
    Flag(
        "output_path DIR",
        "folder of the results, `{seed}_{rel_l1_thresh}_{index:04d}.mp4` and `.json`",
        Path("teacache_results"),
        "./teacache_results",
        type=read.path,
    ),
)
VIDEO = (
    Flag("negative_prompt TEXT", "what the video should not show", "", "empty", type=read.text),
    Flag(
        "guidance_scale X",
        "classifier-free guidance; 1 samples without it, in half the time",
        6.0,
        type=read.not_negative,
    ),
    Flag(
        "num_frames N",
        "frames; another number than the checkpoint was trained with is warned of",
        shown="the checkpoint's own, 49 as published",
        type=read.positive,
    ),
    Flag("height N", "height in pixels", shown="the checkpoint's own, 480", type=read.positive),
    Flag("width N", "width in pixels", shown="the checkpoint's own, 720", type=read.positive),
    Flag(
        "lora LORA[:SCALE]",
        "a LoRA of the transformer as diffusers saves it, by file, folder or Hugging Face "
        "repository, and how much of it; may be given several times; needs "
        "`pip install peft==0.21.2`",
        [],
        action="append",
        type=read.lora,
    ),
    Flag(
        "scheduler",
        "`dpm` (`CogVideoXDPMScheduler`, draws noise at each step) or `ddim` "
        "(`CogVideoXDDIMScheduler`, draws none)",
        shown="the checkpoint's",
        choices=("dpm", "ddim"),
    ),
)
STEPS = (
    Flag(
        "computed_steps N ...",
        "instead of a threshold, or beside some: compute N steps and reuse the others by the "
        "forecast; several make a sweep",
        type=read.positive,
    ),
    Flag(
        "reuse",
        "what a reused step takes: the `residual` of the last computed step, as published, or a "
        "`forecast` of the clean latents from the last two",
        shown="residual with a threshold or listed steps, forecast with `--computed_steps`",
        choices=REUSES,
    ),
    Flag(
        "schedule FILE ...",
        "instead of a threshold, or beside some: compute the steps that a JSON file lists, or a "
        "video's record; several make a sweep",
        type=read.schedule,
    ),
    Flag(
        "coefficients FILE",
        "JSON with other coefficients of the rescaling polynomial, highest power first: "
        '`{"values": [a, b, c, d, e], "fitted_range": [low, high], "source": "..."}`, as '
        "`python3 -m teacache.fit` writes it; or a record that has them",
        COGVIDEOX_5B,
        COGVIDEOX_5B.source,
        type=read.coefficients,
    ),
    Flag(
        "retain_first N", "compute the first N steps, whatever the threshold", 1, type=read.positive
    ),
    Flag(
        "retain_last N",
        "compute the last N steps, whose errors no later step corrects",
        1,
        type=read.positive,
    ),
    Flag(
        "max_reuse N", "reuse no more than N steps in a row", shown="any number", type=read.positive
    ),
)
MACHINE = (
    Flag(
        "device DEVICE",
        "`auto` (CUDA where there is one, else the CPU), `cuda`, `cuda:N` or `cpu`",
        "auto",
        type=read.device,
    ),
    Flag(
        "dtype",
        "`auto` (bfloat16 on CUDA, float32 on a CPU), `bfloat16`, `float16` or `float32`",
        "auto",
        choices=("auto", "bfloat16", "float16", "float32"),
    ),
    Flag(
        "num_gpus N",
        "compute each video on N GPUs of this machine: 2, 4 or 8 at published settings; with "
        "`--device cpu` on N processes",
        1,
        type=read.positive,
    ),
    Flag(
        "offload",
        "keep weights in host memory until their turn, for less GPU memory: `blocks` (the "
        "transformer's, one ahead of the computation), `model` (whole models), `sequential` "
        "(layer by layer, slow); `none` keeps them on the GPU; `auto` is the first that fits of "
        "`none`, `blocks`, `sequential`",
        "auto",
        choices=("auto", "none", "blocks", "model", "sequential"),
    ),
    Flag(
        "vae_tiling",
        "run the VAE in tiles: less memory, not bit for bit; `auto` where the whole does not fit "
        "on the GPU; without a value `on`",
        "auto",
        nargs="?",
        const="on",
        choices=("auto", "on", "off"),
    ),
    Flag(
        "attention BACKEND",
        "a backend of diffusers' attention dispatcher, as far as it is installed: `native` "
        "(torch's own choice), `cudnn`, `flash`, `flash3`, `sage` (not exact) and others",
        "native",
    ),
    Flag(
        "compile",
        "compile the transformer's layers, and from 8 videos on the decoder's: minutes the first "
        "time, seconds later; not bit for bit",
        action="store_true",
    ),
    Flag(
        "quantize",
        "`fp8`: float8 linear layers, on GPUs from Hopper on; not exact; needs "
        "`pip install torchao==0.18.0`",
        choices=("fp8",),
    ),
    Flag("quiet", "print nothing on standard output but the videos' paths", action="store_true"),
)
SEVERAL = (
    Flag(
        "jobs FILE",
        "a video for each line of a CSV file or of JSON lines, with any of `image`, `prompt`, "
        "`negative_prompt`, `seed`, `num_infer_steps`, and `rel_l1_thresh` or `computed_steps`; "
        "the rest as on the command line",
        type=read.path,
    ),
    Flag(
        "resume",
        "go on after a run that was ended: skip videos whose records in `--output_path` have the "
        "same settings, and videos that another process with `--resume` is sampling; decode "
        "latents that were kept",
        action="store_true",
    ),
)
ALONE = (
    Flag(
        "shard I/N",
        "sample part I of N, counted from 0, of the videos that `--jobs` or a sweep asks for; the "
        "part that ends last reports on all",
        type=read.shard,
    ),
    Flag(
        "plan",
        "print which steps would be computed, and exit; unless others are named, at thresholds "
        f"{' '.join(map(str, PLANNED_THRESHOLDS))} and at {' '.join(map(str, PLANNED_STEPS))} "
        "computed steps",
        action="store_true",
    ),
)

OWN_GROUP = "a shard, or a plan"  # which other commands that sample videos have not
GROUPS: dict[str, tuple[Flag, ...]] = {
    "as published": PUBLISHED,
    "the video": VIDEO,
    "which steps are computed": STEPS,
    "the machine": MACHINE,
    "several videos": SEVERAL,
    OWN_GROUP: ALONE,
}
FLAGS = {flag.name: flag for group in GROUPS.values() for flag in group}


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add some of the flags to the parser of another command."""
    for name in names:
        FLAGS[name].add_to(parser)


def table() -> str:
    """All flags as the README shows them: a Markdown table for each group."""
    groups = []
    for title, group in GROUPS.items():
        lines = [f"{title[0].upper()}{title[1:]}:", ""]
        lines += ["| argument | default | meaning |", "| --- | --- | --- |"]
        groups.append("\n".join([*lines, *(flag.row() for flag in group)]))
    return "\n\n".join(groups)
