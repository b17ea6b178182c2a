"""The relative L1 distances of a run before it, from a few of the checkpoint's numbers.

The timestep embedding depends on the timestep alone, so which steps are computed follows from the
time embedding's weights, the scheduler's timesteps, the threshold, the coefficients and the dtype.
Timesteps and embeddings are computed by the classes of diffusers that the pipeline computes them
with.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
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
    """`dpm` or `ddim`, as the checkpoint has it; `dpm` where it has another, as published."""
    own = read_json(checkpoint / SCHEDULER_CONFIG).get("_class_name")
    return next((name for name, kind in SCHEDULERS.items() if kind.__name__ == own), "dpm")


def load_scheduler(checkpoint: Path, name: str | None) -> Scheduler:
    """The scheduler of that name, or the checkpoint's own, with the checkpoint's configuration.

    Raises:
        CheckpointError: where its class cannot be made with that configuration.
    """
    config = read_json(checkpoint / SCHEDULER_CONFIG)
    kind = SCHEDULERS[name or scheduler_name(checkpoint)]
    # Not from_config, which imports every scheduler that is compatible: a second of CPU.
    known = inspect.signature(kind.__init__).parameters
    with reading(checkpoint / SCHEDULER_CONFIG):
        return kind(**{name: value for name, value in config.items() if name in known})


def distances_of(
    checkpoint: Path,
    scheduler: Scheduler,
    guidance_scale: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[int], tuple[float | None, ...]]:
    """A memoised function: number of denoising steps -> relative L1 distance of each step."""
    return functools.cache(
        functools.partial(step_distances, checkpoint, scheduler, guidance_scale, device, dtype)
    )


def step_distances(
    checkpoint: Path,
    scheduler: Scheduler,
    guidance_scale: float,
    device: torch.device,
    dtype: torch.dtype,
    num_infer_steps: int,
) -> tuple[float | None, ...]:
    """The relative L1 distance of each step, None for the first, as the sampler will measure it.

    Args:
        guidance_scale: above 1 the embedding is computed for a batch of two, which may round
            differently from one.

    Raises:
        ArgumentError: where there are more steps than the scheduler was trained with.
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
    """The transformer's sinusoids and the two layers behind them, with the checkpoint's weights."""
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
    """Weights and biases of the two layers, read from wherever among the shards they are."""
    prefix = "time_embedding."
    weights = {}
    for path in weight_files(checkpoint / "transformer"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name.startswith(prefix):
                    # Copied only where the pipeline's loader copies too: with operands that are
                    # aligned differently in memory a matrix product may round differently.
                    weights[name.removeprefix(prefix)] = file.get_tensor(name).to(device, dtype)
    return weights
