"""Latents that outlive a failure after sampling, and the video that is made of them later."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from teacache import interruption
from teacache.checkpoint import read_json, whole_number
from teacache.device import is_out_of_memory, out_of_memory
from teacache.errors import ArgumentError, DeviceError, OutputError, TeaCacheError
from teacache.output import LATENTS_ENDING, claimed_stem, written_whole
from teacache.report import write_record
from teacache.video import write_video

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from PIL import Image

    from teacache.report import Stages

# What is needed of a record, beside the latents, to make the video and its own record.
RECORDED = {
    *("seed", "rel_l1_thresh", "ckpts_path", "width", "height", "num_frames", "fps", "seconds"),
    *("computed_steps", "reused_steps", "why_nothing_was_reused", "approximations"),
    *("peak_memory_bytes", "device_name"),
}


@contextlib.contextmanager
def latents_survive(
    latents: torch.Tensor,
    record: Callable[[], dict[str, object]],
    stages: Stages,
    args: argparse.Namespace,
) -> Iterator[None]:
    """Keep a video's latents in a file where the block, which makes a video of them, fails.

    Where it is interrupted as well: it may be the end of a job's time that does so.

    Args:
        record: gives the video's record, as far as it is known.

    Raises:
        TeaCacheError: instead of what a full disk or GPU raises, naming the file.
    """
    try:
        yield
    except BaseException as error:
        kept = _keep(latents, record(), args.output_path)
        told = (
            f"The latents are kept, try again with --latents {kept}" if kept else "Nothing is kept"
        )
        if interruption.asked():  # whatever a library has made of it
            error.add_note(told)
            raise
        if is_out_of_memory(error):
            advice = out_of_memory(error, stages.under_way, args)
            raise DeviceError(f"{advice}. {told}") from error
        if isinstance(error, (OSError, TeaCacheError)):
            raise _not_written(error, told, args) from error
        error.add_note(told)
        raise


def read_latents(path: Path) -> tuple[torch.Tensor, dict[str, object]]:
    """What `latents_survive` has kept: latents, and the record of their sampling.

    Raises:
        ArgumentError: where the file is missing, or another.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            latents, record = file.get_tensor("latents"), json.loads(file.metadata()["record"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"--latents {path} holds no latents of this command's") from error
    lacks = RECORDED - set(record) if isinstance(record, dict) else RECORDED
    if lacks or latents.ndim != 5 or len(latents) != 1:
        raise ArgumentError(
            f"--latents {path} holds no latents of this command's: "
            + (f"its record lacks {min(lacks)}" if lacks else f"of shape {list(latents.shape)}")
        )
    return latents, record


def write_with_record(
    pictures: list[Image.Image],
    prefix: str,
    record: Callable[[], dict[str, object]],
    stages: Stages,
    args: argparse.Namespace,
) -> tuple[Path, dict[str, object]]:
    """Write a video and its record, both or neither.

    Args:
        prefix: of their names, see `teacache.output.claimed_stem`.
        record: called once the video is written, so that it holds the seconds of that too.
    """
    with claimed_stem(args.output_path, prefix) as stem:
        with written_whole(stem, ".mp4", ".json") as (path, beside):
            with stages.stage("writing"):
                write_video(pictures, path, args.fps)
            written = record()
            write_record(written, beside)
        return stem.with_name(f"{stem.name}.mp4"), written


def decode_latents(
    latents: torch.Tensor,
    sampled: dict[str, object],
    checkpoint: Path,
    device: torch.device,
    stages: Stages,
    args: argparse.Namespace,
) -> tuple[Path, dict[str, object]]:
    """Make the video of `--latents`. Needs the VAE alone.

    Args:
        latents, sampled: see `read_latents`.

    Returns:
        the video, and the record of its sampling and decoding.
    """
    from teacache import sampler

    path = checkpoint / "vae" / "config.json"
    channels = whole_number(path, read_json(path, "no VAE"), "latent_channels", 16)
    if latents.shape[2] != channels:
        raise ArgumentError(
            f"--latents {args.latents} have {latents.shape[2]} channels, and the VAE of "
            f"{checkpoint} decodes {channels}"
        )
    with stages.stage("loading"):
        pipe = sampler.load_pipeline(
            *(checkpoint, device, latents.dtype, args.offload, args.vae_tiling), parts=("vae",)
        )

    def record() -> dict[str, object]:
        own = stages.with_total()
        total = sampled["seconds"].get("total", 0.0) + own["total"]
        seconds = {**sampled["seconds"], **own, "total": round(total, 3)}
        changed = {
            "ckpts_path": args.ckpts_path,
            "output_path": str(args.output_path),
            "fps": args.fps,
        }
        return {**sampled, **changed, "vae_tiling": args.vae_tiling, "seconds": seconds}

    with stages.stage("decoding"):
        pictures = sampler.decode(pipe, latents.to(device))
    try:
        prefix = f"{sampled['seed']}_{sampled['rel_l1_thresh']}"
        return write_with_record(pictures, prefix, record, stages, args)
    except OSError as error:
        raise _not_written(error, f"{args.latents} stays", args) from error


def _not_written(error: Exception, told: str, args: argparse.Namespace) -> OutputError:
    """The error for a user whose video an error has stopped.

    Args:
        told: what has become of the latents.
    """
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return OutputError(f"the video cannot be written to {args.output_path}: {reason}. {told}")


def _keep(latents: torch.Tensor, record: dict[str, object], folder: Path) -> Path | None:
    """Write them to the output folder, or where it is full or gone, to the system's temporary one.

    Returns:
        the file, or None where neither takes it.
    """
    from safetensors.torch import save

    named = {"latents": latents.contiguous().cpu()}
    content = save(named, metadata={"record": json.dumps(record)})
    prefix = f"{record['seed']}_{record['rel_l1_thresh']}"
    for place in (folder, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError), claimed_stem(place, prefix) as stem:
            with written_whole(stem, LATENTS_ENDING) as (path,):
                path.write_bytes(content)
            return stem.with_name(stem.name + LATENTS_ENDING)
    return None
