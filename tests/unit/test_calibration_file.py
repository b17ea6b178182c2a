"""A calibration's file: written, read again, refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from teacache.base.errors import ArgumentError
from teacache.checkpoint import calibration as file
from teacache.core.calibrated import Costs

CONFIG = {"_class_name": "ConsisIDTransformer3DModel", "num_layers": 2, "_diffusers_version": "1"}
SCHEDULER = {"_class_name": "CogVideoXDPMScheduler", "timestep_spacing": "trailing"}


@pytest.fixture
def checkpoint(tmp_path):
    """What of a checkpoint a calibration reads."""
    folder = tmp_path / "checkpoint"
    for name in ("transformer", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 3000)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


@pytest.fixture
def made(checkpoint):
    cost = np.triu(np.linspace(0.1, 1, 16).reshape(4, 4), 1)
    cost[cost == 0] = np.inf
    costs = Costs(cost, np.array([0, 1 / 3, 2.0, 0]), np.eye(4))
    scheduler = file.scheduler_of(checkpoint)
    return file.Calibration(costs, file.checkpoint_digest(checkpoint), scheduler, {"videos": [1]})


def test_comes_back(made, tmp_path, checkpoint):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(made.as_json(), allow_nan=False))
    again = file.read_calibration(path)
    file.check_fits(again, path, checkpoint, 4)
    for name in ("cost", "sensitivity", "alignment"):
        # Five digits are written.
        assert np.allclose(getattr(again.costs, name), getattr(made.costs, name), rtol=1e-4)
    assert again.others == {"videos": [1]}
    assert again.as_json() == made.as_json()


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"cost": [[1.0]]}, r"cost is of shape \[1, 1\], not \[4, 4\]"),
        ({"cost": [[1], [1, 2]]}, "cost holds what is no number"),
        ({"sensitivity": [0, None, 1, 0]}, "sensitivity has no number somewhere"),
        ({"alignment": "eye"}, "alignment holds what is no number"),
        ({"num_infer_steps": "4"}, "num_infer_steps is no number of steps: '4'"),
        ({"scheduler": None}, "scheduler is None"),
        ({"checkpoint_digest": 5}, "checkpoint_digest is 5"),
    ],
)
def test_a_damaged_one_names_its_key(made, tmp_path, changed, complaint):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**made.as_json(), **changed}))
    with pytest.raises(ArgumentError, match=f"{path} is damaged: {complaint}"):
        file.read_calibration(path)


def test_what_is_none(made, tmp_path):
    path = tmp_path / "c.json"
    for key in ("cost", "alignment", "sensitivity", "scheduler", "num_infer_steps"):
        whole = made.as_json()
        del whole[key]
        path.write_text(json.dumps(whole))
        with pytest.raises(ArgumentError, match=f"is damaged: it lacks {key}"):
            file.read_calibration(path)
    for content, complaint in (("[]", "it is no object"), ("{", "is no JSON")):
        path.write_text(content)
        with pytest.raises(ArgumentError, match=complaint):
            file.read_calibration(path)
    with pytest.raises(ArgumentError, match="cannot be read: No such file"):
        file.read_calibration(tmp_path / "none.json")


def test_of_something_else(made, tmp_path, checkpoint):
    path = tmp_path / "c.json"
    with pytest.raises(ArgumentError, match="is of 4 steps, and this run has 50"):
        file.check_fits(made, path, checkpoint, 50)
    other = dataclasses.replace(made, scheduler={**SCHEDULER, "_class_name": "CogVideoXDDIM"})
    with pytest.raises(ArgumentError, match="is of another scheduler than that of"):
        file.check_fits(other, path, checkpoint, 4)
    # Another version of diffusers has written the same configuration.
    config = checkpoint / "transformer" / "config.json"
    config.write_text(json.dumps({**CONFIG, "_diffusers_version": "2"}))
    file.check_fits(made, path, checkpoint, 4)
    weights = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"x" * 2999 + b"y")
    with pytest.raises(ArgumentError, match="is of another transformer than that of"):
        file.check_fits(made, path, checkpoint, 4)


def test_where_it_is_looked_for(made, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ArgumentError, match="has no calibration for 4 steps: python3 -m teacache"):
        file.find_calibration(checkpoint, 4)
    kept = file.cached_calibration(checkpoint, 4)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps(made.as_json()))
    assert file.find_calibration(checkpoint, 4) == kept
    own = checkpoint / "calibration_4.json"
    own.write_text(kept.read_text())
    assert file.find_calibration(checkpoint, 4) == own
