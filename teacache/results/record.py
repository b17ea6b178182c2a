"""The record of one video: its settings and what happened, a JSON file beside it.

All that is known of a finished video is read from here: whether a run may skip it, what it is
compared with, what is still needed to make a video of its latents.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from teacache import __version__
from teacache.base.files import written_whole


class Figures(TypedDict):
    """One figure of quality over the frames; null where a frame has none."""

    mean: float | None
    worst: float | None
    per_frame: list[float | None]


class IdentityFigures(Figures):
    """ArcFace's similarity, and how many frames show no face."""

    frames_without_face: int


class Quality(TypedDict, total=False):
    """What a comparison finds. `decoded`: whether a video's mp4 was decoded for it."""

    psnr: Figures
    ssim: Figures
    lpips: Figures | None
    lpips_missing: str | None
    decoded: bool
    identity: IdentityFigures


@dataclass(frozen=True)
class Settings:
    """What is on record before sampling: the arguments, with what was chosen for them.

    Two settings are equal where they make the same video.
    """

    image: str
    prompt: str
    negative_prompt: str
    seed: int
    num_infer_steps: int
    rel_l1_thresh: float | None
    image_sha256: str
    ckpts_path: str
    output_path: str = field(compare=False)
    guidance_scale: float
    width: int
    height: int
    num_frames: int
    device: str
    dtype: str
    offload: str = field(compare=False)  # every way of it computes the same
    vae_tiling: bool
    attention: str
    compile: bool
    quantize: str | None
    approximations: list[str] = field(compare=False)  # of what is compared by itself
    coefficients: dict[str, Any]
    # Those of earlier versions, whose records lack them.
    retain_first: int = 1
    retain_last: int = 1
    max_reuse: int | None = None
    # Where the published rule did not choose: what the schedule is called, its steps, their reuse.
    schedule: str | None = None
    selected_steps: list[int] | None = None
    reuse: str = "residual"
    scheduler: str = "dpm"
    num_gpus: int = 1
    ranks: str | None = None  # how they share a denoising step
    lora: list[str] = field(default_factory=list)
    checkpoint_sha256: str | None = field(default=None, compare=False)

    @property
    def prefix(self) -> str:
        """Of the names of the video's files: `{seed}_{rel_l1_thresh}`, or `{seed}_forecast12`."""
        which = self.schedule.replace(" ", "") if self.schedule else self.rel_l1_thresh
        return f"{self.seed}_{which}"

    @property
    def name(self) -> str:
        """A text that two settings share where they are equal, and only there."""
        compared = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return json.dumps(compared, sort_keys=True)

    @property
    def group(self) -> tuple[str, str, str, int, int]:
        """What the videos share that are compared with each other: all but the schedule."""
        return (
            self.image_sha256,
            self.prompt,
            self.negative_prompt,
            self.seed,
            self.num_infer_steps,
        )


@dataclass(frozen=True)
class Record:
    """Settings and what happened.

    Distances that are not finite are null, which JSON can hold; their steps are among the
    `extrapolated_steps`. The seconds of a step are medians. The command makes the video again.
    """

    settings: Settings
    computed_steps: list[int]
    reused_steps: list[int]
    distances: list[float | None]
    rescaled: list[float | None]
    extrapolated_steps: list[int]
    why_nothing_was_reused: str | None
    computed_step_seconds: float | None
    reused_step_seconds: float | None
    seconds: dict[str, float]
    peak_memory_bytes: int
    device_name: str
    versions: dict[str, str]
    quality: Quality | None = None
    peak_reserved_bytes: int | None = None
    command: str | None = None

    @property
    def latency(self) -> float:
        """Seconds of denoising and decoding, which is what the published figures are of."""
        return self.seconds["denoising"] + self.seconds["decoding"]

    def as_json(self) -> dict[str, Any]:
        """One flat object, in the order of the fields."""
        own = asdict(self)
        settings = own.pop("settings")
        if self.quality is None:
            own.pop("quality")
        return {**settings, **own}

    @classmethod
    def from_json(cls, data: object) -> Record:
        """What `as_json` has made; other keys are left out.

        Raises:
            ValueError: where it is no record, naming a key that is missing.
        """
        if not isinstance(data, dict):
            raise ValueError("its record is no object")
        every = (f for kind in (Settings, cls) for f in fields(kind))
        needed = {f.name for f in every if f.default is f.default_factory is MISSING}
        lacks = needed - set(data) - {"settings"}
        if lacks:
            raise ValueError(f"its record lacks {min(lacks)}")
        settings = Settings(**{f.name: data[f.name] for f in fields(Settings) if f.name in data})
        own: dict[str, Any] = {f.name: data.get(f.name) for f in fields(cls)}
        own["settings"] = settings
        return cls(**own)

    def write(self, path: Path) -> None:
        """Write it as JSON, a line for each key."""
        write_json(self.as_json(), path)

    def replace_at(self, path: Path) -> None:
        """Put it in the place of an earlier record of the same video, atomically."""
        with written_whole(path.with_suffix(""), ".json") as (beside,):
            self.write(beside)


def read_record(path: Path) -> Record | None:
    """The record in a file, or None where there is none of ours."""
    try:
        return Record.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def write_json(data: dict[str, Any], path: Path) -> None:
    """Write an object as JSON, a line for each key."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in data.items()
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions that figures and bits depend on most."""
    packages = ("torch", "diffusers", "transformers")
    return {
        "teacache": __version__,
        **{package: importlib.metadata.version(package) for package in packages},
    }


def median_seconds(step_seconds: Sequence[float], steps: Sequence[int]) -> float | None:
    """The median over some of the steps, to the microsecond; None where there are none."""
    return round(statistics.median(step_seconds[step] for step in steps), 6) if steps else None


def finite(values: Sequence[float | None]) -> list[float | None]:
    """The values, null where one is not finite."""
    return [value if value is not None and math.isfinite(value) else None for value in values]


def summary(video: Path, record: Record) -> str:
    """The lines that end the run of one video."""
    computed, reused = len(record.computed_steps), len(record.reused_steps)
    lines = [
        f"video       {video}",
        f"steps       {computed} computed, {reused} reused of {computed + reused}",
        f"seconds     {record.seconds['total']:.1f}",
        f"peak memory {record.peak_memory_bytes / 2**30:.1f} GiB ({record.device_name})",
    ]
    psnr = (record.quality or {}).get("psnr")
    if psnr and psnr["mean"] is not None:
        lines.insert(2, f"PSNR        {psnr['mean']:.1f} dB, worst frame {psnr['worst']:.1f}")
    if record.settings.ranks:
        lines.insert(2, f"            on {record.settings.ranks}")
    if record.settings.approximations:
        lines.insert(2, f"not exact   {', '.join(record.settings.approximations)}")
    if record.why_nothing_was_reused:
        lines.insert(2, f"            nothing was reused: {record.why_nothing_was_reused}")
    return "\n".join(lines)
