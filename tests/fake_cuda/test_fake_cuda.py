"""The whole command where torch says that there is a GPU: devices, waits, copies, memory line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from fake_cuda import tensors
from support import ROOT

from teacache.results.record import read_record
from teacache.results.slot import claimed_slot

# Of each video, whatever its steps: what is read from the GPU or brought there.
OF_A_VIDEO = {f"sampler.py:{name}" for name in ("__init__", "_check_finite", "pixels", "decode")}


def run(*arguments, free=79.0):
    """The command on pretended CUDA: (standard output, the log)."""
    done = subprocess.run(
        [sys.executable, "-m", "fake_cuda.run", *map(str, (free, "--device", "cuda", *arguments))],
        cwd=ROOT,
        # Weights that are read in threads of their own would be read without the mode.
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "HF_DEACTIVATE_ASYNC_LOAD": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


@pytest.fixture
def sample(tiny, tmp_path):
    """Samples with the command on pretended CUDA; returns as `run` does."""

    def sampled(*arguments, quick=True):
        common = ("--ckpts_path", tiny, "--image", "astronaut", "--prompt", "a man")
        common += ("--output_path", tmp_path / "out")
        if quick:
            common += ("--rel_l1_thresh", 0.4, "--num_infer_steps", 6)
        return run(*common, *arguments)

    return sampled


@pytest.mark.parametrize(
    ("arguments", "videos"),
    [
        (("--rel_l1_thresh", 0, 0.4), 2),
        (("--vae_tiling", "--guidance_scale", 1), 1),
        (("--offload", "model"), 1),
        (("--seed", 1, 2, "--schedule", "LIST"), 2),
    ],
)
def test_no_device_is_taken_for_another(sample, tmp_path, arguments, videos):
    (tmp_path / "list.json").write_text("[0, 2, 4]")
    arguments = [tmp_path / "list.json" if word == "LIST" else word for word in arguments]
    sample("--num_infer_steps", 5, *arguments, quick="--rel_l1_thresh" not in arguments)
    assert len(list((tmp_path / "out").glob("[0-9]*.mp4"))) >= videos


def test_no_step_waits_or_copies(sample):
    """Twice the steps, and nothing more is read from the GPU or brought there."""
    logs = [
        {where: n for where, n in sample("--num_infer_steps", steps)[1].items() if "core/" in where
         or "sampling/" in where}
        for steps in (6, 12)
    ]  # fmt: skip
    assert logs[0] == logs[1]
    places = {where.partition("sampling/")[2] for where in logs[0] if "sampling/" in where}
    assert places <= OF_A_VIDEO


def test_the_memory_line(sample, tmp_path):
    output, _ = sample()
    line = "memory          79.0 GiB, 79.0 free: transformer resident, decoder untiled"
    assert line in output.splitlines()
    record = json.loads((tmp_path / "out" / "42_0.4_0000.json").read_text())
    assert (record["offload"], record["vae_tiling"]) == ("none", False)


def test_kept_latents_become_a_video(sample, tmp_path):
    out = tmp_path / "out"
    sample()
    record = read_record(out / "42_0.4_0000.json")
    for path in out.glob("42*"):
        path.unlink()
    latents = torch.randn(1, 7, 16, record.settings.height // 8, record.settings.width // 8)
    with contextlib.suppress(KeyboardInterrupt), claimed_slot(out, "42_0.4") as slot:
        slot.keep(latents.to(torch.bfloat16), record)
        raise KeyboardInterrupt
    output, log = sample("--resume")
    assert "denoising" not in output
    assert (out / "42_0.4_0000.mp4").stat().st_size > 0
    assert {where.partition("sampling/")[2] for where in log if "sampling/" in where} <= OF_A_VIDEO
    assert [path.name for path in out.glob("*latents*")] == []


def test_the_pretence_has_cudas_rules():
    tensors.log.clear()
    there = tensors.OnGpu(torch.arange(3.0))
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.ones(3)
    assert (there + torch.tensor(1.0)).device == tensors.GPU, "numbers may be the host's"
    square = tensors.OnGpu(torch.ones(3, 3))
    with pytest.raises(RuntimeError, match="same dtype"):
        square @ tensors.OnGpu(torch.ones(3, 3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="can't convert"):
        there.numpy()
    assert not tensors.log
    there.sum().item()
    torch.equal(there, there)
    assert sum(n for what, n in tensors.log.items() if what.startswith("wait")) == 2
    with tensors.PretendedCuda():
        there.to("cpu")
    assert sum(n for what, n in tensors.log.items() if what.startswith("copy")) == 1
