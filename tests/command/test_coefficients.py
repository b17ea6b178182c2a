"""Coefficients that `teacache.fit` fits on a checkpoint, and the sampler that takes them."""

import datetime
import json

import pytest
from support import handlers_given_back, main

from teacache.fit.__main__ import POOR
from teacache.fit.__main__ import main as fit

STEPS = 8
SMALL = ("--ckpts_path", "tiny", "--num_infer_steps", str(STEPS), "--num_frames", "1")


def fitted(*arguments: object) -> int:
    with handlers_given_back():
        return fit([str(argument) for argument in (*SMALL, *arguments)])


def test_a_fit_on_two_videos_then_a_plan_and_a_video_with_it(capsys, tmp_path):
    path = tmp_path / "fit" / "own.json"
    assert fitted("--seed", 1, 2, "--output", path) == 0
    output, error = capsys.readouterr()
    data = json.loads(path.read_text())
    assert output.splitlines()[-1] == f"coefficients {path}, R2 {data['r2']:.2f}"
    assert POOR < data["r2"] < 1
    assert "R2 is" not in error
    assert len(data["values"]) == 5
    low, high = data["fitted_range"]
    assert 0 < low < high
    assert data["source"] == "fitted on tiny at 8 steps"
    assert (data["videos"], data["checkpoint"], data["num_infer_steps"]) == (2, "tiny", STEPS)
    assert data["scheduler"] == "CogVideoXDPMScheduler"
    assert data["versions"].keys() == {"teacache", "torch", "diffusers", "transformers"}
    assert datetime.date.fromisoformat(data["date"])
    assert list(path.parent.iterdir()) == [path]

    code, output, _ = main(capsys, *SMALL, "--coefficients", path, "--plan")
    assert code == 0
    assert output.count(" of 8") == 4
    out = tmp_path / "out"
    code, _, _ = main(capsys, *SMALL, "--coefficients", path, "--output_path", out)
    assert code == 0
    record = json.loads((out / "42_0.1_0000.json").read_text())
    assert record["coefficients"] == {key: data[key] for key in record["coefficients"]}
    assert record["checkpoint_sha256"] == data["checkpoint_sha256"]


def test_a_poor_fit_is_warned_of(capsys, tmp_path, monkeypatch):
    """Where no R2 is good enough."""
    monkeypatch.setattr("teacache.fit.__main__.POOR", 2.0)
    assert fitted("--output", tmp_path / "own.json") == 0
    assert "says little about this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--num_infer_steps", 7), "a fit needs one number, 8 or more: found 7"),
        (("--jobs", "JOBS"), "a fit needs one number, 8 or more: found 8, 9"),
        (("--output", "a.txt"), ".json"),
    ],
)
def test_refused_before_loading(capsys, tmp_path, arguments, complaint):
    (tmp_path / "jobs.jsonl").write_text('{"num_infer_steps": 8}\n{"num_infer_steps": 9}\n')
    words = [tmp_path / "jobs.jsonl" if word == "JOBS" else word for word in arguments]
    try:
        code = fitted("--output", tmp_path / "own.json", *words)
    except SystemExit as end:
        code = end.code
    output, error = capsys.readouterr()
    assert (code, error.count("\n")) == (2, 1)
    assert complaint in error
    assert "loading" not in output
    assert not (tmp_path / "own.json").exists()
