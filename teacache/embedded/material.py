"""The second stage of the training: clips become latents, portraits become identities."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from teacache.base.files import written_whole
from teacache.embedded import clips, portraits
from teacache.embedded.build import untrained_transformer
from teacache.embedded.train_transformer import Material
from teacache.embedded.train_vae import quick_convolutions, to_tensor
from teacache.inputs.identity import FaceModels, Identity, aligned_identity, load_face_models

SEED = 3
CLIPS = 4  # of each portrait
SHARD = 40  # portraits in a file
ALIGNED_SIDE = 512


def identity_of(portrait: portraits.Picture, models: FaceModels) -> Identity:
    """What the face stack makes of a face that is aligned already."""
    from insightface.app.common import Face

    picture = cv2.resize(portrait, (ALIGNED_SIDE, ALIGNED_SIDE), interpolation=cv2.INTER_CUBIC)
    points = (portraits.ALIGNED * ALIGNED_SIDE).astype(np.float32)
    box = np.array([*points.min(0) - 80, *points.max(0) + 80, 1.0], np.float32)
    face = Face(bbox=box[:4], kps=points, det_score=1.0)
    models.analyser.models["recognition"].get(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), face)
    return aligned_identity(
        picture, [face], (box, points), models, torch.device("cpu"), torch.float32
    )


def embed_faces(folder: Path, checkpoint: Path, count: int) -> Tensor:
    """[count, queries, width]: the face extractor's output for each of the training's portraits.

    Args:
        checkpoint: one that has the embedded checkpoint's face models.
    """
    file = folder / "faces.pt"
    faces: list[Tensor] = torch.load(file, weights_only=True) if file.is_file() else []
    models = load_face_models(checkpoint, torch.device("cpu"), torch.float32)
    extractor = untrained_transformer().local_facial_extractor.eval()
    while len(faces) < count:
        identity = identity_of(portrait_of(len(faces)), models)
        with torch.no_grad():
            faces.append(extractor(identity.id_cond, identity.id_vit_hidden)[0].clone())
        if len(faces) % SHARD == 0 or len(faces) == count:
            with written_whole(folder / "faces", ".pt") as (beside,):
                torch.save(faces, beside)
            print(f"faces {len(faces)}/{count}", flush=True)
    return torch.stack(faces[:count])


def portrait_of(number: int) -> portraits.Picture:
    """The training's portrait of that number."""
    return portraits.training_portrait(np.random.default_rng([SEED, number]))


def encode(
    folder: Path, vae: AutoencoderKLCogVideoX, faces: Tensor, pool: ThreadPoolExecutor
) -> Material:
    """Encode `CLIPS` clips of each portrait, or read what is encoded already.

    The latents are scaled to a standard deviation of 1, and so is `vae.config.scaling_factor`.
    """
    with quick_convolutions(), torch.no_grad():
        shards = [
            _shard(folder, number, min(SHARD, len(faces) - SHARD * number), vae, pool)
            for number in range((len(faces) + SHARD - 1) // SHARD)
        ]
    latents, mean, std = (
        torch.cat([shard[key] for shard in shards])
        for key in ("latents", "condition_mean", "condition_std")
    )
    scale = 1 / latents.float().std().item()
    vae.register_to_config(scaling_factor=scale)
    count = len(latents)
    return Material(
        latents=(latents.float() * scale).half(),
        condition_mean=mean.float().repeat_interleave(CLIPS, 0) * scale,
        condition_std=std.float().repeat_interleave(CLIPS, 0) * scale,
        faces=faces,
        portrait=[number // CLIPS for number in range(count)],
        scenes=[_scene_of(number) for number in range(count)],
    )


def _scene_of(clip: int) -> clips.Scene:
    return clips.random_scene(np.random.default_rng([SEED, 1, clip]))


def _shard(
    folder: Path,
    number: int,
    count: int,
    vae: AutoencoderKLCogVideoX,
    pool: ThreadPoolExecutor,
) -> dict[str, Tensor]:
    file = folder / f"latents.{number}.pt"
    if file.is_file():
        return torch.load(file, weights_only=True)

    def of_portrait(portrait: int) -> dict[str, Any]:
        with torch.no_grad():
            picture = portrait_of(portrait)
            face = to_tensor(clips.condition(picture)[None, None])
            posterior = vae.encode(face).latent_dist
            encoded = []
            for clip in range(CLIPS * portrait, CLIPS * (portrait + 1)):
                rng = np.random.default_rng([SEED, 2, clip])
                frames = to_tensor(clips.render(picture, _scene_of(clip), rng)[None])
                encoded.append(vae.encode(frames).latent_dist.mode()[0].permute(1, 0, 2, 3))
        return {
            "latents": torch.stack(encoded).half(),
            "condition_mean": posterior.mean[:, :, 0].half(),
            "condition_std": posterior.std[:, :, 0].half(),
        }

    first = SHARD * number
    done = list(pool.map(of_portrait, range(first, first + count)))
    shard = {key: torch.cat([one[key] for one in done]) for key in done[0]}
    with written_whole(folder / f"latents.{number}", ".pt") as (beside,):
        torch.save(shard, beside)
    print(f"latents {first + count} portraits", flush=True)
    return shard
