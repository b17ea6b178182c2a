"""What a step takes at least: the work that is counted, against the formulas."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from teacache.benchmark import floor
from teacache.benchmark.floor import Rates, Row
from teacache.benchmark.work import count

TOKENS, WIDTH, LAYERS, SAMPLES = 226 + 17550, 3072, 42, 2


@pytest.fixture(scope="module")
def rows():
    return floor.floors(Rates())


def test_the_work_of_a_step():
    computed, reused = count(ours=True)
    assert computed.work.attention >= 4 * SAMPLES * LAYERS * TOKENS**2 * WIDTH
    layers = 24 * SAMPLES * LAYERS * TOKENS * WIDTH**2  # q, k, v, out; and two, four times as wide
    # Of the face there are queries and outputs of 2048 in each second layer. The rest is small.
    face = 4 * SAMPLES * LAYERS // 2 * 17550 * WIDTH * 2048
    assert computed.work.product == pytest.approx(layers + face, rel=0.005)
    assert reused.work.attention == 0
    assert reused.work.product < 1e-4 * computed.work.product
    assert computed.between < computed.work.elsewhere


def test_an_h100_has_come_near_to_them(rows):
    """Measured on one, see the README: none is faster than its floor, nor a fifth slower."""
    measured = [1.909, 1.82, 1.45, 1.27]
    for row, seconds in zip(rows, measured, strict=True):
        assert row.computed < seconds < 1.2 * row.computed, row.name
    assert rows[1].reused < 3.4e-3


def test_a_video_is_its_steps():
    row = Row("", (True, False, False), computed=2.0, reused=0.5)
    assert row.video(22, 50) == 22 * 2.0 + 28 * 0.5
    assert row._replace(reused=None).video(22, 50) == 100


def test_the_command(tmp_path, capsys):
    settings = {"threshold": None, "attention": "native", "compile": False, "quantize": None}
    row = {"settings": settings, "computed step": {"median": 1.909}}
    (tmp_path / "measured.json").write_text(json.dumps({"rows": [row]}))
    picture = tmp_path / "floor.png"
    asked = ["--measured", str(tmp_path / "measured.json"), "--picture", str(picture)]
    assert floor.main(asked) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].split("|")[3].strip() == "1.91 s"
    assert table[3].split("|")[3].strip() == ""
    assert Image.open(picture).size == (800, 360)
    (tmp_path / "measured.json").write_text("{}")
    assert floor.main(asked) == 2
    assert "measured.json: not a benchmark's JSON" in capsys.readouterr().err
