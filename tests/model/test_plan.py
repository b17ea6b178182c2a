"""The plan, held against what the sampler then does."""

import os

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from processes import ended
from safetensors.torch import save_file
from support import CPU, ROOT, main

from teacache.base.errors import ArgumentError, CheckpointError
from teacache.checkpoint import distances
from teacache.core.forward import apply_teacache
from teacache.core.rule import COGVIDEOX_5B, schedule
from teacache.inputs.photograph import load_image
from teacache.results.video import read_video


@pytest.fixture
def checkpoint(light):
    """One whose scheduler is to be written."""
    (light / "scheduler" / "scheduler_config.json").unlink()
    return light


def known_distances(checkpoint, steps, guidance_scale=6.0, dtype=torch.float32):
    """Those of the plan, with the checkpoint's own scheduler."""
    scheduler = distances.load_scheduler(checkpoint, None)
    return distances.step_distances(checkpoint, scheduler, guidance_scale, CPU, dtype, steps)


@pytest.mark.parametrize(
    ("scheduler", "spacing", "dtype"),
    [
        (CogVideoXDPMScheduler, "trailing", torch.float32),
        (CogVideoXDPMScheduler, "linspace", torch.bfloat16),
        (CogVideoXDDIMScheduler, "trailing", torch.bfloat16),
        (CogVideoXDDIMScheduler, "leading", torch.float32),
    ],
)
def test_plan_equals_the_run(
    checkpoint, shallow, sample, published_schedule, scheduler, spacing, dtype
):
    """Distances to the bit, and the schedule, for 8 to 100 steps, with guidance and without.

    Where no distance is beyond what the coefficients cover, it is the one of a second computation.
    """
    pipe = shallow(dtype)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    pipe.scheduler.save_pretrained(checkpoint / "scheduler")
    # Steps, guidance, and a threshold at which some of them are reused.
    runs = [(8, 6.0, 0.5), (50, 6.0, 0.1), (50, 6.0, 0.15), (100, 1.0, 0.08)]
    counts = set()
    with apply_teacache(pipe) as handle:
        for steps, guidance_scale, threshold in runs if spacing == "trailing" else runs[:1]:
            known = known_distances(checkpoint, steps, guidance_scale, dtype)
            handle.rel_l1_thresh = threshold
            sample(pipe, steps=steps, num_frames=1, guidance_scale=guidance_scale)
            assert handle.schedule.distances == known
            assert handle.schedule == schedule(known, threshold, COGVIDEOX_5B)
            assert handle.schedule.reused_steps
            if steps == 50:
                assert not handle.schedule.steps_outside_fitted_range
                published = published_schedule(pipe, steps, threshold)
                assert handle.schedule.computed_steps == tuple(published)
                counts.add(len(published))
    assert len(counts) == (2 if spacing == "trailing" else 0), "each threshold has another number"


@pytest.mark.parametrize("kind", [CogVideoXDPMScheduler, CogVideoXDDIMScheduler])
@pytest.mark.parametrize("name", [None, "dpm", "ddim"])
def test_the_loaded_scheduler_is_the_checkpoints(checkpoint, kind, name):
    """Its class, or the one that is named; its configuration, and so its timesteps."""
    for spacing in ("trailing", "leading", "linspace"):
        own = kind(timestep_spacing=spacing, steps_offset=1, prediction_type="v_prediction")
        own.save_pretrained(checkpoint / "scheduler")
        loaded = distances.load_scheduler(checkpoint, name)
        assert type(loaded) is (distances.SCHEDULERS[name] if name else kind)
        expected = type(loaded).from_config(own.config)
        assert torch.equal(loaded.alphas_cumprod, expected.alphas_cumprod)
        for steps in (1, 2, 7, 50, 333, 1000):
            for scheduler in (loaded, expected):
                scheduler.set_timesteps(steps)
            assert torch.equal(loaded.timesteps, expected.timesteps)
    with pytest.raises(ArgumentError, match="1000 timesteps"):
        known_distances(checkpoint, 1001)


def test_a_checkpoint_without_time_embedding(light):
    weights = light / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    save_file({"proj_out.weight": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*linear_1.bias"):
        known_distances(light, 8)


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


def test_a_plan_for_a_reader_that_has_gone():
    """As in `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    done = ended("--ckpts_path", "tiny", "--plan", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


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
    assert capsys.readouterr().out == f"{computed}\n"
    assert len(read_video(tmp_path / "laughs.mp4").frames) == 13
