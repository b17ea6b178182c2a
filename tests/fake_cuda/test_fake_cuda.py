"""The whole command where torch says that there is a GPU: devices, waits, copies, memory line."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from fake_cuda import tensors
from processes import ended
from support import ROOT

from teacache.results.record import read_record
from teacache.results.slot import claimed_slot

# Of each video, whatever its steps: what is read from the GPU or brought there; and the check of
# the attention backend.
OF_A_VIDEO = {f"sampler.py:{name}" for name in ("__init__", "_check_finite", "pixels", "decode")}
OF_A_VIDEO |= {"attention.py:deviation"}
PROGRAM = {"program": ("tests/fake_cuda/run.py",)}
COMMON = ("--ckpts_path", "tiny", "--image", "astronaut", "--prompt", "a man", "--num_frames", 5)


def run(*arguments, **options):
    """The command on pretended CUDA: (standard output, the log)."""
    done = ended(79.0, "--device", "cuda", *arguments, **PROGRAM, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


def sample(folder, *arguments, **options):
    return run(*COMMON, "--output_path", folder, *arguments, **options)


@pytest.fixture(scope="module")
def sampled(tiny, tmp_path_factory):
    """One video of 6 steps: its folder, standard output and log."""
    folder = tmp_path_factory.mktemp("out")
    return folder, *sample(folder, "--rel_l1_thresh", 0.4, "--num_infer_steps", 6)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--rel_l1_thresh", 0, 0.4, "--vae_tiling", "--guidance_scale", 1),
        ("--seed", 1, 2, "--offload", "model", "--schedule", "LIST"),
    ],
)
def test_no_device_is_taken_for_another(tiny, tmp_path, arguments):
    (tmp_path / "list.json").write_text("[0, 2, 4]")
    arguments = [tmp_path / "list.json" if word == "LIST" else word for word in arguments]
    sample(tmp_path, "--num_infer_steps", 5, *arguments)
    assert len(list(tmp_path.glob("[0-9]*_0000.mp4"))) == 2


def test_no_step_waits_or_copies(sampled, tmp_path):
    """Twice the steps, and nothing more is read from the GPU or brought there."""
    _, twice = sample(tmp_path, "--rel_l1_thresh", 0.4, "--num_infer_steps", 12)
    logs = [
        {where: n for where, n in log.items() if "core/" in where or "sampling/" in where}
        for log in (sampled[2], twice)
    ]
    assert logs[0] == logs[1]
    places = {where.partition("sampling/")[2] for where in logs[0] if "sampling/" in where}
    assert places <= OF_A_VIDEO


def test_the_memory_line(sampled):
    folder, output, _ = sampled
    line = "memory          79.0 GiB, 79.0 free: transformer resident, decoder untiled"
    assert line in output.splitlines()
    record = json.loads((folder / "42_0.4_0000.json").read_text())
    assert (record["offload"], record["vae_tiling"]) == ("none", False)


def test_kept_latents_become_a_video(sampled, tmp_path):
    record = read_record(sampled[0] / "42_0.4_0000.json")
    record = replace(record, settings=replace(record.settings, output_path=str(tmp_path)))
    latents = torch.randn(1, 3, 16, record.settings.height // 8, record.settings.width // 8)
    with contextlib.suppress(KeyboardInterrupt), claimed_slot(tmp_path, "42_0.4") as slot:
        slot.keep(latents.to(torch.bfloat16), record)
        raise KeyboardInterrupt
    again = ("--rel_l1_thresh", 0.4, "--num_infer_steps", 6, "--resume")
    output, log = sample(tmp_path, *again)
    assert "denoising" not in output
    assert (tmp_path / "42_0.4_0000.mp4").stat().st_size > 0
    assert {where.partition("sampling/")[2] for where in log if "sampling/" in where} <= OF_A_VIDEO
    assert [path.name for path in tmp_path.glob("*latents*")] == []


def test_flash_attention_4_by_a_package_with_its_layout(tiny, tmp_path):
    """`flash_attn` without an `__init__.py`: it is no FlashAttention 2. Torch's own code loads it.

    The kernel is never called, since the pretence computes attention on the CPU.
    """
    site = tmp_path / "site"
    cute, info = site / "flash_attn" / "cute", site / "flash_attn_4-4.0.0b36.dist-info"
    for folder in (cute, info):
        folder.mkdir(parents=True)
    (cute / "__init__.py").touch()
    (cute / "interface.py").write_text("def _flash_attn_fwd(): ...\n_flash_attn_bwd = None\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n")
    (info / "RECORD").write_text("flash_attn/cute/interface.py,,\n")
    out, env = tmp_path / "out", {"PYTHONPATH": f"{site}:{ROOT}"}
    sample(out, "--num_infer_steps", 2, "--attention", "flash4", "--offload", "model", env=env)
    record = json.loads((out / "42_0.1_0000.json").read_text())
    assert (record["attention"], record["approximations"]) == ("flash4", [])
    assert "--attention flash4" in record["command"]

    wrong = ("--device", "cuda", *COMMON, "--output_path", out, "--attention", "flash")
    refused = ended(79.0, *wrong, **PROGRAM, env=env)
    assert "--attention flash does not work here: Flash Attention backend" in refused.stderr
    assert "missing package" in refused.stderr
    assert len(list(out.iterdir())) == 2


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
