"""The video of latents that a run has kept. Needs the VAE alone."""

from __future__ import annotations

import dataclasses

from teacache.base.console import Console, Stages
from teacache.base.errors import ArgumentError, CheckpointError
from teacache.checkpoint.configuration import read_json, whole_number
from teacache.checkpoint.folder import check_checkpoint, is_full_size
from teacache.checkpoint.pipeline import load_pipeline
from teacache.command.machine import choose_device
from teacache.command.memory import explained_out_of_memory
from teacache.command.order import LatentsOrder
from teacache.command.preflight import find_checkpoint
from teacache.results.output_folder import check_space, prepare_folder
from teacache.results.record import Record, summary
from teacache.results.slot import claimed_slot, read_latents
from teacache.results.video import check_encoder
from teacache.sampling import sampler


def decode_latents(order: LatentsOrder, stages: Stages, console: Console) -> None:
    """Decode them, and write video and record as the run would have."""
    prepare_folder(order.output_path)
    check_encoder()
    latents, sampled = read_latents(order.latents)
    settings = dataclasses.replace(
        sampled.settings,
        ckpts_path=order.ckpts_path or sampled.settings.ckpts_path,
        fps=order.fps or sampled.settings.fps,
        output_path=str(order.output_path),
        vae_tiling=order.machine.vae_tiling,
    )
    check_space(order.output_path, settings.width * settings.height, settings.num_frames, videos=1)
    with stages.stage("checkpoint"):
        checkpoint = find_checkpoint(settings.ckpts_path)
        if checkpoint is None:
            raise CheckpointError(
                f"--latents needs a checkpoint: {settings.ckpts_path} is not here"
            )
        check_checkpoint(checkpoint)
    device = choose_device(order.machine.device, is_full_size(checkpoint), order.machine.offload)
    path = checkpoint / "vae" / "config.json"
    channels = whole_number(path, read_json(path, "no VAE"), "latent_channels", 16)
    if latents.shape[2] != channels:
        raise ArgumentError(
            f"--latents {order.latents} have {latents.shape[2]} channels, and the VAE of "
            f"{checkpoint} decodes {channels}"
        )
    prefix = f"{settings.seed}_{settings.rel_l1_thresh}"
    with explained_out_of_memory(order.machine, console):
        with stages.stage("loading"):
            pipe = load_pipeline(
                checkpoint,
                device,
                latents.dtype,
                offload=order.machine.offload,
                vae_tiling=order.machine.vae_tiling,
                parts=("vae",),
            )
        with stages.stage("decoding"):
            frames = sampler.decode(pipe, latents.to(device))
        with claimed_slot(order.output_path, prefix, f"{order.latents} stays") as slot:
            with stages.stage("writing"):
                slot.write(frames, settings.fps)
            record = dataclasses.replace(
                sampled, settings=settings, seconds=_seconds(sampled, stages)
            )
            slot.finish(record)
    console.done(slot.video, summary(slot.video, record))


def _seconds(sampled: Record, stages: Stages) -> dict[str, float]:
    """Those of sampling, then those of decoding; the total is that of both."""
    own = stages.with_total()
    total = sampled.seconds.get("total", 0.0) + own["total"]
    return {**sampled.seconds, **own, "total": round(total, 3)}
