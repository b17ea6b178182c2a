"""Making a video again by its record; seeds that are drawn; LoRAs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, encoded, main, refused

import teacache
from teacache.results.record import read_record
from teacache.results.video import read_video
from teacache.run import loop as run

WHOLE = ("--ckpts_path", "tiny", "--rel_l1_thresh", 0.2, "--num_infer_steps", 6)
SHORT = (*WHOLE, "--num_frames", 1)


def test_a_record_names_the_command_that_makes_the_video_again(capsys, tmp_path):
    """As a shell reads it, whatever is in the prompt."""
    (tmp_path / "own.json").write_text('{"values": [0, 0, 0, 0, 0.05], "source": "own"}')
    prompt = 'A person; turns = left # and\nsmiles \\ é, isn\'t $HOME "here"? שלום 👩‍🚀\t.'
    asked = (*SHORT, "--prompt", prompt, "--max_reuse", 2, "--seed", 2**63 - 1)
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
    code, output, _ = main(capsys, *SHORT, "--seed", "random", 5, "--output_path", tmp_path)
    assert code == 0
    seeds = output.splitlines()[0].removeprefix("seed").removesuffix(", drawn").split()
    assert seeds[1] == "5"
    record = read_record(tmp_path / f"{seeds[0]}_0.2_0000.json")
    assert record.settings.seed == int(seeds[0]) < 2**32
    error = refused(capsys, *SHORT, "--seed", "random", "--shard", "0/2")
    assert "--seed: random would be another seed in each --shard" in error


@pytest.fixture(scope="module")
def weights(tiny):
    """A small LoRA of the embedded checkpoint, random, as diffusers saves one."""
    layers = load_file(tiny / "transformer" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, weight in layers.items():
        if name.startswith("transformer_blocks.") and name.endswith(("to_q.weight", "to_v.weight")):
            layer = "transformer." + name.removesuffix(".weight")
            rows, columns = weight.shape
            factors[f"{layer}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            factors[f"{layer}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.03
    return factors


def test_a_lora_changes_the_video(capsys, weights, tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(weights, path)
    videos = []
    for number, scale in enumerate(("", ":0", None)):
        lora = () if scale is None else ("--lora", f"{path}{scale}")
        folder = tmp_path / str(number)
        assert main(capsys, *SHORT, *lora, "--output_path", folder)[0] == 0
        videos.append(read_video(folder / "42_0.2_0000.mp4").frames)
    assert (videos[0] != videos[2]).any()
    assert (videos[1] == videos[2]).all(), "nothing of it is nothing"
    record = read_record(tmp_path / "0" / "42_0.2_0000.json")
    assert record.settings.lora == [f"{path}:1"]
    again = ("--lora", f"{path}:0.5", "--resume", "--output_path", tmp_path / "0")
    code, output, _ = main(capsys, *SHORT, *again)
    assert code == 0
    assert "42_0.2_0001.mp4" in output, "with another scale it is another video"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: {}, "holds no weights"),
        (lambda w: {**w, "unet.down.lora_up.weight": torch.ones(1)}, "holds unet.down.lora_up"),
        (
            lambda w: {n.replace("blocks.0", "blocks.99"): t for n, t in w.items()},
            "is of another model: it holds transformer.transformer_blocks.99.attn1",
        ),
    ],
)
def test_a_lora_of_something_else_is_refused(capsys, weights, tmp_path, change, told):
    path = tmp_path / "style.safetensors"
    save_file(change(weights), path)
    error = refused(capsys, *WHOLE, "--lora", path, "--output_path", tmp_path / "o")
    assert error.startswith(f"error: --lora {path}")
    assert told in error


def test_a_lora_that_is_not_there_is_refused(capsys, tmp_path):
    for source in (tmp_path / "none.safetensors", tmp_path, ROOT / "README.md"):
        error = refused(capsys, *WHOLE, "--lora", source, "--output_path", tmp_path / "o")
        assert error.startswith(f"error: --lora {source}")


def test_short_prompts_of_the_real_model_get_a_hint(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "is_full_size", lambda folder: True)
    quick = (*SHORT, "--num_infer_steps", 1, "--output_path", tmp_path)
    assert "hint        'a man' is short" in main(capsys, *quick, "--prompt", "a man")[1]
    assert "hint" not in main(capsys, *quick, "--prompt", "a man " * 20)[1]
