"""Shards: one after the other, in any order, side by side, started twice, killed."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import start
from support import ROOT, locked_by_another_process, main, refused, untimed_rows

from teacache.results.record import read_record
from teacache.sampling import sampler

COMMON = ("--ckpts_path", "tiny", "--num_infer_steps", 12, "--num_frames", 1)
SWEEP = (*COMMON, "--seed", 1, 2, 3, "--rel_l1_thresh", 0, 0.3)


def videos(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("[0-9]*.mp4"))


def reports(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("sweep_*.json"))


def report(folder: Path) -> dict:
    (name,) = reports(folder)
    return json.loads((folder / name).read_text())


@pytest.fixture
def denoised(monkeypatch):
    """Counts the videos that are sampled."""
    counted, real = [], sampler.denoise
    monkeypatch.setattr(sampler, "denoise", lambda *a, **k: counted.append(1) or real(*a, **k))
    return counted


def test_the_last_of_all_reports(capsys, tmp_path, denoised):
    """Whichever ends last, and what one process would have reported."""
    one, parts = tmp_path / "one", tmp_path / "parts"
    assert main(capsys, *SWEEP, "--output_path", one)[0] == 0
    denoised.clear()
    ours = (*SWEEP, "--output_path", parts, "--resume")
    for index, last in ((1, False), (0, True)):
        code, output, _ = main(capsys, *ours, "--shard", f"{index}/2")
        assert code == 0
        assert ("sweep " in output) == last
        assert len(reports(parts)) == last
    assert len(denoised) == 6
    assert videos(parts) == videos(one)
    for name in videos(one):
        assert (parts / f"{name}.mp4").read_bytes() == (one / f"{name}.mp4").read_bytes()
        mine, expected = (read_record(folder / f"{name}.json") for folder in (parts, one))
        assert mine.quality == expected.quality
        assert mine.seconds.keys() == expected.seconds.keys()
    assert untimed_rows(parts) == untimed_rows(one)
    assert all(row["speedup"] for row in report(parts)["rows"])

    # Once more, as after a requeue, and without --shard.
    code, output, _ = main(capsys, *ours, "--shard", "0/2")
    assert code == 0
    assert output.count("done before") == 4
    assert f"sweep       {parts / 'sweep_1_0000.json'}" in output
    assert (len(denoised), len(reports(parts))) == (6, 1)
    code, _, _ = main(capsys, *ours)
    assert (code, len(denoised), len(reports(parts))) == (0, 6, 2)


def test_compared_across_shards(capsys, tmp_path):
    """More shards than groups: threshold 0 is in another shard than what is compared with it."""
    sweep = (*COMMON, "--rel_l1_thresh", 0.3, 0, "--output_path", tmp_path)
    for index in range(3):
        code, output, _ = main(capsys, *sweep, "--shard", f"{index}/3")
        assert code == 0
    assert output == "shard 2/3 has nothing to do: 2 videos in all\n"
    row, other = report(tmp_path)["rows"]
    assert (row["rel_l1_thresh"], other["rel_l1_thresh"]) == (0.3, 0.0)
    assert row["quality"]["psnr"]["mean"] > 10
    assert row["quality"]["decoded"]


def test_a_shard_looks_at_its_own_images_alone(capsys, tmp_path):
    """A picture that another shard has may be gone, or cost a download."""
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "jobs.csv").write_text(f"image,seed\nastronaut,1\n{tmp_path}/broken.png,2\n")
    jobs = (*COMMON, "--jobs", tmp_path / "jobs.csv", "--output_path", tmp_path / "out")
    code, output, _ = main(capsys, *jobs, "--shard", "0/2")
    assert code == 0
    assert "the last shard writes the report: 1 of 2 videos are missing" in output
    assert "broken.png" in refused(capsys, *jobs, "--shard", "1/2")
    assert not reports(tmp_path / "out")


def test_a_video_that_another_process_is_at(capsys, tmp_path, denoised):
    """It is left to the other one; without --resume it is asked for once more."""
    arguments = (*COMMON, "--seed", 1, 2, "--output_path", tmp_path)
    with locked_by_another_process(tmp_path):
        code, output, _ = main(capsys, *arguments, "--resume")
        assert code == 0
        assert output.count("another process samples it") == 2
        assert not denoised
        code, _, _ = main(capsys, *arguments)
        assert (code, len(denoised)) == (0, 2)


def test_side_by_side_one_started_twice_one_killed(capsys, tmp_path, tiny):
    """Nothing is lost and nothing doubled, and one report is written."""
    sweep = (
        *(*COMMON, "--num_infer_steps", 60),
        *("--seed", 1, 2, 3, 4, "--output_path", tmp_path, "--resume"),
    )
    twins = [start(*sweep, "--shard", "0/2") for _ in range(2)]
    killed = start(*sweep, "--shard", "1/2")
    begun = 0
    for line in killed.stdout:
        begun += line.startswith("seed")
        if begun == 2:
            break
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    both = "".join(twin.communicate(timeout=300)[0] for twin in twins)
    assert [twin.returncode for twin in twins] == [0, 0]
    assert both.count("denoising") == 2
    assert len(videos(tmp_path)) == 3
    assert not reports(tmp_path)
    code, output, _ = main(capsys, *sweep, "--shard", "1/2")
    assert code == 0
    assert output.count("denoising") == output.count("done before") == 1
    assert videos(tmp_path) == [f"{seed}_0.1_0000" for seed in (1, 2, 3, 4)]
    assert [row["video"] for row in report(tmp_path)["rows"]] == videos(tmp_path)


def test_the_readmes_slurm_script(tmp_path, tiny):
    """As SLURM runs it for the last task of an array; here with the embedded checkpoint."""
    readme = (ROOT / "teacache" / "cluster" / "README.md").read_text(encoding="utf-8")
    script = re.search(r"#!/bin/bash\n#SBATCH.*?(?=```)", readme, flags=re.DOTALL)[0]
    options = " ".join(map(str, COMMON))
    (tmp_path / "array.sh").write_text(
        f'python3() {{ "{sys.executable}" "$@" {options}; }}\n{script}', encoding="utf-8"
    )
    (tmp_path / "jobs.jsonl").write_text('{"seed": 1}\n{"seed": 2}\n{"seed": 3}\n')
    (tmp_path / "teacache_sample_video.py").symlink_to(ROOT / "teacache_sample_video.py")
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    subprocess.run(
        ["bash", "array.sh"], cwd=tmp_path, env={**os.environ, **array},
        check=True, capture_output=True,
    )  # fmt: skip
    assert videos(tmp_path / "results") == ["2_0.15_0000"]
