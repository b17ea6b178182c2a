"""The table of the command's flags, for the parser, `--help` and `teacache/command/README.md`."""

import argparse
from pathlib import Path
from typing import Any

from teacache.core.rule import COGVIDEOX_5B, REUSES
from teacache.request import readers as read

DEFAULT_THRESHOLD = 0.1
PLANNED_THRESHOLDS = (0, 0.1, 0.15, 0.2)
PLANNED_STEPS = (22, 16, 12, 10, 8)


class Flag:
    """One flag.

    Args:
        spelling: name and metavar, with dots if it takes several values.
        meaning: help text in Markdown.
        default, shown: its value, None if it depends on other flags; and its description.
        reading: more arguments of `add_argument`: `type`, `choices` and so on.
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
        """Add the flag to a parser, with another meaning if it has one in another command."""
        text = meaning or self.meaning
        if not self.is_switch:
            text += f" (default: {self.shown})"
        text = text.replace("`", "")
        group.add_argument(f"--{self.name}", default=self.default, help=text, **self.reading)

    def words(self, value: Any) -> list[str]:
        """The flag with a value, as words of a command line."""
        if self.is_switch:
            return [f"--{self.name}"]
        values = [str(each) for each in (value if isinstance(value, list) else [value])]
        if self.reading.get("action") == "append" or values[0].startswith("-"):
            return [f"--{self.name}={value}" for value in values]
        return [f"--{self.name}", *values]


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
        "checkpoint folder; or a Hugging Face repository, from the hub's cache or downloaded into "
        "a folder of its name; or `tiny`, a small trained checkpoint for machines without a GPU",
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
        "seed of all random numbers; `random` picks one, prints it and records it; several make a "
        "sweep",
        [42],
        "42",
        type=read.seed_or_random,
    ),
    Flag("num_infer_steps N", "denoising steps", 50, type=read.positive),
    Flag(
        "output_path DIR",
        "output folder, for `{seed}_{rel_l1_thresh}_{index:04d}.mp4` and `.json`",
        Path("teacache_results"),
        "./teacache_results",
        type=read.folder,
    ),
)
VIDEO = (
    Flag(
        "negative_prompt TEXT",
        "what the video should not show",
        "",
        "empty",
        type=read.negative_prompt,
    ),
    Flag(
        "guidance_scale X",
        "scale of classifier-free guidance; 1 is without guidance, in half the time",
        6.0,
        type=read.not_negative,
    ),
    Flag(
        "num_frames N",
        "number of frames; warns if the checkpoint was trained with another number",
        shown="the checkpoint's own, 49 as published",
        type=read.positive,
    ),
    Flag("height N", "height in pixels", shown="the checkpoint's own, 480", type=read.positive),
    Flag("width N", "width in pixels", shown="the checkpoint's own, 720", type=read.positive),
    Flag(
        "quality X",
        "quality of the mp4, 0 to 10, as in `export_to_video`; browsers do not play one of 10",
        5.0,
        "5, as published",
        type=read.quality,
    ),
    Flag(
        "lora LORA[:SCALE]",
        "LoRA of the transformer, as diffusers or peft saves it (a file, a folder or a Hugging "
        "Face repository) and its scale; can be repeated; needs `pip install peft==0.21.2`",
        [],
        action="append",
        type=read.lora,
    ),
    Flag(
        "scheduler",
        "`dpm` (`CogVideoXDPMScheduler`, adds noise at each step) or `ddim` "
        "(`CogVideoXDDIMScheduler`, adds none)",
        shown="the checkpoint's",
        choices=("dpm", "ddim"),
    ),
)
STEPS = (
    Flag(
        "computed_steps N ...",
        "compute N steps, and reuse the others by the forecast; replaces the threshold, unless "
        "`--rel_l1_thresh` is set too; several make a sweep",
        type=read.positive,
    ),
    Flag(
        "reuse",
        "how steps are reused: by the `residual` of the last computed step, as published, or by a "
        "`forecast` of the clean latents from the last two computed steps",
        shown="residual with a threshold or `--schedule`, forecast with `--computed_steps`",
        choices=REUSES,
    ),
    Flag(
        "schedule FILE ...",
        "compute the steps in a JSON list or in a video's record; replaces the threshold, unless "
        "`--rel_l1_thresh` is set too; several make a sweep",
        type=read.schedule,
    ),
    Flag(
        "coefficients FILE",
        "coefficients of the rescaling polynomial, highest power first: a JSON file "
        '`{"values": [a, b, c, d, e], "fitted_range": [low, high], "source": "..."}`, as '
        "`python3 -m teacache.fit` writes it, or a video's record",
        COGVIDEOX_5B,
        COGVIDEOX_5B.source,
        type=read.coefficients,
    ),
    Flag(
        "retain_first N", "compute the first N steps, whatever the threshold", 1, type=read.positive
    ),
    Flag(
        "retain_last N",
        "compute the last N steps, since no later step can correct their errors",
        1,
        type=read.positive,
    ),
    Flag("max_reuse N", "reuse at most N steps in a row", shown="no limit", type=read.positive),
)
MACHINE = (
    Flag(
        "device DEVICE",
        "`auto` (CUDA if available, else the CPU), `cuda`, `cuda:N` or `cpu`",
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
        "keep weights in host memory to save GPU memory: `none`, `blocks` (the transformer's "
        "blocks, copied to the GPU one ahead), `model` (one model at a time on the GPU), "
        "`sequential` (one layer at a time, slow); `auto` is the first of `none`, `blocks`, "
        "`sequential` that fits",
        "auto",
        choices=("auto", "none", "blocks", "model", "sequential"),
    ),
    Flag(
        "vae_tiling",
        "run the VAE in tiles: less memory, not bit for bit; `auto` only if the GPU has too little "
        "memory; without a value `on`",
        "auto",
        nargs="?",
        const="on",
        choices=("auto", "on", "off"),
    ),
    Flag(
        "attention BACKEND",
        "`native` (torch's own choice), `flash3`, `flash4`, `cudnn`, `sage` (not exact) and other "
        "backends of diffusers' dispatcher, if installed",
        "native",
    ),
    Flag(
        "compile",
        "compile the transformer, and with 8 videos or more the decoder; takes minutes the first "
        "time, seconds later; not bit for bit",
        action="store_true",
    ),
    Flag(
        "quantize",
        "`fp8`: float8 linear layers, on Hopper or later GPUs; not exact; needs "
        "`pip install torchao==0.18.0`",
        choices=("fp8",),
    ),
    Flag("quiet", "print only the videos' paths on standard output", action="store_true"),
)
SEVERAL = (
    Flag(
        "jobs FILE",
        "sample a video for each line of a CSV or JSON Lines file, with any of `image`, `prompt`, "
        "`negative_prompt`, `seed`, `num_infer_steps`, `rel_l1_thresh` or `computed_steps`, "
        "`reuse`, `retain_first`, `retain_last`, `max_reuse`; other values: the command line's",
        type=read.path,
    ),
    Flag(
        "resume",
        "continue an unfinished run: skip videos whose records in `--output_path` have the same "
        "settings, and videos that another process with `--resume` is sampling; decode latents "
        "that an unfinished run has saved",
        action="store_true",
    ),
)
ALONE = (
    Flag(
        "shard I/N",
        "sample shard I of N, counted from 0, of the videos of `--jobs` or a sweep; the last shard "
        "writes the report",
        type=read.shard,
    ),
    Flag(
        "plan",
        "print the computed steps of each setting, and exit; by default of thresholds "
        f"{' '.join(map(str, PLANNED_THRESHOLDS))} and of {' '.join(map(str, PLANNED_STEPS))} "
        "computed steps",
        action="store_true",
    ),
)

GROUPS: dict[str, tuple[Flag, ...]] = {
    "as published": PUBLISHED,
    "the video": VIDEO,
    "which steps are computed": STEPS,
    "the machine": MACHINE,
    "several videos": SEVERAL,
    "shards and plan": ALONE,
}
SHARED = tuple(GROUPS)[:-1]  # with other commands that sample videos
FLAGS = {flag.name: flag for group in GROUPS.values() for flag in group}


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add some of the flags to the parser of another command."""
    for name in names:
        FLAGS[name].add_to(parser)
