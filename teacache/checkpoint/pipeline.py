"""Loads the pipeline of a checkpoint folder, or some of its models."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, ConsisIDPipeline, ConsisIDTransformer3DModel
from transformers import T5EncoderModel

from teacache.base.quiet import no_progress_bars
from teacache.checkpoint.distances import load_scheduler
from teacache.checkpoint.loading import load_model, reading

PARTS = ("text_encoder", "transformer", "vae")


def load_pipeline(
    checkpoint: Path,
    device: torch.device,
    dtype: torch.dtype,
    offload: str = "none",
    vae_tiling: bool = False,
    parts: tuple[str, ...] = PARTS,
    scheduler: str | None = None,
) -> ConsisIDPipeline:
    """Load the scheduler and some or all of text encoder, transformer and VAE.

    Args:
        offload: `none` keeps every model on the device; `blocks` keeps the transformer in host
            memory, for `teacache.sampling.streaming`; `model` moves each whole model to the device
            when it is used; `sequential` moves layer by layer.
        vae_tiling: whether the VAE works in overlapping tiles, with less memory and not bit for
            bit.
        parts: the members of `PARTS` to load; the pipeline has None for the others.
        scheduler: `dpm` or `ddim`; None for the checkpoint's own.

    Raises:
        CheckpointError: where files are damaged, or their weights do not fit the models.
    """
    classes = {
        "text_encoder": T5EncoderModel,
        "transformer": ConsisIDTransformer3DModel,
        "vae": AutoencoderKLCogVideoX,
    }
    on_host = {"none": (), "blocks": ("transformer",)}.get(offload, PARTS)
    models = dict.fromkeys(PARTS)
    with no_progress_bars():
        for name in parts:
            place = torch.device("cpu") if name in on_host else device
            models[name] = load_model(classes[name], checkpoint / name, place, dtype)
        if "text_encoder" not in parts:
            models["tokenizer"] = None
        with reading(checkpoint):
            pipe = ConsisIDPipeline.from_pretrained(checkpoint, local_files_only=True, **models)
    if scheduler:
        pipe.scheduler = load_scheduler(checkpoint, scheduler)
    pipe.set_progress_bar_config(disable=True)
    if vae_tiling and "vae" in parts:
        pipe.vae.enable_tiling()
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    return pipe
