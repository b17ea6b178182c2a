"""`python3 -m teacache.embedded.train` trains the embedded checkpoint anew, on a CPU.

In stages: the face detector, on scenes; the autoencoder, on cuttings of clips; then the portraits'
identities and the clips' latents, by face models and autoencoder; then the transformer on both.
What is done is kept every few steps; the same command goes on with it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.environment import prepare_environment
from teacache.base.errors import CheckpointError, TeaCacheError
from teacache.base.files import written_whole
from teacache.base.quiet import silence_libraries

if TYPE_CHECKING:
    from teacache.embedded.detector import Weights

LENGTHS = {"detector_steps": 5000, "vae_steps": 900, "portraits": 1000, "transformer_steps": 2400}


def main(argv: list[str] | None = None) -> int:
    """Train in the folder named on the command line, or go on with a training there."""
    args = _arguments(argv)
    silence_libraries()
    try:
        prepare_environment()
        digest = train(args.folder, {name: getattr(args, name) for name in LENGTHS})
    except TeaCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with it", file=sys.stderr)
        return 130
    print(f"{args.folder / 'weights.safetensors'} sha256 {digest}")
    return 0


def train(folder: Path, lengths: dict[str, int]) -> str:
    """Train, or go on; writes `weights.safetensors` and `losses.png`, and returns the digest of
    the first.

    Raises:
        CheckpointError: where the folder holds a training of other lengths.
    """
    from safetensors.torch import save_file

    from teacache.embedded import (
        material,
        train_detector,
        train_transformer,
        train_vae,
        weights,
    )
    from teacache.embedded.descent import cores
    from teacache.embedded.text import Reader

    _same_training(folder, lengths)
    with cores() as pool:
        detector = train_detector.train(folder, lengths["detector_steps"], pool)
        checkpoint = _random_parts(folder, detector)
        vae = train_vae.train(folder, lengths["vae_steps"], pool)
        faces = material.embed_faces(folder, checkpoint, lengths["portraits"])
        scaled = material.encode(folder, vae, faces, pool)
        transformer = train_transformer.train(
            folder, scaled, Reader(checkpoint), lengths["transformer_steps"], pool
        )
    with written_whole(folder / "weights", ".safetensors") as (beside,):
        save_file(weights.pack(transformer, vae, detector), beside)
    draw_losses(folder)
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def draw_losses(folder: Path) -> None:
    """Draw `losses.png` from what the stages have kept so far."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    stages = {
        "detector": ("detector: loss", "log", ("loss",)),
        "vae": ("VAE: PSNR in dB", "linear", ("psnr",)),
        "transformer": ("transformer: v-loss", "log", ("early", "late")),
    }
    for axes, (stage, (title, scale, keys)) in zip(
        figure.subplots(1, 3), stages.items(), strict=True
    ):
        losses = json.loads((folder / f"{stage}.losses.json").read_text())
        window = max(1, min(50, len(losses) // 4))
        for key in keys:
            values = np.convolve([one[key] for one in losses], np.ones(window) / window, "valid")
            axes.plot(np.arange(len(values)) + window, values, label=key)
        axes.set(title=title, yscale=scale, xlabel=f"steps (mean over {window})")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(folder / "losses.png", dpi=120)


def _same_training(folder: Path, lengths: dict[str, int]) -> None:
    """Raise CheckpointError where the folder's training has other lengths: rates depend on them."""
    file = folder / "lengths.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            file.write_text(json.dumps(lengths) + "\n")
        before = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
    if before != lengths:
        raise CheckpointError(f"{folder} holds a training of other lengths: {before}")


def _random_parts(folder: Path, detector: Weights) -> Path:
    """The parts of the checkpoint that the training reads: text encoder and face models."""
    import torch

    from teacache.embedded.build import SEED, TRANSFORMER
    from teacache.embedded.faces import write_face_encoder
    from teacache.embedded.text import write_text_encoder

    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        beside = folder / ".checkpoint"
        shutil.rmtree(beside, ignore_errors=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            write_text_encoder(beside)
            write_face_encoder(beside / "face_encoder", int(TRANSFORMER["LFE_vit_dim"]), detector)
        beside.rename(checkpoint)
    return checkpoint


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m teacache.embedded.train",
        description="Train the embedded checkpoint on a CPU, or go on with a training.",
    )
    parser.add_argument(
        "folder", type=Path, help="where the training is kept, and at its end weights.safetensors"
    )
    for name, default in LENGTHS.items():
        parser.add_argument(
            f"--{name}", type=_count, default=default, metavar="N", help=f"({default})"
        )
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
