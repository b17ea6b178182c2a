"""The benchmark, through its commands, and what it measures on."""

from __future__ import annotations

import json

import pytest
import torch
from processes import ended
from support import CPU, handlers_given_back

from teacache.benchmark import __main__ as steps
from teacache.benchmark import everything, random_weights
from teacache.benchmark.decoders import decodings
from teacache.benchmark.table import Row, Table
from teacache.benchmark.timing import Bench
from teacache.checkpoint.folder import check_checkpoint

SHORT = ("--num_infer_steps", "4", "--computed_steps", "3")


def benchmark(capsys, tmp_path, *arguments, program=steps.main):
    with handlers_given_back():
        try:
            code = program([*map(str, arguments), "--output_path", str(tmp_path)])
        except SystemExit as end:
            code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(tmp_path, name="benchmark"):
    data = json.loads((tmp_path / f"{name}_0000.json").read_text())
    return data, {row["figure"]: row for row in data["rows"]}


def test_each_row_whatever_becomes_of_another(capsys, tmp_path):
    rows = ("ceilings", "attention", "plain", "exact", "fp8", "video")
    code, out, err = benchmark(
        capsys, tmp_path, *SHORT, "--attention", "_native_math", "--profile", "--rows", *rows
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
    assert f"Computed step{setting}: " in out
    assert "addmm" in out, "a kernel of the profile"


def test_an_error_of_one_of_several_ranks_ends_all():
    """The others would wait for it."""
    table, asked = Table(None, {}), "a figure"
    assert not table.measure(asked, lambda: Row([1 / 0]))
    assert [(row.figure, row.notes) for row in table.rows] == [(asked, "failed: division by zero")]
    with pytest.raises(ZeroDivisionError):
        table.measure(asked, lambda: Row([1 / 0]), alone=False)


def test_several_ranks_report_once(tmp_path):
    asked = "--num_gpus 2 --device cpu --rows plain exact video decoding --output_path".split()
    run = ended(*SHORT, *asked, tmp_path, program=("-m", "teacache.benchmark"))
    assert run.returncode == 0, run.stderr
    _, found = report(tmp_path)
    assert list(found) == [
        *("computed step --num_gpus 2", "forecast step --num_gpus 2"),
        "loaded model to mp4, 3 computed steps --num_gpus 2",
    ], "what the first rank does alone is left out"
    assert run.stderr.count("computed step") == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_changes_of_the_decoder_are_taken_back():
    bench = Bench("tiny", "native", CPU, torch.float32)
    bench.use_command_models()
    bench.exact()
    bench.latents = bench.latents[:, :5]  # the decoder takes three of them, then two
    exact, *changed, compiled = decodings(bench)
    before = {name: (p.data_ptr(), p.stride()) for name, p in bench.pipe.vae.named_parameters()}
    assert not exact[1]().notes
    found = [measure().notes for _, measure in changed]
    assert compiled[0] == "decoding, compiled"  # measured on GPUs: to compile it takes a minute
    # cuDNN is not asked on a CPU; convolutions with channels last are rounded otherwise.
    assert found[0] == "the same frames"
    assert found[1] in ("the same frames", "up to 1 of 255 away")
    assert found[2].startswith("up to "), "the norms are those of other frames"
    assert not torch.backends.cudnn.benchmark
    assert bench.pipe.vae.num_latent_frames_batch_size == 2
    after = {name: (p.data_ptr(), p.stride()) for name, p in bench.pipe.vae.named_parameters()}
    assert after == before


def test_everything(capsys, tmp_path, monkeypatch):
    """Each part once, on a CPU, where no memory is limited; a backend that is missing."""
    monkeypatch.setattr(everything, "CARDS", (8,))
    checkpoint = tmp_path / "checkpoint"
    code, out, _ = benchmark(
        *(capsys, tmp_path / "out", *SHORT, "--device", "cpu", "--rows", "exact"),
        *("--attention", "sage", "--ckpts_path", checkpoint),
        program=everything.main,
    )
    assert code == 0
    data, found = report(tmp_path / "out", "everything")
    command = "whole command, 3 computed steps, {} time"
    assert list(found) == [
        *("computed step", "forecast step", "steps --attention sage", "writing the checkpoint"),
        *(command.format("first"), command.format("second"), "two computed steps on 8 GB"),
    ]
    assert [name for name, row in found.items() if row["failed"]] == ["steps --attention sage"]
    assert "--attention sage does not work here" in found["steps --attention sage"]["notes"]
    for when, text in (("first", True), ("second", False)):
        stages = dict(part.split() for part in found[command.format(when)]["notes"].split(", "))
        assert (float(stages["identity"]) > 0.5) == text, "the second time it is in the cache"
        assert {"loading", "denoising", "decoding", "writing", "total"} < {*stages}
    notes = found["two computed steps on 8 GB"]["notes"]
    assert notes.startswith("no GPU, so no limit; transformer resident; counted (GiB): text 0.5, ")
    assert data["about"]["device"] == "cpu"
    assert "ms of kernels" in out
    check_checkpoint(checkpoint)
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--random_weights", "full"), "needs a CUDA GPU"),
        (("--attention", "cudnn"), "--attention cudnn does not work here"),
        (("--rows", "fast"), "argument --rows"),
        (("--num_infer_steps", "0"), "--num_infer_steps"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, arguments, complaint):
    code, _, error = benchmark(capsys, tmp_path, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert complaint in error


def test_a_checkpoint_is_not_overwritten(capsys, tmp_path):
    with pytest.raises(SystemExit):
        random_weights.main([str(tmp_path)])
    assert capsys.readouterr().err == f"error: {tmp_path} exists (see --help)\n"


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
