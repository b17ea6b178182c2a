"""What is on the GPU when, by what a card has free. The full-size figures are the README's."""

import json
from pathlib import Path

import pytest
import torch

from teacache.base import device
from teacache.benchmark.random_weights import FULL, FULL_VAE
from teacache.checkpoint.size import VideoSize
from teacache.preflight import card
from teacache.request.arguments import parse_arguments
from teacache.request.values import Request
from teacache.run.memory import out_of_memory

GIB = 2**30
FULL_SIZE = VideoSize(720, 480, 49)
# Numbers of the real checkpoint, in billions: of the transformer, its blocks, VAE, text encoder.
NUMBERS = {"transformer": 6.162e9, "blocks": 5.552e9, "vae": 0.2156e9, "text_encoder": 4.762e9}


@pytest.fixture
def full(tmp_path, monkeypatch):
    """A folder with the real configurations, and the numbers of weights without the weights."""
    for part, config in (("transformer", FULL), ("vae", FULL_VAE)):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(
        card,
        "numbers",
        lambda component, prefix="": int(NUMBERS["blocks" if prefix else component.name]),
    )
    return tmp_path


def machine(*arguments):
    return Request.of(parse_arguments([*map(str, arguments)])).options.machine


@pytest.mark.parametrize(
    ("free", "arguments", "offload", "tiled"),
    [
        (79.0, (), "none", False),
        (23.2, (), "none", False),
        (15.2, (), "blocks", False),
        (11.3, (), "blocks", True),
        (7.6, (), "sequential", True),
        (79.0, ("--offload", "sequential", "--vae_tiling"), "sequential", True),
        (11.3, ("--offload", "none", "--vae_tiling", "off"), "none", False),
        (11.3, ("--quantize", "fp8"), "model", True),
        (7.6, ("--compile",), "blocks", True),
        (15.2, ("--num_gpus", 2), "none", False),
    ],
)
def test_what_a_card_gets(full, monkeypatch, free, arguments, offload, tiled):
    monkeypatch.setattr(card, "free_memory_bytes", lambda device: int(free * GIB))
    monkeypatch.setattr(card, "total_memory_bytes", lambda device: int((free + 0.5) * GIB))
    cuda = torch.device("cuda")
    settled, line = card.fit_to_card(
        machine(*arguments), full, FULL_SIZE, True, cuda, torch.bfloat16
    )
    assert (settled.offload, settled.vae_tiling) == (offload, "on" if tiled else "off")
    assert line.startswith(f"memory{free + 0.5:14.1f} GiB, {free:.1f} free: {card.WHERE[offload]}")
    assert ("not bit for bit" in line) == tiled


def test_what_is_needed_is_what_was_measured(full):
    """On an H100 15.5 GiB were held to denoise; decoding was computed since, see `test_memory`."""
    needed = card.needs(full, FULL_SIZE, True, torch.bfloat16)
    assert needed.resident / GIB == pytest.approx(15.53 + 0.5, abs=0.1)
    assert 0.4 + 8.44 + 2.4 < needed.decoding / GIB < 15.2, "a 16 GB card decodes without tiles"
    assert needed.text / GIB < 11.3, "a 12 GB card embeds text"
    assert needed.streamed / GIB < 7.6


@pytest.mark.parametrize(
    ("arguments", "stage", "flags"),
    [
        ((), "denoising", "--offload blocks, --offload sequential"),
        (("--compile",), "denoising", "--offload blocks"),
        (("--quantize", "fp8"), "denoising", "--offload model"),
        (
            ("--num_gpus", 2),
            "encoding",
            "--vae_tiling, --num_gpus 1 --offload blocks, --num_gpus 1 --offload sequential",
        ),
        (("--offload", "blocks"), "denoising", "--offload sequential"),
        ((), "decoding", "--vae_tiling"),
        ((), "text", "--offload sequential"),
    ],
)
def test_only_what_helps_is_advised(arguments, stage, flags):
    settled, _ = card.fit_to_card(
        machine(*arguments), Path(), FULL_SIZE, True, torch.device("cpu"), torch.float32
    )
    error = torch.OutOfMemoryError("CUDA out of memory")
    assert out_of_memory(error, stage, settled).endswith(f"Try, in this order: {flags}")


def test_memory_that_runs_out_is_known_by_its_error():
    for error in (
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory"),
        OSError(12, "Cannot allocate memory"),
    ):
        assert device.is_out_of_memory(error)


@pytest.mark.parametrize(("fraction", "total", "free"), [(1.0, 80, 62), (0.3, 24, 14)])
def test_a_part_of_a_card_is_a_smaller_card(monkeypatch, fraction, total, free):
    """Of 80 GiB 60 are free, 10 allocated and 2 in torch's cache."""
    answers = {
        "mem_get_info": (60 * GIB, 80 * GIB),
        "memory_allocated": 10 * GIB,
        "memory_reserved": 12 * GIB,
        "get_per_process_memory_fraction": fraction,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    cuda = torch.device("cuda")
    assert device.total_memory_bytes(cuda) == total * GIB
    assert device.free_memory_bytes(cuda) == free * GIB
