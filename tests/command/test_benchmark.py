"""The benchmark, through its command, and what it measures on."""

from __future__ import annotations

import json

import pytest
import torch
from processes import ended
from support import CPU

from teacache.benchmark import random_weights, timing
from teacache.benchmark.__main__ import main


def benchmark(capsys, tmp_path, *arguments):
    try:
        code = main([*map(str, arguments), "--output_path", str(tmp_path)])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_small_random_weights(capsys, tmp_path):
    code, out, err = benchmark(
        capsys, tmp_path, "--num_infer_steps", 3, "--computed_steps", 2, "--rounds", 2
    )
    assert code == 0
    assert "weights: random, small" in out
    assert "3, 2 computed with TeaCache" in out
    order = [line.split(": ")[1] for line in err.splitlines() if line.startswith("round")]
    assert order == ["plain pipeline", "TeaCache 0.15"] * 2, "alternating"

    report = json.loads((tmp_path / "benchmark_0000.json").read_text())
    assert (tmp_path / "benchmark_0000.md").read_text().strip() == out.strip()
    plain, ours = report["rows"]
    assert [row["settings"]["threshold"] for row in (plain, ours)] == [None, 0.15]
    assert plain["steps"] == [3, 0]
    assert ours["steps"] == [2, 1]
    assert plain["reused step"] is None
    assert plain["ratios"] == {"computed step": 1.0, "whole video": 1.0}
    for row in (plain, ours):
        stages = sum(row[n]["median"] for n in ("encoding", "denoising", "decoding", "writing"))
        assert row["whole video"]["median"] == pytest.approx(stages, rel=0.2)
        steps = row["computed step"]
        assert steps["lowest"] <= steps["median"] <= steps["highest"]
    # On a quiet machine a reused step takes 0.7 % of a computed one; this one runs other tests.
    assert ours["reused step"]["median"] <= 0.02 * ours["computed step"]["median"]
    assert ours["denoising"]["median"] < plain["denoising"]["median"]


def test_a_checkpoint_with_its_own_schedule(capsys, tmp_path):
    arguments = ("--ckpts_path", "tiny", "--rel_l1_thresh", 0.3, "--num_infer_steps", 9)
    code, out, _ = benchmark(
        capsys, tmp_path, *arguments, "--rounds", 1, "--attention", "_native_math"
    )
    assert code == 0
    rows = json.loads((tmp_path / "benchmark_0000.json").read_text())["rows"]
    names = [row["variant"] for row in rows]
    assert names == ["plain pipeline", "TeaCache 0.3", "TeaCache 0.3 + _native_math"]
    assert rows[1]["steps"] == rows[2]["steps"]
    assert rows[1]["steps"][1] > 0
    assert "- identity: " in out
    assert "- text: " in out


def test_several_ranks_report_once(tmp_path):
    asked = (
        "--ckpts_path tiny --num_infer_steps 8 --rel_l1_thresh 0.3 --rounds 1 --num_gpus 2".split()
    )
    asked += ["--device", "cpu", "--output_path", tmp_path]
    run = ended(*asked, program=("-m", "teacache.benchmark"))
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("round 1 of 1") == 2
    report = json.loads((tmp_path / "benchmark_0000.json").read_text())
    expected = "2 ranks: guidance x2; the plain pipeline on one"
    assert report["about"]["ranks"] == expected
    assert [row["steps"][0] for row in report["rows"]] == [8, 6]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--ckpts_path", "/nowhere/at/all"), "there is no such folder"),
        (("--quantize", "fp8"), "--quantize fp8 needs a GPU"),
        (("--random_weights", "full"), "needs a CUDA GPU"),
        (("--ckpts_path", "tiny", "--computed_steps", 3), "--computed_steps"),
        (("--computed_steps", 99), "--computed_steps"),
    ],
)
def test_wrong_input_is_one_line(capsys, tmp_path, arguments, complaint):
    code, _, error = benchmark(capsys, tmp_path, *arguments)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: ")
    assert complaint in error


def test_the_real_size():
    """Made where nothing takes memory: what the weights would be, and of what."""
    config, vae_config = random_weights.CONFIGS["full"]
    with random_weights.made_in_place(torch.device("meta"), torch.bfloat16):
        transformer = random_weights.ConsisIDTransformer3DModel(**config)
        vae = random_weights.AutoencoderKLCogVideoX(**vae_config)
    assert {p.device.type for p in transformer.parameters()} == {"meta"}
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    assert len(transformer.perceiver_cross_attention) == 21
    assert transformer.perceiver_cross_attention[0].to_q.weight.shape == (2048, 3072)
    billions = sum(p.numel() for p in transformer.parameters()) / 1e9
    assert 5.5 < billions < 7, "CogVideoX-5B-I2V's 5.6, and the identity layers"
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(215.6, abs=1)
    assert torch.get_default_dtype() == torch.float32


def test_each_variant_adds_one_acceleration():
    found = timing.variants([0.2], "_native_cudnn", True, "fp8")
    assert [(v.threshold, v.attention, v.compile, v.quantize) for v in found] == [
        *((None, "native", False, None), (0.2, "native", False, None)),
        *((0.2, "_native_cudnn", False, None), (0.2, "_native_cudnn", True, None)),
        (0.2, "_native_cudnn", True, "fp8"),
    ]
    assert found[-1].name == "TeaCache 0.2 + cudnn + compile + fp8"


def test_each_variant_has_models_of_its_own():
    bench = timing.of_random_weights("small", 4, 2, CPU, torch.float32)

    def plain_latents():
        with bench._ready(timing.PLAIN):
            return bench.plain_latents(3, {}).latents

    before = plain_latents()
    bench.sample(timing.Variant("ours", 0.15, attention="_native_math"))
    bench.sample(timing.Variant("ours", 0.3, attention="_native_math"))
    assert len(bench._models) == 2, "whatever the threshold"
    assert torch.equal(plain_latents(), before)
