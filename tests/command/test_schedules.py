"""Schedules that no threshold chooses: listed steps."""

from __future__ import annotations

import json
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
    # The record of one lists the steps of another, which is then the same to the byte.
    again = tmp_path / "out" / "42_listed5_0000.json"
    code, _, _ = main(capsys, *SMALL, "--schedule", again, "--output_path", tmp_path / "again")
    assert code == 0
    listed = tmp_path / "again" / "42_listed5_0000.mp4"
    assert encoded(listed) == encoded(again.with_suffix(".mp4"))


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


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file or directory"),
        ("[0, 8]", "step 8 cannot be computed: the video has 8 steps"),
        ("[-1]", "step -1 cannot be computed: the video has 8 steps"),
        ("[]", "lists no steps, such as [0, 4, 8, 9]"),
        ('{"steps": [1]}', "lists no steps, such as [0, 4, 8, 9]"),
        ("even", "is no JSON"),
    ],
)
def test_refused_in_one_line_before_loading(capsys, tmp_path, content, complaint):
    path = tmp_path / "list.json"
    if content is not None:
        path.write_text(content)
    code, output, error = main(
        capsys, *SMALL, "--schedule", path, "--output_path", tmp_path / "out"
    )
    assert code == 2
    assert complaint in error.splitlines()[-1]
    assert "loading" not in output
