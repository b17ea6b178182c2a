"""A calibration: what reuse was measured to cost on one checkpoint, as a JSON file.

`python3 -m teacache.calibrate` writes one, `--schedule calibrated` reads it. It holds for its
checkpoint, scheduler and number of steps alone, and says which.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacache.base.errors import ArgumentError
from teacache.base.files import cache_folder
from teacache.checkpoint.configuration import read_json
from teacache.checkpoint.folder import weight_files
from teacache.core.calibrated import Costs

HASHED_BYTES = 2**20  # of each weight file: its header, and some of the weights
DIGITS = 5  # that are written of each number


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was measured, and on what.

    Attributes:
        costs: of reuse.
        checkpoint_digest, scheduler: see `checkpoint_digest` and `scheduler_of`.
        others: all else that is on record, by key.
    """

    costs: Costs
    checkpoint_digest: str
    scheduler: dict[str, Any]
    others: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """One object; a cost that was not measured is null."""
        return {
            **self.others,
            "checkpoint_digest": self.checkpoint_digest,
            "scheduler": self.scheduler,
            "num_infer_steps": self.costs.num_steps,
            "sensitivity": rounded(self.costs.sensitivity),
            "cost": rounded(self.costs.cost),
            "alignment": rounded(self.costs.alignment),
        }


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file.

    Raises:
        ArgumentError: naming the key that is missing or wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"the calibration {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"the calibration {path} is no JSON: {error}") from error
    try:
        return _from_json(data)
    except ValueError as error:
        raise ArgumentError(f"the calibration {path} is damaged: {error}") from error


def find_calibration(checkpoint: Path, num_infer_steps: int) -> Path:
    """Where a checkpoint's calibration for so many steps lies: in its folder, or in the cache.

    Raises:
        ArgumentError: where it has none.
    """
    own = checkpoint / f"calibration_{num_infer_steps}.json"
    if own.is_file():
        return own
    kept = cached_calibration(checkpoint, num_infer_steps)
    if kept.is_file():
        return kept
    raise ArgumentError(
        f"--schedule calibrated: {checkpoint} has no calibration for {num_infer_steps} steps: "
        "python3 -m teacache.calibrate makes one"
    )


def cached_calibration(checkpoint: Path, num_infer_steps: int) -> Path:
    """Where `teacache.calibrate` writes it unless told otherwise."""
    name = f"{checkpoint_digest(checkpoint)[:16]}_{num_infer_steps}.json"
    return cache_folder() / "calibrations" / name


def check_fits(
    calibration: Calibration, path: Path, checkpoint: Path, num_infer_steps: int
) -> None:
    """Raise ArgumentError where a calibration is of something else than what is sampled with."""
    steps = calibration.costs.num_steps
    wrong = None
    if steps != num_infer_steps:
        wrong = f"{steps} steps, and this run has {num_infer_steps}"
    elif calibration.scheduler != scheduler_of(checkpoint):
        wrong = f"another scheduler than that of {checkpoint}"
    elif calibration.checkpoint_digest != checkpoint_digest(checkpoint):
        wrong = f"another transformer than that of {checkpoint}"
    if wrong:
        raise ArgumentError(f"the calibration {path} is of {wrong}")


def checkpoint_digest(checkpoint: Path) -> str:
    """A sha256 of the transformer: its configuration, and the first megabyte of each weight file.

    Of the whole 11 GB it would take longer than a plan may.
    """
    folder = checkpoint / "transformer"
    digest = hashlib.sha256(json.dumps(_configuration(folder / "config.json")).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()


def scheduler_of(checkpoint: Path) -> dict[str, Any]:
    """What the scheduler's configuration says."""
    return _configuration(checkpoint / "scheduler" / "scheduler_config.json")


def rounded(numbers: np.ndarray) -> list[Any]:
    """Nested lists of numbers to some digits; those that JSON has not are null."""
    if numbers.ndim > 1:
        return [rounded(row) for row in numbers]
    return [float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None for x in numbers.tolist()]


def _configuration(path: Path) -> dict[str, Any]:
    """Without what does not change the model: where it was, and which diffusers wrote it."""
    return {
        key: value
        for key, value in sorted(read_json(path, "no configuration").items())
        if key not in ("_diffusers_version", "_name_or_path")
    }


def _from_json(data: object) -> Calibration:
    """Raises ValueError in a few words."""
    if not isinstance(data, dict):
        raise ValueError("it is no object")
    known = (
        "checkpoint_digest",
        "scheduler",
        "num_infer_steps",
        "sensitivity",
        "cost",
        "alignment",
    )
    lacking = [key for key in known if key not in data]
    if lacking:
        raise ValueError(f"it lacks {lacking[0]}")
    steps = data["num_infer_steps"]
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_infer_steps is no number of steps: {steps!r}")
    for key, kind in (("checkpoint_digest", str), ("scheduler", dict)):
        if not isinstance(data[key], kind):
            raise ValueError(f"{key} is {data[key]!r}")
    costs = Costs(
        cost=_numbers(data, "cost", (steps, steps), missing=math.inf),
        sensitivity=_numbers(data, "sensitivity", (steps,)),
        alignment=_numbers(data, "alignment", (steps, steps)),
    )
    others = {key: value for key, value in data.items() if key not in known}
    return Calibration(costs, data["checkpoint_digest"], data["scheduler"], others)


def _numbers(
    data: dict[str, Any], key: str, shape: tuple[int, ...], missing: float | None = None
) -> np.ndarray:
    """Args: missing: what null stands for."""
    try:
        found = np.array(data[key], dtype=float)  # null becomes NaN
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} holds what is no number") from error
    if found.shape != shape:
        raise ValueError(f"{key} is of shape {list(found.shape)}, not {list(shape)}")
    if missing is not None:
        found = np.where(np.isnan(found), missing, found)
    if np.isnan(found).any():
        raise ValueError(f"{key} has no number somewhere")
    return found
