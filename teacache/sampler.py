"""From an identity and a prompt to frames: load the pipeline once, sample many videos with it."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import ConsisIDPipeline

from teacache.errors import DeviceError
from teacache.quiet import no_progress_bars

if TYPE_CHECKING:
    from PIL import Image

    from teacache.checkpoint import VideoSize
    from teacache.identity import Identity

logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Text(NamedTuple):
    """T5's embeddings, [1, 226, 4096] each at full size; no negative ones without guidance."""

    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor | None


def choose_device(name: str, full_size: bool) -> torch.device:
    """The device for `--device`: `auto` is CUDA where there is one, else the CPU.

    Args:
        full_size: whether the checkpoint has weights that a CPU would sample with for days.

    Raises:
        DeviceError: where the machine does not have it, or `auto` finds no GPU for a full-size
            checkpoint.
    """
    cuda = torch.cuda.is_available()
    if name == "auto":
        if not cuda and full_size:
            raise DeviceError(
                "this checkpoint needs a CUDA GPU, and torch finds none here. To see it work "
                "without: --ckpts_path tiny. To wait for hours a step: --device cpu"
            )
        return torch.device("cuda" if cuda else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The sampling dtype for `--dtype`: `auto` is bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def load_pipeline(
    checkpoint: Path,
    device: torch.device,
    dtype: torch.dtype,
    offload: str = "none",
    vae_tiling: bool = False,
) -> ConsisIDPipeline:
    """Load text encoder, transformer, VAE and scheduler.

    Args:
        offload: `none` keeps every model on the device; `model` brings each one there for its
            turn; `sequential` brings layer by layer.
        vae_tiling: decode the video in overlapping tiles, with less memory and not bit for bit.

    Raises:
        DeviceError: where there is nothing to offload from.
    """
    if offload != "none" and device.type == "cpu":
        raise DeviceError(
            f"--offload {offload}: weights are offloaded from a GPU, and this is a CPU"
        )
    with no_progress_bars():
        pipe = ConsisIDPipeline.from_pretrained(checkpoint, dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if vae_tiling:
        pipe.vae.enable_tiling()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


@torch.no_grad()
def encode_text(
    pipe: ConsisIDPipeline, prompt: str, negative_prompt: str, guidance_scale: float
) -> Text:
    """Embed the prompt, and the negative prompt where guidance (a scale above 1) asks for it.

    What is longer than the text encoder reads is cut off, with a warning that shows it.
    """
    limit = pipe.transformer.config.max_text_seq_length
    for name, given in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        tokens = pipe.tokenizer(given).input_ids
        if len(tokens) > limit:
            lost = pipe.tokenizer.decode(tokens[limit - 1 : -1])  # the last token ends the text
            logger.warning("--%s is longer than %d tokens: without %r", name, limit, lost)
    embeds = pipe.encode_prompt(
        prompt, negative_prompt, do_classifier_free_guidance=guidance_scale > 1
    )
    return Text(*embeds)


def denoise(
    pipe: ConsisIDPipeline,
    identity: Identity,
    text: Text,
    size: VideoSize,
    *,
    seed: int,
    num_infer_steps: int = 50,
    guidance_scale: float = 6.0,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Sample one video's latents, [1, latent frames, 16, height / 8, width / 8].

    Everything random comes from one generator on the sampling device, as the published sampler
    has it: the noise in the image latents first, then the initial noise.

    Args:
        on_step: called after each denoising step.
    """

    def step_ended(pipe: ConsisIDPipeline, step: int, timestep: torch.Tensor, kwargs: dict) -> dict:
        on_step()
        return {}

    latents = pipe(
        image=identity.face,
        prompt_embeds=text.prompt_embeds,
        negative_prompt_embeds=text.negative_prompt_embeds,
        width=size.width,
        height=size.height,
        num_frames=size.num_frames,
        num_inference_steps=num_infer_steps,
        guidance_scale=guidance_scale,
        use_dynamic_cfg=False,
        id_cond=identity.id_cond,
        id_vit_hidden=identity.id_vit_hidden,
        kps_cond=identity.kps,
        generator=torch.Generator(pipe._execution_device).manual_seed(seed),
        callback_on_step_end=step_ended,
        output_type="latent",
    ).frames
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)
    return latents


@torch.no_grad()
def decode(pipe: ConsisIDPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Decode one video's latents to its frames."""
    video = pipe.decode_latents(latents)
    frames = pipe.video_processor.postprocess_video(video=video, output_type="pil")
    pipe.maybe_free_model_hooks()
    return frames[0]


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was allocated so far: on the GPU by torch, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux
