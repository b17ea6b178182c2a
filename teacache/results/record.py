"""The record of a video: its settings and measurements, in a JSON file next to the mp4.

`--resume` and comparisons read all they need of a finished video from its record.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from teacache import __version__
from teacache.base.files import written_whole
from teacache.results.video import QUALITY

# Keys of records of earlier versions, and their names.
RENAMED = {"extrapolated_steps": "steps_outside_fitted_range"}


class Figures(TypedDict):
    """A figure of quality; null for a frame without one. worst_frame: index, counted from 0."""

    mean: float | None
    worst: float | None
    worst_frame: int | None
    per_frame: list[float | None]


class IdentityFigures(Figures):
    """ArcFace's similarity in the frames with a face; the number and the share of frames."""

    frames_without_face: int
    face_share: float


class Quality(TypedDict, total=False):
    """The figures of a comparison. `decoded`: whether frames were decoded from an mp4."""

    psnr: Figures
    ssim: Figures
    lpips: Figures | None
    lpips_missing: str | None
    decoded: bool
    identity: IdentityFigures


@dataclass(frozen=True)
class Settings:
    """The arguments of a video, with the choices made for it.

    Equal settings make the same video.
    """

    image: str = field(compare=False)  # its pixels count, and so do the checkpoint's files
    prompt: str
    negative_prompt: str
    seed: int
    num_infer_steps: int
    rel_l1_thresh: float | None
    image_sha256: str
    ckpts_path: str = field(compare=False)
    output_path: str = field(compare=False)
    guidance_scale: float
    width: int
    height: int
    num_frames: int
    device: str
    dtype: str
    offload: str = field(compare=False)  # does not change the video
    vae_tiling: bool
    attention: str
    compile: bool
    quantize: str | None
    approximations: list[str] = field(compare=False)  # follow from other fields
    coefficients: dict[str, Any]
    # With the values that records of earlier versions lack.
    retain_first: int = 1
    retain_last: int = 1
    max_reuse: int | None = None
    # Without the published rule, the name of the schedule: `listed 22`, `0.15, max_reuse 2`; and
    # without a threshold its computed steps.
    schedule: str | None = None
    selected_steps: list[int] | None = None
    reuse: str = "residual"
    scheduler: str = "dpm"
    num_gpus: int = 1
    ranks: str | None = None  # how a denoising step is divided
    lora: list[str] = field(default_factory=list)
    mp4_quality: float = QUALITY  # `--quality`; the record's `quality` are the figures
    checkpoint_sha256: str | None = None

    @property
    def prefix(self) -> str:
        """The prefix of file names: `{seed}_{rel_l1_thresh}`, `42_0.15_max_reuse2`."""
        named = (self.schedule or "").replace(", ", "_").replace(" ", "")
        return f"{self.seed}_{named or self.rel_l1_thresh}"

    @property
    def name(self) -> str:
        """A text that equal settings share, and no others."""
        compared = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        return json.dumps(compared, sort_keys=True)

    @property
    def group(self) -> tuple[str, str, str, int, int]:
        """All but the schedule: videos with the same group are compared with each other."""
        image, prompts = self.image_sha256, (self.prompt, self.negative_prompt)
        return (image, *prompts, self.seed, self.num_infer_steps)


@dataclass(frozen=True)
class Record:
    """The settings and measurements of a video.

    distances: None where they are not finite, since JSON has no NaN. steps_outside_fitted_range:
    those whose distances the coefficients do not cover, these among them. computed_step_seconds,
    reused_step_seconds: medians. command: makes the video again. video_bytes: size of the mp4.
    """

    settings: Settings
    computed_steps: list[int]
    reused_steps: list[int]
    distances: list[float | None]
    rescaled: list[float | None]
    steps_outside_fitted_range: list[int]
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
    video_bytes: int | None = None

    @property
    def latency(self) -> float:
        """Seconds of denoising and decoding, as in the published figures."""
        return self.seconds["denoising"] + self.seconds["decoding"]

    def as_json(self) -> dict[str, Any]:
        """One flat object, in the order of the fields."""
        own = asdict(self)
        if self.quality is None:
            del own["quality"]
        return {**own.pop("settings"), **own}

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """The inverse of `as_json`. Other keys are ignored, earlier names of keys are known.

        Raises:
            TypeError: where keys are missing.
        """
        data = {RENAMED.get(key, key): value for key, value in dict(data).items()}
        settings, own = (
            {f.name: data[f.name] for f in fields(kind) if f.name in data}
            for kind in (Settings, cls)
        )
        return cls(**{**own, "settings": Settings(**settings)})

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        write_json(self.as_json(), path)

    def replace_at(self, path: Path) -> None:
        """Replace an earlier record of the same video, atomically."""
        with written_whole(path.with_suffix(""), ".json") as (temporary,):
            self.write(temporary)


def read_record(path: Path) -> Record | None:
    """The record in a file, or None where the file has none."""
    try:
        return Record.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, RecursionError):
        return None


def write_json(data: dict[str, Any], path: Path) -> None:
    """Write an object as JSON, one key a line."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in data.items()
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions of this package and of the main libraries."""
    packages = ("torch", "diffusers", "transformers")
    libraries = {package: importlib.metadata.version(package) for package in packages}
    return {"teacache": __version__, **libraries}


def median_seconds(step_seconds: Sequence[float], steps: Sequence[int]) -> float | None:
    """The median over some of the steps, to the microsecond; None without steps."""
    return round(statistics.median(step_seconds[step] for step in steps), 6) if steps else None


def finite(values: Sequence[float | None]) -> list[float | None]:
    """The values, with None for those that are not finite."""
    return [value if value is not None and math.isfinite(value) else None for value in values]


def summary(video: Path, record: Record) -> str:
    """The lines that the command prints after a video."""
    computed, reused = len(record.computed_steps), len(record.reused_steps)
    lines = [
        f"video       {video}",
        f"steps       {computed} computed, {reused} reused of {computed + reused}",
    ]
    if record.why_nothing_was_reused:
        lines.append(f"            nothing was reused: {record.why_nothing_was_reused}")
    if record.settings.approximations:
        lines.append(f"not exact   {', '.join(record.settings.approximations)}")
    if record.settings.ranks:
        lines.append(f"            on {record.settings.ranks}")
    psnr = (record.quality or {}).get("psnr")
    if psnr and psnr["mean"] is not None:
        worst = f"{psnr['worst']:.1f} in frame {psnr['worst_frame']}"
        lines.append(f"PSNR        {psnr['mean']:.1f} dB, worst {worst}")
    return "\n".join(
        [
            *lines,
            f"seconds     {record.seconds['total']:.1f}",
            f"peak memory {record.peak_memory_bytes / 2**30:.1f} GiB ({record.device_name})",
        ]
    )
