"""The video of latents that a run has kept. Needs the VAE alone."""

from __future__ import annotations

import dataclasses

from teacache.base.console import Console, Stages
from teacache.checkpoint.pipeline import load_pipeline
from teacache.command.memory import explained_out_of_memory
from teacache.command.order import LatentsOrder
from teacache.command.preflight import ReadyLatents
from teacache.results.record import summary
from teacache.results.slot import claimed_slot
from teacache.sampling import sampler
from teacache.sampling.decoder import use_lean_decoder


def decode_latents(
    order: LatentsOrder, ready: ReadyLatents, stages: Stages, console: Console
) -> None:
    """Decode them, and write video and record as the run would have."""
    settings, sampling_seconds = ready.record.settings, ready.record.seconds
    with explained_out_of_memory(ready.machine, console):
        with stages.stage("loading"):
            pipe = load_pipeline(
                ready.checkpoint,
                ready.device,
                ready.latents.dtype,
                vae_tiling=bool(ready.machine.vae_tiling),
                parts=("vae",),
            )
            use_lean_decoder(pipe.vae)
        with stages.stage("decoding"):
            frames = sampler.decode(pipe, ready.latents.to(ready.device))
        with claimed_slot(order.output_path, settings.prefix, f"{order.latents} stays") as slot:
            with stages.stage("writing"):
                slot.write(frames, settings.fps)
            own = stages.with_total()
            total = round(sampling_seconds.get("total", 0.0) + own["total"], 3)
            seconds = {**sampling_seconds, **own, "total": total}
            record = dataclasses.replace(ready.record, seconds=seconds)
            slot.finish(record)
    console.done(slot.video, summary(slot.video, record))
