"""The plan, held against what the sampler then does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from processes import ended
from support import CPU, ROOT, main

from teacache.base.errors import ArgumentError, CheckpointError
from teacache.checkpoint import distances
from teacache.core.forward import apply_teacache
from teacache.core.rule import COGVIDEOX_5B, Limits, schedule
from teacache.inputs.photograph import load_image

THRESHOLDS = [0.0, 0.03, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.5, 1.0, 3.0]


def known_distances(checkpoint, steps, guidance_scale=6.0, dtype=torch.float32):
    """Those of the plan, with the checkpoint's own scheduler."""
    scheduler = distances.load_scheduler(checkpoint, None)
    return distances.step_distances(checkpoint, scheduler, guidance_scale, CPU, dtype, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheduler", [CogVideoXDPMScheduler, CogVideoXDDIMScheduler])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_plan_equals_the_run(tiny, tmp_path, shallow, sample, scheduler, spacing, dtype):
    """Distances to the bit, and the schedule, for 8 to 100 steps, with guidance and without."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint, copy_function=os.link)
    pipe = shallow(dtype)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    shutil.rmtree(checkpoint / "scheduler")
    pipe.scheduler.save_pretrained(checkpoint / "scheduler")
    # Steps, guidance, and a threshold at which some of them are reused.
    runs = [(8, 6.0, 0.5), (13, 1.0, 0.3), (50, 6.0, 0.15), (100, 1.0, 0.08)]
    if spacing != "trailing":
        runs = runs[:2]
    with apply_teacache(pipe) as handle:
        for steps, guidance_scale, threshold in runs:
            known = known_distances(checkpoint, steps, guidance_scale, dtype)
            handle.rel_l1_thresh = threshold
            sample(pipe, steps=steps, num_frames=1, guidance_scale=guidance_scale)
            assert handle.schedule.distances == known
            assert handle.schedule == schedule(known, threshold, COGVIDEOX_5B)
            assert handle.schedule.reused_steps


def test_plan_equals_the_run_at_many_thresholds(tiny, shallow, sample):
    pipe = shallow(torch.float32)
    known = known_distances(tiny, 20)
    with apply_teacache(pipe) as handle:
        for threshold in THRESHOLDS:
            handle.rel_l1_thresh = threshold
            sample(pipe, steps=20, num_frames=1)
            assert handle.schedule == schedule(known, threshold, COGVIDEOX_5B)
    limits = Limits(retain_first=2, retain_last=3, max_reuse=1)
    with apply_teacache(pipe, 0.3, limits=limits) as handle:
        sample(pipe, steps=20, num_frames=1)
        assert handle.schedule == schedule(known, 0.3, COGVIDEOX_5B, limits)


@pytest.mark.parametrize("kind", [CogVideoXDPMScheduler, CogVideoXDDIMScheduler])
@pytest.mark.parametrize("name", [None, "dpm", "ddim"])
def test_the_loaded_scheduler_is_the_checkpoints(tiny, tmp_path, kind, name):
    """Its class, or the one that is named; its configuration, and so its timesteps."""
    shutil.copytree(tiny, tmp_path / "c", copy_function=os.link)
    shutil.rmtree(tmp_path / "c" / "scheduler")
    for spacing in ("trailing", "leading", "linspace"):
        own = kind(timestep_spacing=spacing, steps_offset=1, prediction_type="v_prediction")
        own.save_pretrained(tmp_path / "c" / "scheduler")
        loaded = distances.load_scheduler(tmp_path / "c", name)
        assert type(loaded) is (distances.SCHEDULERS[name] if name else kind)
        expected = type(loaded).from_config(own.config)
        public = {key for key in expected.config if not key.startswith("_")}
        assert all(loaded.config[key] == expected.config[key] for key in public)
        assert torch.equal(loaded.alphas_cumprod, expected.alphas_cumprod)
        for steps in [*range(1, 101), 333, 999, 1000]:
            for scheduler in (loaded, expected):
                scheduler.set_timesteps(steps)
            assert torch.equal(loaded.timesteps, expected.timesteps)
    with pytest.raises(ArgumentError, match="1000 timesteps"):
        known_distances(tmp_path / "c", 1001)


def test_a_checkpoint_without_time_embedding(tiny, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(tiny, tmp_path / "c", copy_function=os.link)
    weights = tmp_path / "c" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    save_file({"proj_out.weight": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=r"lacks time_embedding.linear_1.bias"):
        known_distances(tmp_path / "c", 8)


def test_command_prints_a_plan(capsys, tmp_path, tiny):
    code, output, _ = main(
        capsys, "--ckpts_path", "tiny", "--plan", "--output_path", tmp_path / "none"
    )
    assert code == 0
    lines = output.splitlines()
    assert lines[0].split() == ["computed", "speed-up", "schedule"]
    known = known_distances(tiny, 50)
    plans = {f"threshold {x:g}": schedule(known, x) for x in (0, 0.1, 0.15, 0.2)}
    plans |= {f"forecast {n}": schedule(known, None, computed_steps=n) for n in (22, 16, 12, 10, 8)}
    for line, (name, plan) in zip(lines[1 : lines.index("")], plans.items(), strict=True):
        *words, computed, _, total, speed_up, cells = line.split()
        assert " ".join(words) == name
        assert (int(computed), int(total)) == (len(plan.computed_steps), 50)
        assert speed_up == f"{50 / len(plan.computed_steps):.2f}x"
        assert tuple(n for n, cell in enumerate(cells) if cell == "■") == plan.computed_steps
    code, output, _ = main(capsys, "--ckpts_path", "tiny", "--plan", "--rel_l1_thresh", 0.1)
    assert code == 0
    heading, line, *_ = output.splitlines()
    assert heading.split() == ["rel_l1_thresh", "computed", "speed-up", "schedule"]
    assert line.split()[:2] == ["0.1", str(len(plans["threshold 0.1"].computed_steps))]
    assert not (tmp_path / "none").exists(), "a plan leaves nothing behind"


def test_command_plans_only_what_is_here(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = main(capsys, "--plan")
    assert code == 2
    assert "is not here yet" in error


@pytest.mark.parametrize("to", ["nobody", "ascii"])
def test_a_plan_for_whoever_reads_it(tiny, to):
    """`| head` that has gone, and a terminal without the squares."""
    reading, writing = os.pipe()
    if to == "nobody":
        os.close(reading)
    changed = {"PYTHONIOENCODING": "ascii:strict"} if to == "ascii" else {}
    done = ended("--ckpts_path", "tiny", "--plan", stdout=writing, env=changed)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    if to == "ascii":
        with os.fdopen(reading) as output:
            assert "??????" in output.read()


def test_a_plan_takes_little(tiny):
    """At most three times the CPU of importing torch."""

    def cpu_seconds(*arguments: str) -> float:
        before = os.times()
        command = [sys.executable, *arguments]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return sum(os.times()[2:4]) - sum(before[2:4])

    plan = cpu_seconds("teacache_sample_video.py", "--ckpts_path", "tiny", "--plan")
    assert plan < 3 * cpu_seconds("-c", "import torch")


def test_command_names_a_missing_scheduler(capsys, tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "c", copy_function=os.link)
    (tmp_path / "c" / "scheduler" / "scheduler_config.json").unlink()
    code, _, error = main(capsys, "--ckpts_path", tmp_path / "c", "--plan")
    assert code == 2
    assert "scheduler_config.json is missing" in error
    assert error.count("\n") == 1


def test_the_picture_in_the_readme_is_true(tiny):
    known = known_distances(tiny, 50)
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = [line for line in readme.splitlines() if line.count("■") > 10]
    assert len(lines) == 4
    for line in lines:
        threshold, cells, computed, *_ = line.split()
        planned = schedule(known, float(threshold), COGVIDEOX_5B).computed_steps
        assert tuple(n for n, cell in enumerate(cells) if cell == "■") == planned
        assert int(computed) == len(planned)


def test_the_readmes_example_runs_as_it_stands(tiny, tmp_path, monkeypatch, capsys):
    """On the embedded checkpoint, for want of the real one and of its GPU."""
    code = (ROOT / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    for there, here in (('torch.device("cuda")', 'torch.device("cpu")'), ("bfloat16", "float32")):
        assert there in code
        code = code.replace(there, here)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BestWishYsh").mkdir()
    (tmp_path / "BestWishYsh" / "ConsisID-preview").symlink_to(tiny)
    load_image("astronaut").save("me.jpg")
    exec(code, {})
    computed = schedule(known_distances(tiny, 50), 0.15).computed_steps
    assert capsys.readouterr().out == f"{computed} 13\n"
