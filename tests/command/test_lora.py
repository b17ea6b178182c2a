"""LoRAs as people have them: fused, or refused in one line before anything large is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_state_dict
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import main, refused, replace

from teacache.base.errors import CheckpointError
from teacache.results.record import read_record
from teacache.results.video import read_video
from teacache.sampling.lora import USUAL_NAME, check_lora, fuse_loras, lora_file

SHORT = ("--ckpts_path", "tiny", "--num_infer_steps", 2, "--num_frames", 1)
LAYER = "transformer.transformer_blocks.0.attn1.to_q"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
# As diffusers writes it: for an alpha of twice the rank, and a field that peft does not have yet.
CONFIG = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.later": None}
OLDER = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}


@pytest.fixture(scope="module")
def weights(tiny):
    """A small LoRA of the embedded checkpoint, random, as diffusers names it."""
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


def write(path: Path, weights: dict, config: object = "") -> None:
    """A file as diffusers writes it; `config` is an object, or the text itself."""
    text = config if isinstance(config, str) else json.dumps(config)
    save_file(weights, path, {"format": "pt", "lora_adapter_metadata": text})


def test_a_lora_changes_the_video(capsys, weights, tmp_path):
    """With another scale it is another one, also for --resume."""
    path, out = tmp_path / "style.safetensors", tmp_path / "out"
    write(path, weights)
    for scale in ("", ":0"):
        asked = (*SHORT, "--lora", f"{path}{scale}", "--resume", "--output_path", out)
        assert main(capsys, *asked)[0] == 0
    one, other = (read_video(out / f"42_0.1_000{number}.mp4").frames for number in range(2))
    assert (one != other).any()
    assert read_record(out / "42_0.1_0000.json").settings.lora == [f"{path}:1"]


def bare(values: dict) -> dict:
    return {name.removeprefix("transformer."): value for name, value in values.items()}


def of_peft(folder: Path, weights: dict, pipe) -> None:
    """As peft writes it, with the alpha in a file of its own."""
    layers = sorted({name.partition(".lora_")[0] for name in bare(weights)})
    config = LoraConfig(r=4, lora_alpha=8, target_modules=layers)
    model = get_peft_model(pipe.transformer, config)
    set_peft_model_state_dict(model, {f"base_model.model.{n}": t for n, t in bare(weights).items()})
    model.save_pretrained(folder)


def older(folder: Path, weights: dict, pipe) -> None:
    """Of a tool whose metadata says nothing to diffusers."""
    metadata = {"ss_network_alpha": "1", "ss_network_dim": "4"}
    save_file(convert_state_dict(weights, OLDER), folder / "older.safetensors", metadata)


@pytest.mark.parametrize(
    ("alpha", "save"),
    [
        (8, lambda folder, weights, pipe: write(folder / "own name.safetensors", weights, CONFIG)),
        (8, lambda folder, weights, pipe: write(folder / USUAL_NAME, bare(weights), bare(CONFIG))),
        (8, of_peft),
        (4, lambda folder, weights, pipe: write(folder / "no_suffix", weights)),
        (4, lambda folder, weights, pipe: torch.save(weights, folder / "old.bin")),
        (4, older),
    ],
)
def test_it_is_fused_however_it_was_saved(make_pipe, tiny, weights, tmp_path, alpha, save):
    """From a folder with one file, or by the file's name."""
    save(tmp_path, weights, make_pipe())
    source = str(tmp_path / "no_suffix" if (tmp_path / "no_suffix").exists() else tmp_path)
    check_lora(source, lora_file(source), tiny)
    before, after = make_pipe().transformer.state_dict(), make_pipe()
    fuse_loras(after, ((source, 0.5),))
    assert after.transformer.state_dict().keys() == before.keys()
    for name, tensor in after.transformer.state_dict().items():
        layer = f"transformer.{name.removesuffix('.weight')}"
        expected = before[name]
        if f"{layer}.lora_A.weight" in weights:
            factors = weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]
            expected = expected + alpha / 4 * 0.5 * factors
        torch.testing.assert_close(tensor, expected)  # a factor of two apart rounds alike


def cut(path: Path, weights: dict) -> None:
    write(path, weights)
    replace(path, path.read_bytes()[:-9])


def changed(change: Callable = dict, config: object = "") -> Callable:
    return lambda path, weights: write(path, change(weights), config)


def configured(**config: object) -> Callable:
    return changed(config=CONFIG | {f"transformer.{name}": value for name, value in config.items()})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed(lambda w: {}), "holds no weights"),
        (
            changed(lambda w: {**w, "unet.down.lora_up.weight": torch.ones(1)}),
            "holds unet.down.lora_up",
        ),
        (
            changed(lambda w: {n.replace("blocks.0", "blocks.99"): t for n, t in w.items()}),
            "of another model or another tool: it holds transformer_blocks.99.attn1.to_q",
        ),
        (changed(lambda w: {**w, A: torch.ones(4, 7)}), "size mismatch for transformer_blocks.0"),
        (changed(lambda w: {n: w[n] for n in w if n != B}), "to_q.lora_B.weight is missing"),
        (changed(lambda w: {**w, B: w[B] / 0}), "lora_B.weight has NaN, infinite or whole numbers"),
        (changed(config="{broken"), "JSONDecodeError: Expecting property name"),
        (changed(config="[4]"), "its lora_adapter_metadata is no JSON object"),
        (configured(r=8), "size mismatch for transformer_blocks.0"),
        (configured(lora_alpha="8"), "unsupported operand type"),
        (configured(lora_alpha=float("nan")), "alpha is NaN or inf"),
        (configured(use_dora=True), "lora_magnitude_vector is missing"),
        (configured(init_lora_weights="pissa"), "cannot be read: Runt"),
        (cut, "incomplete metadata, file not fully covered"),
        (lambda path, w: path.write_text("<html>" * 99), "header too large"),
        (lambda path, w: torch.save({"weight": main}, path), "more than weights, which might run"),
        (lambda path, w: torch.save({"state_dict": w}, path), "no weights, or not only weights"),
        (
            lambda path, w: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
            "is a pointer: run `git lfs pull` in its folder",
        ),
    ],
)
def test_what_cannot_be_fused_is_refused(capsys, weights, tmp_path, content, told):
    path = tmp_path / "style.safetensors"
    content(path, weights)
    error = refused(capsys, *SHORT, "--lora", path, "--output_path", tmp_path / "o")
    assert error.startswith(f"error: --lora {path}")
    assert told in error


def test_a_file_that_is_not_there_is_refused(capsys, weights, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("a.safetensors", "b.safetensors", "._a.safetensors"):
        write(tmp_path / name, weights)
    for source, told in (
        (tmp_path / "none.safetensors", "there is no such file"),
        (tmp_path / "empty", "holds no LoRA: there is no .safetensors file in it"),
        (tmp_path, "name one of its files: a.safetensors, b.safetensors"),
    ):
        error = refused(capsys, *SHORT, "--lora", source, "--output_path", tmp_path / "o")
        assert error.startswith(f"error: --lora {source}")
        assert error.endswith(told)


def test_one_that_is_too_large_for_the_weights_is_blamed(pipe, weights, tmp_path):
    """Its numbers and its scale are finite, and their product is not."""
    write(tmp_path / "style.safetensors", weights)
    with pytest.raises(CheckpointError, match=r"^--lora \S*style.safetensors:1e\+39 .*NaNs"):
        fuse_loras(pipe, ((str(tmp_path / "style.safetensors"), 1e39),))
