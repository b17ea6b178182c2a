"""Schedules that no threshold chooses: listed steps."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from support import encoded, main

from teacache.results.video import read_video

STEPS = 8
SMALL = ("--ckpts_path", "tiny", "--num_infer_steps", str(STEPS), "--num_frames", "1")


def lists(folder: Path, *steps: list[int]) -> list[Path]:
    """A file for each list of steps."""
    paths = [folder / f"list{len(each)}.json" for each in steps]
    for path, each in zip(paths, steps, strict=True):
        path.write_text(json.dumps(each))
    return paths


def said(error: str) -> list[str]:
    """The lines but for the warning about a single frame."""
    return [line for line in error.splitlines() if not line.startswith("warning: ")]


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


def again(capsys, video: Path, folder: Path) -> None:
    """Run the command of a video's record, into another folder."""
    command = json.loads(video.with_suffix(".json").read_text())["command"]
    assert main(capsys, *shlex.split(command)[2:], "--output_path", folder)[0] == 0


def test_plan_sampler_and_record_agree(capsys, tmp_path):
    arguments = (*SMALL, "--schedule", *lists(tmp_path, [5, 3], [0, 2, 5, 6, 7]))
    code, output, _ = main(capsys, *arguments, "--plan")
    assert code == 0
    plan = planned(output)
    assert list(plan) == ["listed 4", "listed 5"]
    assert plan["listed 4"] == [0, 3, 5, 7]
    assert plan["listed 5"] == [0, 2, 5, 6, 7]
    code, _, _ = main(capsys, *arguments, "--output_path", tmp_path / "out")
    assert code == 0
    found = records(tmp_path / "out")
    assert len(found) == 2
    for name, steps in plan.items():
        record = found[f"42_{name.replace(' ', '')}_0000"]
        assert record["computed_steps"] == record["selected_steps"] == steps
        assert (record["schedule"], record["rel_l1_thresh"]) == (name, None)
    # The record's command takes the steps from the record, and the video is the same to the byte.
    listed = tmp_path / "out" / "42_listed5_0000.mp4"
    again(capsys, listed, tmp_path / "again")
    assert encoded(tmp_path / "again" / listed.name) == encoded(listed)


def test_a_sweep_over_schedules_of_either_kind(capsys, tmp_path):
    three, four, five = lists(tmp_path, [0, 4, 7], [0, 3, 5, 7], [0, 2, 4, 6, 7])
    out = tmp_path / "out"
    arguments = (
        *(*SMALL, "--rel_l1_thresh", 0, 0.2, "--schedule", three, four),
        *("--output_path", out),
    )
    code, output, _ = main(capsys, *arguments)
    assert code == 0
    report = json.loads((out / "sweep_42_0000.json").read_text())
    names = [row["schedule"] or row["rel_l1_thresh"] for row in report["rows"]]
    assert names == [0.0, 0.2, "listed 3", "listed 4"]
    assert all("psnr" in row["quality"] for row in report["rows"][1:])
    for words in ("threshold 0.2  ", "listed 4  ", "schedule  computed"):
        assert words in output
    markdown = (out / "sweep_42_0000.md").read_text()
    assert "| listed 4 |" in markdown
    with Image.open(out / "sweep_42_0000.png") as figure:
        assert figure.width == 1200
    assert read_video(out / "sweep_42_0000.mp4").frames.shape[0] == 1
    # Another schedule is another video; the same one is not sampled again.
    code, output, _ = main(capsys, *arguments, "--resume")
    assert code == 0
    assert output.count("done before") == 4
    code, output, _ = main(
        capsys, *SMALL, "--schedule", five, "--resume", "--quiet", "--output_path", out
    )
    assert output == f"{out}/42_listed5_0000.mp4\n"


def test_a_sweep_of_a_threshold_and_a_forecast(capsys, tmp_path):
    """What is planned is what is sampled, recorded, and repeated from the record."""
    counted = (*SMALL, "--rel_l1_thresh", "0.2", "--computed_steps", "4")
    _, output, _ = main(capsys, *counted, "--plan")
    plan = planned(output)
    assert list(plan) == ["threshold 0.2", "forecast 4"]
    assert len(plan["forecast 4"]) == 4
    out = tmp_path / "out"
    assert main(capsys, *counted, "--output_path", out)[0] == 0
    found = records(out)
    assert set(found) == {"42_0.2_0000", "42_forecast4_0000"}
    for name, line, reuse in (
        ("42_0.2_0000", "threshold 0.2", "residual"),
        ("42_forecast4_0000", "forecast 4", "forecast"),
    ):
        record = found[name]
        assert record["computed_steps"] == plan[line]
        assert (record["reuse"], record["scheduler"]) == (reuse, "dpm")
        assert record["approximations"] == [f"reuse {reuse}"]
    record = found["42_forecast4_0000"]
    assert record["selected_steps"] == record["computed_steps"]
    assert (record["schedule"], record["rel_l1_thresh"]) == ("forecast 4", None)
    code, output, _ = main(capsys, *counted, "--output_path", out, "--resume")
    assert (code, output.count("done before")) == (0, 2)


def test_another_scheduler_or_reuse_is_another_video(capsys, tmp_path):
    """Repeated from its record it is the same one."""
    counted = (*SMALL, "--computed_steps", "4")
    made = {}
    for name, *more in (("dpm",), ("ddim", "--scheduler"), ("residual", "--reuse")):
        asked = (*counted, *more, *([name] if more else []))
        code, output, _ = main(capsys, *asked, "--output_path", tmp_path / name)
        assert code == 0
        (made[name],) = (tmp_path / name).glob("42_*.mp4")
    assert "not exact   reuse residual" in output.splitlines()
    assert [path.name[3:-9] for path in made.values()] == ["forecast4", "forecast4", "residual4"]
    own = {name: json.loads(path.with_suffix(".json").read_text()) for name, path in made.items()}
    assert [own[name]["scheduler"] for name in own] == ["dpm", "ddim", "dpm"]
    assert own["residual"]["computed_steps"] == own["dpm"]["computed_steps"]
    assert len({encoded(path) for path in made.values()}) == 3
    for name in ("dpm", "ddim"):
        again(capsys, made[name], tmp_path / "again" / name)
        repeated = tmp_path / "again" / name / made[name].name
        assert repeated.read_bytes() == made[name].read_bytes()


def test_a_forecast_needs_a_scheduler_that_predicts_v(capsys, tmp_path, tiny):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint, copy_function=os.link)
    path = checkpoint / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**config, "prediction_type": "epsilon"}))
    arguments = (*SMALL, "--ckpts_path", checkpoint, "--image", "astronaut")
    arguments += ("--output_path", tmp_path / "out")
    for asked in (("--computed_steps", 4), ("--rel_l1_thresh", 0.2, "--reuse", "forecast")):
        for mode in ((), ("--plan",)):
            code, output, error = main(capsys, *arguments, *asked, *mode)
            assert code == 2
            (line,) = said(error)
            assert "prediction_type v_prediction, found epsilon: use the residual" in line
            assert "loading" not in output
    code, _, _ = main(capsys, *arguments, "--rel_l1_thresh", 0.2, "--plan")
    assert code == 0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file or directory"),
        ("[0, 8]", "step 8 cannot be computed: the video has 8 steps"),
        ("[-1]", "step -1 cannot be computed: the video has 8 steps"),
        ("[]", "lists no steps, such as [0, 4, 8, 9]"),
        ('{"steps": [1]}', "lists no steps, such as [0, 4, 8, 9]"),
        ("even", "is no JSON"),
        (("--computed_steps", 9), "of 8 steps has 2 to 8 computed ones"),
        (("--computed_steps", 1), "of 8 steps has 2 to 8 computed ones"),
        (("--computed_steps", 3, "--retain_last", 3), "of 8 steps has 4 to 8 computed ones"),
        (("--computed_steps", 3, "--max_reuse", 1), "steps in a row, max_reuse allows 1"),
        (("--computed_steps", 0), "--computed_steps: '0'"),
        (("--reuse", "hope"), "--reuse: invalid choice: 'hope'"),
        (("--scheduler", "euler"), "--scheduler: invalid choice: 'euler'"),
    ],
)
def test_refused_in_one_line_before_loading(capsys, tmp_path, content, complaint):
    """A list of steps of this content, or these arguments."""
    path = tmp_path / "list.json"
    if isinstance(content, str):
        path.write_text(content)
    arguments = content if isinstance(content, tuple) else ("--schedule", path)
    out = ("--output_path", tmp_path / "out")
    code, output, error = main(capsys, *SMALL, *arguments, *out)
    assert code == 2
    (line,) = said(error)
    assert complaint in line
    assert "loading" not in output
