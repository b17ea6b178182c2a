"""The schedule of a run before it, from a few of the checkpoint's numbers.

For ConsisID the timestep embedding depends on the timestep alone, so which steps are computed
follows from the time embedding's weights, the scheduler's timesteps, the threshold, the
coefficients and the dtype. This reads those out of the checkpoint's files and repeats what
diffusers computes from them, without its seconds of imports; the tests hold the two together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from teacache.checkpoint import is_whole_safetensors, read_json, weight_files, whole_number
from teacache.errors import ArgumentError, CheckpointError
from teacache.jobs import Job
from teacache.policy import Coefficients, Policy, relative_l1
from teacache.tables import aligned

# A planned threshold is a multiple of this: fine enough, and short in a file name.
RESOLUTION = 0.0001
HIGHEST = 1e9  # Coefficients may be of any size. No planned threshold is higher.


def scheduler_timesteps(checkpoint: Path, num_infer_steps: int) -> list[int]:
    """The timesteps of a run, falling, as both CogVideoX schedulers space them.

    Raises:
        ArgumentError: where there are more steps than the scheduler was trained with.
    """
    path = checkpoint / "scheduler" / "scheduler_config.json"
    config = read_json(path, "not a scheduler")
    trained = whole_number(path, config, "num_train_timesteps", 1000)
    spacing = config.get("timestep_spacing", "leading")
    if num_infer_steps > trained:
        raise ArgumentError(
            f"--num_infer_steps {num_infer_steps}: the scheduler knows {trained} timesteps"
        )
    if spacing == "linspace":
        timesteps = np.linspace(0, trained - 1, num_infer_steps).round()[::-1]
    elif spacing == "leading":
        ratio = trained // num_infer_steps
        offset = whole_number(path, config, "steps_offset", 0, least=0)
        timesteps = (np.arange(num_infer_steps) * ratio)[::-1] + offset
    else:  # trailing
        timesteps = np.round(np.arange(trained, 0, -trained / num_infer_steps)) - 1
    return timesteps.astype(np.int64).tolist()


def distances_of(
    checkpoint: Path, guidance_scale: float, device: torch.device, dtype: torch.dtype
) -> Callable[[int], list[float | None]]:
    """A function from the number of denoising steps to x of each step, which remembers."""
    return functools.cache(
        functools.partial(step_distances, checkpoint, guidance_scale, device, dtype)
    )


def step_distances(
    checkpoint: Path,
    guidance_scale: float,
    device: torch.device,
    dtype: torch.dtype,
    num_infer_steps: int,
) -> list[float | None]:
    """x of each step, None for the first, as the sampler will measure it.

    Args:
        guidance_scale: above 1 the embedding is computed for a batch of two, which may round
            differently from one.
    """
    path = checkpoint / "transformer" / "config.json"
    config = read_json(path, "not a transformer")
    inner_dim = whole_number(path, config, "num_attention_heads", 30) * whole_number(
        path, config, "attention_head_dim", 64
    )
    activation = config.get("timestep_activation_fn", "silu")
    if activation != "silu":
        raise CheckpointError(
            f"{checkpoint}: a plan needs a time embedding with silu: {activation}"
        )
    freq_shift = whole_number(path, config, "freq_shift", 0, least=0)
    cosines_first = config.get("flip_sin_to_cos", True)
    weights = _time_embedding(checkpoint, device, dtype)
    if weights["linear_1.weight"].shape[-1] != inner_dim:
        raise CheckpointError(f"{path} does not describe the weights beside it")
    batch = 2 if guidance_scale > 1 else 1
    embeddings = []
    for timestep in scheduler_timesteps(checkpoint, num_infer_steps):
        timesteps = torch.tensor([timestep] * batch, device=device)
        sinusoids = _sinusoids(timesteps, inner_dim, freq_shift, cosines_first).to(dtype)
        hidden = functional.linear(sinusoids, weights["linear_1.weight"], weights["linear_1.bias"])
        embeddings.append(
            functional.linear(
                functional.silu(hidden), weights["linear_2.weight"], weights["linear_2.bias"]
            )
        )
    pairs = zip(embeddings[1:], embeddings, strict=False)
    return [None, *(relative_l1(embedding, previous).item() for embedding, previous in pairs)]


def plan(distances: list[float | None], rel_l1_thresh: float, coefficients: Coefficients) -> Policy:
    """The rule over a run whose distances are known."""
    policy = Policy(len(distances), rel_l1_thresh, coefficients)
    for distance in distances:
        policy.decide(distance)
    return policy


def speedup(policy: Policy) -> float:
    """How much faster the denoising loop is than with every step computed.

    A reused step, some hundredths of a computed one, is taken as free: what is planned then
    depends on the checkpoint alone, and not on what some machine has measured.
    """
    return policy.num_steps / len(policy.computed_steps)


def smallest_threshold(
    distances: list[float | None],
    target_speedup: float,
    coefficients: Coefficients,
) -> float:
    """The smallest multiple of 0.0001 whose schedule reaches the speed-up.

    A higher threshold puts no computed step earlier, so the number of computed steps never rises
    with it and bisection finds the first one.

    Raises:
        ArgumentError: where none does, naming the highest speed-up there is.
    """

    def reached(multiple: int) -> float:
        threshold = round(multiple * RESOLUTION, 4)
        return speedup(plan(distances, threshold, coefficients))

    covered = [x for x in distances if x is not None and coefficients.covers(x)]
    total = min(sum(map(coefficients.rescale, covered)), HIGHEST)
    everything = math.ceil(total / RESOLUTION) + 1
    best = reached(everything)
    low, high = 0, everything
    while low < high:
        middle = (low + high) // 2
        enough = reached(middle) >= min(target_speedup, best)
        low, high = (low, middle) if enough else (middle + 1, high)
    threshold = round(low * RESOLUTION, 4)
    if best < target_speedup:
        raise ArgumentError(
            f"--target_speedup {target_speedup:g} cannot be reached: the nearest is {best:.2f}, "
            f"from --rel_l1_thresh {threshold} on"
        )
    return threshold


def with_thresholds(
    jobs: list[Job],
    target_speedup: float | None,
    coefficients: Coefficients,
    distances: Callable[[int], list[float | None]],
) -> list[Job]:
    """The jobs, each that has no threshold with the smallest one that reaches the speed-up."""

    def threshold(job: Job) -> float:
        if job.rel_l1_thresh is not None:
            return job.rel_l1_thresh
        return smallest_threshold(distances(job.num_infer_steps), target_speedup, coefficients)

    planned = (dataclasses.replace(job, rel_l1_thresh=threshold(job)) for job in jobs)
    return list(dict.fromkeys(planned))


class Costs(NamedTuple):
    """Seconds on record from an earlier run: of a computed step, a reused one, and of decoding."""

    computed_step: float
    reused_step: float
    decoding: float
    device_name: str


def known_costs(folder: Path, settings: dict[str, object]) -> Costs | None:
    """What the newest record in `folder` with these settings says that steps take, or None.

    Args:
        settings: the record's entries that the seconds depend on, such as `width` and `dtype`.
    """
    found = []
    for path in _newest_first(folder.glob("[!.]*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if all(record[name] == value for name, value in settings.items()):
                found.append(
                    Costs(
                        record["computed_step_seconds"],
                        # Without reuse on record: next to nothing, beside a computed step.
                        record["reused_step_seconds"] or 0.0,
                        record["seconds"]["decoding"],
                        record["device_name"],
                    )
                )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a sweep's report, no record at all, or one that is gone meanwhile
    with_reuse = [costs for costs in found if costs.reused_step]
    return next(iter(with_reuse or found), None)


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    """The files that are there, by the time of their last change."""
    times = {}
    for path in paths:
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime
    return sorted(times, key=times.get, reverse=True)


def describe(policies: list[Policy], costs: Costs | None) -> str:
    """The planned schedules as a table: a line for each, its cells filled where it computes."""
    head = ["rel_l1_thresh", "computed", "speed-up", *(["seconds"] if costs else []), "schedule"]
    lines = [head]
    for policy in policies:
        computed = set(policy.computed_steps)
        line = [
            f"{policy.rel_l1_thresh:g}",
            f"{len(computed)} of {policy.num_steps}",
            f"{speedup(policy):.2f}x",
        ]
        if costs:
            reused = len(policy.reused_steps)
            denoising = costs.computed_step * len(computed) + costs.reused_step * reused
            line.append(f"{denoising + costs.decoding:.1f}")
        line.append("".join("■" if n in computed else "□" for n in range(policy.num_steps)))
        lines.append(line)
    remarks = ["speed-up: of the denoising loop over threshold 0, a reused step taken as free"]
    if costs:
        remarks.append(f"seconds: denoising and decoding, from a record of {costs.device_name}")
    outside = sum(len(policy.extrapolated_steps) for policy in policies)
    if outside:
        remarks.append("some distances lie outside what the coefficients cover: computed")
    return "\n".join([aligned(lines), "", *remarks])


def _time_embedding(
    checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights and biases of the two layers, read from wherever among the shards they are."""
    from safetensors import safe_open

    prefix = "time_embedding."
    found = {}
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
                    found[name.removeprefix(prefix)] = file.get_tensor(name).to(device, dtype)
    missing = {f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")} - set(found)
    if missing:
        raise CheckpointError(f"{checkpoint}/transformer lacks {prefix}{min(missing)}")
    return found


def _sinusoids(
    timesteps: torch.Tensor, inner_dim: int, freq_shift: int, cosines_first: bool
) -> torch.Tensor:
    """[batch, inner dim] in float32: sines and cosines, from fast to slow.

    The operations and their order are those of `diffusers.models.embeddings`, since the plan has
    to equal the run to the bit.
    """
    half = inner_dim // 2
    exponent = -math.log(10000) * torch.arange(
        0, half, dtype=torch.float32, device=timesteps.device
    )
    frequencies = torch.exp(exponent / (half - freq_shift))
    angles = timesteps[:, None].float() * frequencies[None, :]
    both = (torch.sin(angles), torch.cos(angles))
    return torch.cat(both[::-1] if cosines_first else both, dim=-1)
