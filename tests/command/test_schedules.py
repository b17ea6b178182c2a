"""Schedules that a threshold, a list or a number of steps chooses; reuse and scheduler.

And videos made again by their records, also with seeds that are drawn.
"""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from support import edit, encoded, main, refused

import teacache
from teacache.results.record import read_record
from teacache.run import loop as run

STEPS = 8
SMALL = ("--ckpts_path", "tiny", "--num_infer_steps", str(STEPS), "--num_frames", "1")
REPEATED = (*SMALL, "--num_infer_steps", 6, "--rel_l1_thresh", 0.2)


def planned(output: str) -> dict[str, list[int]]:
    """The computed steps of each line of a plan, by what it begins with."""
    found = {}
    for line in output.splitlines():
        if "■" in line:
            *words, cells = line.split()
            found[" ".join(words[:2])] = [n for n, cell in enumerate(cells) if cell == "■"]
    return found


def test_a_sweep_of_every_kind(capsys, tmp_path):
    """What is planned is what is sampled, recorded, compared and repeated from the record."""
    listed, out = tmp_path / "list.json", tmp_path / "out"
    listed.write_text("[5, 3]")
    kinds = ("--rel_l1_thresh", 0, 0.2, "--schedule", listed, "--computed_steps", 4)
    _, output, _ = main(capsys, *SMALL, *kinds, "--plan")
    plan = planned(output)
    assert list(plan) == ["threshold 0", "threshold 0.2", "forecast 4", "listed 4"]
    assert plan["listed 4"] == [0, 3, 5, 7]
    assert len(plan["forecast 4"]) == 4
    code, output, _ = main(capsys, *SMALL, *kinds, "--output_path", out)
    assert code == 0
    for words in ("threshold 0.2  ", "listed 4  ", "schedule  computed"):
        assert words in output
    names = ["42_0.0_0000", "42_0.2_0000", "42_forecast4_0000", "42_listed4_0000"]
    made = [json.loads((out / f"{name}.json").read_text()) for name in names]
    for record, (kind, steps) in zip(made, plan.items(), strict=True):
        assert record["computed_steps"] == steps
        if not kind.startswith("threshold"):
            assert record["selected_steps"] == steps
            assert (record["schedule"], record["rel_l1_thresh"]) == (kind, None)
    assert [(record["reuse"], record["approximations"]) for record in made[1:]] == [
        (reuse, [f"reuse {reuse}"]) for reuse in ("residual", "forecast", "residual")
    ]
    rows = json.loads((out / "sweep_42_0000.json").read_text())["rows"]
    assert [row["schedule"] or row["rel_l1_thresh"] for row in rows] == [0, 0.2, *list(plan)[2:]]
    assert all("psnr" in row["quality"] for row in rows[1:])
    assert "| listed 4 |" in (out / "sweep_42_0000.md").read_text()
    # The same schedules are not sampled again; another one is another video.
    code, output, _ = main(capsys, *SMALL, *kinds, "--output_path", out, "--resume")
    assert (code, output.count("done before")) == (0, 4)
    listed.write_text("[2, 3]")
    asked = (*SMALL, "--schedule", listed, "--resume", "--quiet", "--output_path", out)
    assert main(capsys, *asked)[1] == f"{out}/42_listed4_0001.mp4\n"
    # The record's command takes the steps from the record.
    words = shlex.split(made[3]["command"])[2:]
    assert main(capsys, *words, "--output_path", tmp_path / "again")[0] == 0
    paths = (folder / "42_listed4_0000.mp4" for folder in (out, tmp_path / "again"))
    assert len({encoded(path) for path in paths}) == 1


def test_another_scheduler_or_reuse_is_another_video(capsys, tmp_path):
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


def test_limits_and_reuse_tell_the_videos_of_a_sweep_apart(capsys, tmp_path):
    """In names, table, figure and records; each is found again."""
    lines = [
        {"rel_l1_thresh": 0.5},
        {"rel_l1_thresh": 0.5, "retain_last": 2, "max_reuse": 1},
        {"rel_l1_thresh": 0.5, "reuse": "forecast"},
        {"rel_l1_thresh": 0, "max_reuse": 1},
    ]
    shown = ["threshold 0.5", "threshold 0.5, retain_last 2, max_reuse 1", "threshold 0.5 forecast"]
    shown += ["threshold 0"]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    asked = (*SMALL, "--jobs", tmp_path / "jobs.jsonl", "--output_path", out, "--resume")
    code, output, _ = main(capsys, *asked)
    assert code == 0
    names = ["0.5", "0.5_retain_last2_max_reuse1", "0.5forecast", "0.0"]
    names = [f"42_{name}_0000" for name in names]
    rows = json.loads((out / "sweep_42_0000.json").read_text())["rows"]
    assert [row["video"] for row in rows] == names
    markdown = (out / "sweep_42_0000.md").read_text()
    for name, words in zip(names, shown, strict=True):
        assert f"{words}  " in output
        assert f"| {words} |" in markdown
        assert name in output
    records = [json.loads((out / f"{name}.json").read_text()) for name in names]
    assert [record["max_reuse"] for record in records] == [None, 1, None, None]
    assert records[1]["schedule"] == "0.5, retain_last 2, max_reuse 1"
    assert len({tuple(record["computed_steps"]) for record in records}) == 3
    assert all("psnr" in row["quality"] for row in rows[:-1])
    assert main(capsys, *asked)[1].count("done before") == len(names)


def test_a_forecast_needs_a_scheduler_that_predicts_v(capsys, tmp_path, light):
    edit(light / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    arguments = (*SMALL, "--ckpts_path", light, "--image", "astronaut")
    arguments += ("--output_path", tmp_path / "out")
    for asked in (
        ("--computed_steps", 4),
        ("--rel_l1_thresh", 0.2, "--reuse", "forecast", "--plan"),
    ):
        error = refused(capsys, *arguments, *asked)
        assert "prediction_type v_prediction, found epsilon: use the residual" in error
    code, _, _ = main(capsys, *arguments, "--rel_l1_thresh", 0.2, "--plan")
    assert code == 0


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read: No such file or directory"),
        ('{"steps": [1]}', "lists no steps, such as [0, 4, 8, 9]"),
        ("even", "is no JSON"),
        (("--computed_steps", 9), "of 8 steps has 2 to 8 computed ones"),
        (("--computed_steps", 3, "--max_reuse", 1), "steps in a row, max_reuse allows 1"),
        (("--reuse", "hope"), "--reuse: invalid choice: 'hope'"),
    ],
)
def test_refused_in_one_line_before_loading(capsys, tmp_path, content, complaint):
    """A list of steps of this content, or these arguments."""
    path = tmp_path / "list.json"
    if isinstance(content, str):
        path.write_text(content)
    arguments = content if isinstance(content, tuple) else ("--schedule", path)
    out = ("--output_path", tmp_path / "out")
    assert complaint in refused(capsys, *SMALL, *arguments, *out)


def test_a_record_names_the_command_that_makes_the_video_again(capsys, tmp_path):
    """As a shell reads it, whatever is in the prompt."""
    (tmp_path / "own.json").write_text('{"values": [0, 0, 0, 0, 0.05], "source": "own"}')
    prompt = 'A person; turns = left # and\nsmiles \\ é, isn\'t $HOME "here"? שלום 👩‍🚀\t.'
    asked = (*REPEATED, "--prompt", prompt, "--max_reuse", 2, "--seed", 2**63 - 1)
    asked += ("--coefficients", tmp_path / "own.json")
    code, output, _ = main(capsys, *asked, "--output_path", tmp_path, "--quiet")
    assert code == 0
    video = Path(output.strip())
    record = read_record(video.with_suffix(".json"))
    assert record.versions["teacache"] == teacache.__version__
    assert record.settings.prompt == prompt
    shown = ["bash", "-c", f"printf '%s\\0' {record.command}"]
    words = subprocess.check_output(shown, text=True).removesuffix("\0").split("\0")
    assert words[:2] == ["python3", "teacache_sample_video.py"]
    code, output, _ = main(capsys, *words[2:], "--quiet")
    assert code == 0
    again = Path(output.strip())
    assert again != video
    assert encoded(again) == encoded(video)
    second = read_record(again.with_suffix(".json"))
    assert second.settings == record.settings
    assert second.computed_steps == record.computed_steps
    assert second.command == record.command.replace(video.stem, again.stem)


def test_a_random_seed_is_said_and_recorded(capsys, tmp_path):
    code, output, _ = main(capsys, *REPEATED, "--seed", "random", 5, "--output_path", tmp_path)
    assert code == 0
    seeds = output.splitlines()[0].removeprefix("seed").removesuffix(", drawn").split()
    assert seeds[1] == "5"
    record = read_record(tmp_path / f"{seeds[0]}_0.2_0000.json")
    assert record.settings.seed == int(seeds[0]) < 2**32
    error = refused(capsys, *REPEATED, "--seed", "random", "--shard", "0/2")
    assert "--seed: random would be another seed in each --shard" in error


def test_short_prompts_of_the_real_model_get_a_hint(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "is_full_size", lambda folder: True)
    quick = (*REPEATED, "--num_infer_steps", 1, "--output_path", tmp_path)
    assert "hint        'a man' is short" in main(capsys, *quick, "--prompt", "a man")[1]
    assert "hint" not in main(capsys, *quick, "--prompt", "a man " * 20)[1]
