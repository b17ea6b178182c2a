"""Schedules that no threshold chooses, and the calibration that some of them follow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from support import ROOT, encoded, handlers_given_back, main

from teacache.calibrate.__main__ import main as calibrate
from teacache.checkpoint.calibration import checkpoint_digest
from teacache.embedded import build
from teacache.results.video import read_video

STEPS = 8
SMALL = ("--ckpts_path", "tiny", "--num_infer_steps", str(STEPS), "--num_frames", "1")


def measured(*arguments: object) -> int:
    with handlers_given_back():
        return calibrate([str(argument) for argument in (*SMALL, *arguments)])


@pytest.fixture(scope="module")
def calibration(tiny, tmp_path_factory):
    """Of two videos of one frame."""
    path = tmp_path_factory.mktemp("calibration") / "c.json"
    assert measured("--seed", 1, 2, "--output", path) == 0
    return path


def records(folder: Path) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in folder.glob("42_*.json")}


def planned(output: str) -> dict[str, list[int]]:
    """The computed steps of each line of a plan, by what it begins with."""
    found = {}
    for line in output.splitlines():
        if "■" in line:
            *words, cells = line.split()
            found[" ".join(words[:2])] = [n for n, cell in enumerate(cells) if cell == "■"]
    return found


def test_plan_sampler_and_record_agree(capsys, tmp_path, calibration):
    (tmp_path / "list.json").write_text("[5, 3]")
    arguments = (
        *(*SMALL, "--schedule", "even", "calibrated", tmp_path / "list.json"),
        *("--computed_steps", 3, 5, "--calibration", calibration),
    )
    code, output, _ = main(capsys, *arguments, "--plan")
    assert code == 0
    plan = planned(output)
    assert list(plan)[-5:] == ["even 3", "even 5", "calibrated 3", "calibrated 5", "listed 4"]
    assert next(iter(plan)) == "threshold 0.05", "beside the published rule's"
    assert plan["even 3"] == [0, 6, 7]
    assert plan["even 5"] == [0, 2, 5, 6, 7]
    assert plan["listed 4"] == [0, 3, 5, 7]
    code, _, _ = main(capsys, *arguments, "--output_path", tmp_path / "out")
    assert code == 0
    found = records(tmp_path / "out")
    assert len(found) == 5
    for name, steps in list(plan.items())[-5:]:
        record = found[f"42_{name.replace(' ', '')}_0000"]
        assert record["computed_steps"] == record["selected_steps"] == steps
        assert (record["schedule"], record["rel_l1_thresh"]) == (name, None)
        assert record["calibration"] == (str(calibration) if "calib" in name else None)
    # The record of one lists the steps of another, which is then the same to the byte.
    again = tmp_path / "out" / "42_calibrated5_0000.json"
    code, _, _ = main(capsys, *SMALL, "--schedule", again, "--output_path", tmp_path / "again")
    assert code == 0
    listed = tmp_path / "again" / "42_listed5_0000.mp4"
    assert encoded(listed) == encoded(again.with_suffix(".mp4"))


def test_a_sweep_over_schedules_of_either_kind(capsys, tmp_path, calibration):
    arguments = (
        *(*SMALL, "--rel_l1_thresh", 0, 0.2, "--schedule", "even", "calibrated"),
        *("--computed_steps", 3, 4, "--calibration", calibration, "--output_path", tmp_path),
    )
    code, output, _ = main(capsys, *arguments)
    assert code == 0
    report = json.loads((tmp_path / "sweep_42_0000.json").read_text())
    names = [row["schedule"] or row["rel_l1_thresh"] for row in report["rows"]]
    assert names == [0.0, 0.2, "even 3", "even 4", "calibrated 3", "calibrated 4"]
    assert all("psnr" in row["quality"] for row in report["rows"][1:])
    for words in ("threshold 0.2  ", "calibrated 4  ", "schedule  computed"):
        assert words in output
    markdown = (tmp_path / "sweep_42_0000.md").read_text()
    assert "| calibrated 4 |" in markdown
    with Image.open(tmp_path / "sweep_42_0000.png") as figure:
        assert figure.width == 1200
    assert read_video(tmp_path / "sweep_42_0000.mp4").frames.shape[0] == 1
    # Another schedule is another video; the same one is not sampled again.
    code, output, _ = main(capsys, *arguments, "--resume")
    assert code == 0
    assert output.count("done before") == 6
    code, output, _ = main(
        capsys, *SMALL, "--schedule", "even", "--computed_steps", 5, "--resume", "--quiet",
        "--output_path", tmp_path,
    )  # fmt: skip
    assert output == f"{tmp_path}/42_even5_0000.mp4\n"


def test_a_speed_up_in_place_of_a_number(capsys):
    code, output, _ = main(capsys, *SMALL, "--schedule", "even", "--target_speedup", 2.1, "--plan")
    assert code == 0
    assert planned(output)["even 3"], "8 / 3 is above 2.1, 8 / 4 is not"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--schedule", "even"), "is said by --computed_steps or --target_speedup"),
        (("--computed_steps", 3), "--computed_steps: needs --schedule even or calibrated"),
        (("--schedule", "all"), "--schedule: neither even nor calibrated, and all cannot be read"),
        (("--schedule", "even", "--computed_steps", 1), "--computed_steps 1: of 8 steps 2 to 8"),
        (("--schedule", "even", "--computed_steps", 9), "--computed_steps 9: of 8 steps 2 to 8"),
        (("--schedule", "even", "--target_speedup", 5), "--target_speedup 5 cannot be reached"),
        (("--schedule", "calibrated", "--computed_steps", 3), "has no calibration for 8 steps"),
        (("--schedule", "LIST"), "step 8 cannot be computed: the video has 8 steps"),
        (("--schedule", "WORDS"), "lists no steps, such as [0, 4, 8, 9]"),
        (("--calibration", "LIST"), "--calibration: needs --schedule calibrated"),
        (
            ("--schedule", "even", "--computed_steps", 3, "--target_speedup", 2),
            "--target_speedup: not allowed with argument --computed_steps",
        ),
        (
            ("--schedule", "calibrated", "--computed_steps", 3, "--calibration", "LIST"),
            "is damaged: it is no object",
        ),
    ],
)
def test_refused_in_one_line_before_loading(capsys, tmp_path, arguments, complaint):
    (tmp_path / "list.json").write_text("[0, 8]")
    (tmp_path / "words.json").write_text('{"steps": [1]}')
    files = {"LIST": tmp_path / "list.json", "WORDS": tmp_path / "words.json"}
    arguments = [files.get(argument, argument) for argument in arguments]
    code, output, error = main(capsys, *SMALL, *arguments, "--output_path", tmp_path / "out")
    assert code == 2
    assert complaint in error.splitlines()[-1]
    assert "loading" not in output


def test_a_calibration_of_something_else_is_refused(capsys, tmp_path, calibration):
    asked = ("--schedule", "calibrated", "--computed_steps", 4, "--calibration", calibration)
    code, _, error = main(capsys, "--ckpts_path", "tiny", *asked, "--output_path", tmp_path)
    assert code == 2
    assert error == f"error: the calibration {calibration} is of 8 steps, and this run has 50\n"


def test_what_a_calibration_says(calibration):
    data = json.loads(calibration.read_text())
    assert [video["seed"] for video in data["videos"]] == [1, 2]
    assert data["versions"].keys() == {"torch", "diffusers", "transformers"}
    assert data["num_infer_steps"] == len(data["sensitivity"]) == len(data["magnitudes"]) == STEPS
    assert data["magnitudes"][-1] is None
    assert len(data["coefficients"]["values"]) == 5
    assert data["r2"] <= 1
    assert data["cost"][3][2] is None
    assert data["cost"][2][3] > 0
    with Image.open(calibration.with_suffix(".png")) as figure:
        assert figure.width == 1200
    assert not calibration.with_suffix(".partial").exists()


def test_a_fitted_polynomial_goes_into_the_rule(capsys, tmp_path, calibration):
    code, _, _ = main(capsys, *SMALL, "--coefficients", calibration, "--output_path", tmp_path)
    assert code == 0
    record = json.loads((tmp_path / "42_0.1_0000.json").read_text())
    assert record["coefficients"] == json.loads(calibration.read_text())["coefficients"]


def test_killed_then_gone_on_with(tmp_path, monkeypatch, calibration):
    """Of the same videos: what comes out is the same, and what was measured is not again."""
    output = tmp_path / "c.json"
    command = [sys.executable, "-m", "teacache.calibrate", *SMALL, "--seed", "1", "2"]
    command += ["--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    partial = tmp_path / "c.partial"
    deadline = time.monotonic() + 120
    while len(list(partial.glob("0_*.pt"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    first = {path: os.stat(path).st_mtime_ns for path in partial.glob("0_*.pt")}
    assert measured("--seed", 1, "--output", output) == 2, "other videos"
    seen, remove = [], shutil.rmtree

    def watched(path):
        seen.append({path: os.stat(path).st_mtime_ns for path in first})
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", watched)
    assert measured("--seed", 1, 2, "--output", output) == 0
    assert seen == [first]
    whole, resumed = (json.loads(path.read_text()) for path in (calibration, output))
    assert whole == resumed


def test_too_few_steps_for_a_calibration(capsys, tmp_path):
    assert measured("--num_infer_steps", 7, "--output", tmp_path / "c.json") == 2
    assert "a calibration needs 8 or more" in capsys.readouterr().err


def test_the_embedded_checkpoint_has_its_own_calibration(capsys, tiny):
    """Of the weights that it has: whoever trains it anew calibrates it anew."""
    shipped = json.loads(Path(build.__file__).with_name(build.CALIBRATION).read_text())
    assert shipped["checkpoint_digest"] == checkpoint_digest(tiny)
    code, output, _ = main(
        capsys, "--ckpts_path", "tiny", "--plan", "--schedule", "calibrated",
        "--computed_steps", 12, 22,
    )  # fmt: skip
    assert code == 0
    plan = planned(output)
    assert [len(plan[f"calibrated {n}"]) for n in (12, 22)] == [12, 22]


def test_extrapolated_residuals_make_another_video_and_go_on_record(capsys, tmp_path):
    arguments = (*SMALL, "--schedule", "even", "--computed_steps", 5, "--output_path", tmp_path)
    for flags in ((), ("--extrapolate",)):
        code, _, said = main(capsys, *arguments, *flags)
        assert code == 0, said
    plain, ahead = (records(tmp_path)[f"42_even5_000{index}"] for index in (0, 1))
    assert (plain["extrapolate"], ahead["extrapolate"]) == (False, True)
    assert plain["computed_steps"] == ahead["computed_steps"]
    frames = [read_video(tmp_path / f"42_even5_000{index}.mp4").frames for index in (0, 1)]
    assert (frames[0] != frames[1]).any()
    # The same settings are one of them, and not the other.
    code, output, _ = main(capsys, *arguments, "--extrapolate", "--resume")
    assert code == 0
    assert f"done before {tmp_path / '42_even5_0001.mp4'}" in output
