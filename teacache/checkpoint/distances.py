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

from teacache.base.errors import ArgumentError, CheckpointError
from teacache.checkpoint.configuration import read_json, whole_number
from teacache.checkpoint.folder import is_whole_safetensors, weight_files
from teacache.core.forecast import Scheduler
from teacache.core.rule import distances_between

SCHEDULERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}


def scheduler_name(checkpoint: Path) -> str:
    """`dpm` or `ddim`, as the checkpoint has it; `dpm` where it has another, as published."""
    config = read_json(checkpoint / "scheduler" / "scheduler_config.json", "not a scheduler")
    own = config.get("_class_name")
    return next((name for name, kind in SCHEDULERS.items() if kind.__name__ == own), "dpm")


def load_scheduler(checkpoint: Path, name: str | None) -> Scheduler:
    """The scheduler of that name, or the checkpoint's own, with the checkpoint's configuration."""
    path = checkpoint / "scheduler" / "scheduler_config.json"
    config = read_json(path, "not a scheduler")
    whole_number(path, config, "num_train_timesteps", 1000)
    kind = SCHEDULERS[name or scheduler_name(checkpoint)]
    # Not from_config, which imports every scheduler that is compatible: a second of CPU.
    known = inspect.signature(kind.__init__).parameters
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
    """
    trained = scheduler.config.num_train_timesteps
    if num_infer_steps > trained:
        raise ArgumentError(
            f"--num_infer_steps {num_infer_steps}: the scheduler knows {trained} timesteps"
        )
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
    path = checkpoint / "transformer" / "config.json"
    config = read_json(path, "not a transformer")
    inner_dim = whole_number(path, config, "num_attention_heads", 30) * whole_number(
        path, config, "attention_head_dim", 64
    )
    freq_shift = whole_number(path, config, "freq_shift", 0, least=0)
    time_embed_dim = whole_number(path, config, "time_embed_dim", 512)
    weights = _time_embedding_weights(checkpoint, device, dtype)
    with torch.device("meta"):
        try:
            embed = TimestepEmbedding(
                inner_dim, time_embed_dim, config.get("timestep_activation_fn", "silu")
            )
            embed.load_state_dict(weights, assign=True)
        except (RuntimeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} does not describe the weights beside it") from error
    return Timesteps(inner_dim, config.get("flip_sin_to_cos", True), freq_shift), embed


def _time_embedding_weights(
    checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights and biases of the two layers, read from wherever among the shards they are."""
    from safetensors import safe_open

    prefix = "time_embedding."
    weights = {}
    for path in weight_files(checkpoint / "transformer"):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: a plan reads the time embedding in it")
        if not is_whole_safetensors(path):
            raise CheckpointError(f"{path} is cut short or damaged")
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name.startswith(prefix):
                    # Copied only where the pipeline's loader copies too: with operands that are
                    # aligned differently in memory a matrix product may round differently.
                    weights[name.removeprefix(prefix)] = file.get_tensor(name).to(device, dtype)
    missing = {f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")} - set(weights)
    if missing:
        raise CheckpointError(f"{checkpoint}/transformer lacks {prefix}{min(missing)}")
    return weights
