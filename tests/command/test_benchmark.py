"""The benchmark, through its commands, and what it measures on."""

from __future__ import annotations

import json

import pytest
import torch
from support import CPU, handlers_given_back

from teacache.benchmark import processes, random_weights
from teacache.benchmark.__main__ import main
from teacache.benchmark.timing import Bench
from teacache.checkpoint.folder import check_checkpoint
from teacache.run.models import use_lean_models

SHORT = ("--num_infer_steps", "4", "--computed_steps", "3")


def benchmark(capsys, tmp_path, *arguments):
    with handlers_given_back():
        try:
            code = main([*map(str, arguments), "--output_path", str(tmp_path)])
        except SystemExit as end:
            code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(tmp_path):
    data = json.loads((tmp_path / "benchmark_0000.json").read_text())
    return data, {row["figure"]: row for row in data["rows"]}


def test_each_row_whatever_becomes_of_another(capsys, tmp_path):
    rows = ("ceilings", "attention", "plain", "exact", "fp8", "video", "profile")
    code, out, err = benchmark(
        capsys, tmp_path, *SHORT, "--attention", "_native_math", "--rows", *rows
    )
    assert code == 0
    data, found = report(tmp_path)
    assert (tmp_path / "benchmark_0000.md").read_text().strip() == out.strip()
    setting = " --attention _native_math"
    video = f"loaded model to mp4, 3 computed steps{setting}"
    fp8 = f"computed step{setting} --compile --quantize fp8"
    assert list(found) == [
        *("a large product", f"attention of a layer{setting}", "computed step by diffusers"),
        *(f"computed step{setting}", f"forecast step{setting}", video, fp8),
        f"kernels of a computed step{setting}",
    ]
    printed = [line for line in err.splitlines() if not line.startswith(str(tmp_path))]
    assert [line.split("  ")[0] for line in printed] == list(found), "as they come"
    assert [name for name, row in found.items() if row["failed"]] == [fp8]
    assert found[fp8]["notes"].startswith("failed: --quantize fp8 needs a GPU")
    assert "video: 13 frames of 112x96, 520 tokens" in out
    assert data["about"]["device"] == "cpu"

    computed, forecast = found[f"computed step{setting}"], found[f"forecast step{setting}"]
    assert (len(computed["seconds"]), len(forecast["seconds"])) == (4, 3)
    # On a quiet machine a forecast step takes half a percent; this one runs other tests.
    assert sorted(forecast["seconds"])[1] < 0.1 * sorted(computed["seconds"])[1]
    parts = dict(part.split() for part in found[video]["notes"].split(", "))
    assert [*parts] == ["encoding", "denoising", "decoding", "writing"]
    total = sum(map(float, parts.values()))
    assert found[video]["seconds"] == [pytest.approx(total, abs=0.25)], "each rounded to 0.1"
    assert "addmm" in out, "a kernel of the profile"


def test_changes_of_the_decoder_are_taken_back():
    bench = Bench("tiny", "native", CPU, torch.float32)
    use_lean_models(bench.pipe, "native")
    bench.size = bench.size._replace(num_frames=9)  # 5 latent frames: it takes three, then two
    exact, *changed, compiled = bench.decodings()
    before = [weight.stride() for weight in bench.pipe.vae.parameters()]
    assert not exact[1]().notes
    found = [measure().notes for _, measure in changed]
    assert compiled[0] == "decoding, compiled"  # measured on GPUs: to compile it takes a minute
    # cuDNN is not asked on a CPU; convolutions with channels last are rounded otherwise.
    assert found[0] == "the same frames"
    assert found[1] in ("the same frames", "up to 1 of 255 away")
    assert found[2].startswith("up to "), "the norms are those of other frames"
    assert not torch.backends.cudnn.benchmark
    assert bench.pipe.vae.num_latent_frames_batch_size == 2
    assert [weight.stride() for weight in bench.pipe.vae.parameters()] == before


def test_each_part_in_a_process(capsys, tmp_path, monkeypatch):
    """On a CPU, where no memory is limited; with a backend that is missing."""
    monkeypatch.setattr(processes, "CARDS", (8,))
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    code, _, err = benchmark(
        *(capsys, out, *SHORT, "--device", "cpu", "--rows", "exact", "profile", "command"),
        *("memory", "--attention", "native", "sage", "--ckpts_path", checkpoint),
    )
    assert code == 0
    data, found = report(out)
    command = "whole command, 3 computed steps, {} time"
    assert list(found) == [
        *("computed step", "forecast step", "kernels of a computed step", "--attention sage"),
        *("writing the checkpoint", command.format("first"), command.format("second")),
        "two computed steps on 8 GB",
    ]
    assert "computed step  " in err, "printed as they come"
    assert [name for name, row in found.items() if row["failed"]] == ["--attention sage"]
    assert "--attention sage does not work here" in found["--attention sage"]["notes"]
    for when, text in (("first", True), ("second", False)):
        notes = found[command.format(when)]["notes"]
        stages = dict(part.rsplit(" ", 1) for part in notes.split(", "))
        assert (float(stages["identity"]) > 0.5) == text, "the second time it is in the cache"
        assert {"computed step", "loading", "decoding", "writing", "total"} < {*stages}
    notes = found["two computed steps on 8 GB"]["notes"]
    assert notes.startswith("no GPU, so no limit; transformer resident; counted (GiB): text 0.5, ")
    assert data["about"]["device"] == "cpu"
    assert len(data["texts"]) == 1
    check_checkpoint(checkpoint)
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--random_weights", "full"), "needs a CUDA GPU"),
        (("--rows", "exact", "--attention", "cudnn"), "--attention cudnn does not work here"),
        (("--rows", "fast"), "argument --rows"),
        (("--num_infer_steps", "0"), "--num_infer_steps"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, arguments, complaint):
    code, _, error = benchmark(capsys, tmp_path, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert complaint in error


@pytest.mark.parametrize(("ranks", "complaint"), [(2, "unset RANK"), (1, "it exists")])
def test_the_benchmark_is_none_of_several_ranks(capsys, tmp_path, monkeypatch, ranks, complaint):
    variables = {"RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, _, error = benchmark(capsys, tmp_path, "--write", tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert error.endswith(f"{complaint}\n")


def test_the_real_size():
    """Made where nothing takes memory: what the weights would be, and of what."""
    with random_weights.made_in_place(torch.device("meta"), torch.bfloat16):
        transformer, vae = random_weights.random_models("full")
        text_encoder = random_weights.random_text_encoder("full")
    assert {p.device.type for p in transformer.parameters()} == {"meta"}
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    assert len(transformer.perceiver_cross_attention) == 21
    assert transformer.perceiver_cross_attention[0].to_q.weight.shape == (2048, 3072)
    billions = [
        sum(p.numel() for p in model.parameters()) / 1e9
        for model in (transformer, vae, text_encoder)
    ]
    # CogVideoX-5B-I2V's 5.6, and the identity layers; T5-XXL's encoder has 9.5 GB.
    assert billions == [pytest.approx(n, rel=0.001) for n in (6.162, 0.2156, 4.762)]
    assert text_encoder.config.d_model == transformer.config.text_embed_dim
    assert torch.get_default_dtype() == torch.float32
