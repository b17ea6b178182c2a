"""Loads the transformer and the VAE of an order, with its accelerations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from teacache.checkpoint.pipeline import load_pipeline
from teacache.preflight.checks import Ready
from teacache.request.values import Order
from teacache.sampling import acceleration, attention
from teacache.sampling.blocks import use_lean_blocks
from teacache.sampling.decoder import use_lean_decoder
from teacache.sampling.lora import fuse_loras
from teacache.sampling.streaming import stream_blocks

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline


def load(
    order: Order, ready: Ready, parts: tuple[str, ...] = ("transformer", "vae")
) -> ConsisIDPipeline:
    """A pipeline with the transformer, the scheduler and, if it is one of the parts, the VAE."""
    machine = ready.machine
    pipe = load_pipeline(
        ready.checkpoint,
        ready.device,
        ready.dtype,
        offload=machine.offload,
        vae_tiling=machine.vae_tiling == "on",
        parts=parts,
        scheduler=order.scheduler,
    )
    fuse_loras(pipe, order.loras)
    attention.use_attention(pipe.transformer, ready.backend)
    use_lean_blocks(pipe.transformer)
    if machine.quantize:
        acceleration.quantize_fp8(pipe.transformer)
    if machine.compile:
        acceleration.compile_transformer(pipe.transformer)
    if machine.offload == "blocks":
        stream_blocks(pipe.transformer, ready.device)
    if "vae" in parts:
        use_lean_decoder(pipe.vae)
        if machine.compile and len(order.jobs) >= acceleration.COMPILED_DECODER_PAYS_FROM:
            acceleration.compile_decoder(pipe.vae)
    return pipe
