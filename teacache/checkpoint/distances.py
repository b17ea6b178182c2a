"""The relative L1 distances of a video's steps, computed before it is sampled.

The timestep embedding depends only on the timestep. So the distances follow from the weights of
the time embedding, the scheduler's timesteps and the dtype. The same classes of diffusers compute
them here and in the pipeline.
"""

import functools
import inspect
from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from safetensors import safe_open

from teacache.base.errors import ArgumentError
from teacache.checkpoint.folder import read_json, weight_files
from teacache.checkpoint.loading import reading
from teacache.core.forecast import Scheduler
from teacache.core.rule import distances_between

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
SCHEDULERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}


def scheduler_name(checkpoint: Path) -> str:
    """The checkpoint's scheduler, `dpm` or `ddim`; `dpm`, as published, for any other."""
    own = read_json(checkpoint / SCHEDULER_CONFIG).get("_class_name")
    return next((name for name, kind in SCHEDULERS.items() if kind.__name__ == own), "dpm")


def load_scheduler(checkpoint: Path, name: str | None) -> Scheduler:
    """The scheduler `dpm` or `ddim`, or the checkpoint's own, with the checkpoint's configuration.

    Raises:
        CheckpointError: where the configuration is not one of that class.
    """
    config = read_json(checkpoint / SCHEDULER_CONFIG)
    kind = SCHEDULERS[name or scheduler_name(checkpoint)]
    # Not from_config, which imports every compatible scheduler: a second of CPU time.
    known = inspect.signature(kind.__init__).parameters
    with reading(checkpoint / SCHEDULER_CONFIG):
        return kind(**{name: value for name, value in config.items() if name in known})


@functools.lru_cache  # most videos of a run have the same number of steps
def step_distances(
    checkpoint: Path,
    scheduler: Scheduler,
    guidance_scale: float,
    device: torch.device,
    dtype: torch.dtype,
    num_infer_steps: int,
) -> tuple[float | None, ...]:
    """The relative L1 distance of each step, bit for bit as in the sampler; None for the first.

    Args:
        guidance_scale: above 1 the embeddings are computed in a batch of two, which may round
            differently from a batch of one.

    Raises:
        ArgumentError: where the scheduler has fewer timesteps than there are steps.
        CheckpointError: where scheduler or time embedding cannot be read.
    """
    trained = scheduler.config.num_train_timesteps
    if num_infer_steps > trained:
        raise ArgumentError(
            f"--num_infer_steps {num_infer_steps}: the scheduler knows {trained} timesteps"
        )
    with reading(checkpoint / SCHEDULER_CONFIG):
        scheduler.set_timesteps(num_infer_steps)
    sinusoids, embed = _time_embedding(checkpoint, device, dtype)
    batch = 2 if guidance_scale > 1 else 1
    timesteps = scheduler.timesteps.to(device)
    with torch.no_grad():
        return distances_between([embed(sinusoids(t.expand(batch)).to(dtype)) for t in timesteps])


def _time_embedding(
    checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> tuple[Timesteps, TimestepEmbedding]:
    """The sinusoids, and the two layers after them with the checkpoint's weights."""
    config = read_json(checkpoint / "transformer" / "config.json")
    inner_dim = config.get("num_attention_heads", 30) * config.get("attention_head_dim", 64)
    with reading(checkpoint / "transformer"):
        with torch.device("meta"):
            embed = TimestepEmbedding(
                inner_dim,
                config.get("time_embed_dim", 512),
                config.get("timestep_activation_fn", "silu"),
            )
        embed.load_state_dict(_time_embedding_weights(checkpoint, device, dtype), assign=True)
    flip, shift = config.get("flip_sin_to_cos", True), config.get("freq_shift", 0)
    return Timesteps(inner_dim, flip, shift), embed


def _time_embedding_weights(
    checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights and biases of the two layers, from any of the shards."""
    prefix = "time_embedding."
    weights = {}
    for path in weight_files(checkpoint / "transformer"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.startswith(prefix):
                    # No other copy than in the pipeline's loader: a matrix product may round
                    # differently where its operands are aligned differently in memory.
                    weights[name.removeprefix(prefix)] = file.get_tensor(name).to(device, dtype)
    return weights
