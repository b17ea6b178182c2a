"""Opens the models of a session: pipeline, accelerations, TeaCache and its ranks."""

from collections.abc import Callable
from typing import NamedTuple

from diffusers import ConsisIDPipeline

from teacache.checkpoint.pipeline import load_pipeline
from teacache.core.forward import apply_teacache
from teacache.core.handle import TeaCacheHandle
from teacache.core.ranks import ALONE
from teacache.core.rule import Schedule
from teacache.inputs.text import Text
from teacache.parallel import group
from teacache.preflight.setup import Setup
from teacache.sampling import acceleration, attention, sampler
from teacache.sampling.blocks import use_lean_blocks
from teacache.sampling.decoder import use_lean_decoder
from teacache.sampling.decoder_memory import DecoderMemory
from teacache.sampling.lora import fuse_loras
from teacache.sampling.streaming import stream_blocks


class Models(NamedTuple):
    """A pipeline, TeaCache on its transformer, and the memory for its decoder."""

    pipe: ConsisIDPipeline
    handle: TeaCacheHandle
    memory: DecoderMemory


class Task(NamedTuple):
    """The inputs of denoising one video. schedule: None for every step computed."""

    schedule: Schedule | None
    start: sampler.Start
    text: Text
    num_infer_steps: int


def open_models(
    setup: Setup, videos: int = 1, parts: tuple[str, ...] = ("transformer", "vae")
) -> Models:
    """Load transformer, scheduler and, if it is one of the parts, the VAE, for so many videos."""
    machine = setup.machine
    pipe = load_pipeline(
        setup.checkpoint,
        setup.device,
        setup.dtype,
        offload=machine.offload,
        vae_tiling=machine.vae_tiling == "on",
        parts=parts,
        scheduler=setup.options.scheduler,
    )
    fuse_loras(pipe, setup.options.loras)
    use_lean_models(pipe, setup.backend)
    if machine.quantize:
        acceleration.quantize_fp8(pipe.transformer)
    if machine.compile:
        acceleration.compile_transformer(pipe.transformer)
    if machine.offload == "blocks":
        stream_blocks(pipe.transformer, setup.device)
    if pipe.vae and machine.compile and videos >= acceleration.COMPILED_DECODER_PAYS_FROM:
        acceleration.compile_decoder(pipe.vae)
    handle = apply_teacache(pipe)
    if setup.ranks != ALONE:
        handle.ranks = group.join(pipe.transformer, setup.ranks, setup.device)
    return Models(pipe, handle, DecoderMemory(pipe, setup.size, machine.offload))


def use_lean_models(pipe: ConsisIDPipeline, backend: str) -> None:
    """Let attention, blocks and decoder take less time and memory, for the same numbers."""
    attention.use_attention(pipe.transformer, backend)
    use_lean_blocks(pipe.transformer)
    if pipe.vae:
        use_lean_decoder(pipe.vae)


def denoise(
    models: Models, setup: Setup, task: Task, on_step: Callable[[], None] = lambda: None
) -> sampler.Denoised:
    """Denoise a video. Every rank calls it with the same task."""
    models.handle.follow(task.schedule)
    return sampler.denoise(
        models.pipe,
        task.start,
        task.text,
        setup.size,
        num_infer_steps=task.num_infer_steps,
        guidance_scale=setup.options.format.guidance_scale,
        on_step=on_step,
    )
