"""Records; quality, tables, picture and side-by-side video, on frames that no model has made."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from records import record_of_a_video

from teacache.comparison import quality
from teacache.comparison.figure import draw_sweep
from teacache.comparison.side_by_side import write_grid
from teacache.comparison.tables import sweep_markdown, sweep_rows, terminal_table
from teacache.core.rule import schedule
from teacache.results.record import Record, finite, read_record, summary
from teacache.results.video import read_video


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)


def test_psnr_by_its_definition(noise):
    frames = noise.copy()
    frames[1] = np.clip(noise[1].astype(int) + 10, 0, 255)
    frames[2] = np.clip(noise[2].astype(int) - 30, 0, 255)
    found = quality.compare(frames, noise)
    expected = [
        10 * np.log10(255**2 / np.mean((frames[n].astype(float) - noise[n]) ** 2)) for n in (1, 2)
    ]
    # Floating point alone: sums in another order.
    assert found["psnr"]["per_frame"][0] is None, "a frame that is the same has no PSNR"
    assert found["psnr"]["per_frame"][1:] == pytest.approx(expected, rel=1e-9)
    assert found["psnr"]["mean"] == pytest.approx(np.mean(expected), rel=1e-9)
    assert found["psnr"]["worst"] == pytest.approx(expected[1], rel=1e-9)
    assert [found[name]["worst_frame"] for name in ("psnr", "ssim")] == [2, 2]
    assert found["ssim"]["per_frame"][0] == pytest.approx(1.0)
    assert found["ssim"]["worst"] == min(found["ssim"]["per_frame"]) < 1


def test_the_same_video_is_called_identical(noise):
    found = quality.compare(noise, noise)
    none = {"mean": None, "worst": None, "worst_frame": None}
    assert found["psnr"] == {**none, "per_frame": [None] * 3}
    record = record_of_a_video(rel_l1_thresh=0.1, quality=found)
    assert "identical" in terminal_table(sweep_rows([("x", record)]))


def test_lpips_where_it_is_missing_and_where_it_is_there(monkeypatch, tmp_path, noise):
    """The real package on a backbone of random weights, in the place where the real one lies."""
    from torchvision.models import alexnet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = quality.compare(noise, noise)
    assert found["lpips"] is None
    assert quality.LPIPS_BACKBONE in found["lpips_missing"]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    weights = tmp_path / "hub" / "checkpoints" / quality.LPIPS_BACKBONE
    torch.save(alexnet().state_dict(), weights)
    darker = (noise * 0.5).astype(np.uint8)
    found = quality.compare(np.stack([noise[0], darker[1], darker[2]]), noise)
    assert found["lpips_missing"] is None
    same, *others = found["lpips"]["per_frame"]
    assert same == 0
    assert min(others) > 0
    assert found["lpips"]["worst"] == max(others)
    assert found["lpips"]["worst_frame"] == 1 + others.index(max(others))


@pytest.mark.parametrize(
    ("per_frame", "shown"),
    [
        ([0.9, *[None] * 12], "0.900 (0.900) in 1 of 13 frames, 8%"),
        ([0.7, 0.5, 0.6], "0.600 (0.500) in 3 of 3 frames, 100%"),
        ([None] * 13, "- in 0 of 13 frames, 0%"),
    ],
)
def test_identity_says_of_how_many_frames_it_is(per_frame, shown):
    """So that a face that is hardly ever found does not look better; also of an old record."""
    known = [value for value in per_frame if value]
    mean, worst = (sum(known) / len(known), min(known)) if known else (None, None)
    old = {"mean": mean, "worst": worst, "per_frame": per_frame, "frames_without_face": 0}
    rows = sweep_rows([("x", record_of_a_video(quality={"identity": old}))])
    assert f" {shown} " in terminal_table(rows)
    assert f"| {shown} |" in sweep_markdown(rows)


def test_the_summary_names_the_worst_frame():
    found = {"psnr": {"mean": 40.04, "worst": 31.66, "worst_frame": 7, "per_frame": []}}
    told = summary(Path("x.mp4"), record_of_a_video(quality=found))
    assert "PSNR        40.0 dB, worst 31.7 in frame 7" in told.splitlines()


def test_figure_and_markdown_of_one_video_alone(tmp_path):
    """A sweep that was interrupted after its first video, without threshold 0."""
    record = record_of_a_video(rel_l1_thresh=0.15)
    rows, filled = sweep_rows([("1_0.15_0000", record)]), []
    for each in (record, record_of_a_video(computed_steps=[0, 1, 2, 3, 4])):
        draw_sweep(rows, [each], tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as figure:
            assert figure.width == 1200
            pixels = np.array(figure.convert("RGB"))
        filled.append((pixels == (0x1F, 0x5F, 0xA8)).all(-1).sum(1).max())
    # Of the pixels in a row through the cells' middle, three fifths have the colour of the
    # computed steps that all have where all five are computed.
    assert filled[0] / filled[1] == pytest.approx(0.6, abs=0.02)  # whole pixels, the cells' edges
    assert "| 2.0 |" in sweep_markdown(rows)


def test_grid_places_every_video_below_its_label(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    videos = [np.full((4, 96, 144, 3), colour, np.uint8) for colour in colours]
    videos[2] = videos[2][:2]  # an earlier, shorter one
    write_grid(videos, ["one\nline", "two", "three"], tmp_path / "grid.mp4")
    grid = read_video(tmp_path / "grid.mp4").frames
    assert grid.shape == (4, 512, 640, 3)
    for n, colour in enumerate(colours):
        left, top = n % 2 * 320, n // 2 * 256
        middle = grid[3, top + 150, left + 160].astype(int)
        assert np.abs(middle - colour).max() < 12, "H.264 and 4:2:0 move flat colours a little"
        assert grid[0, top : top + 48, left : left + 320].max() > 200, "its label is there"
    assert grid[0, 256 + 150, 320 + 160].max() < 12, "the fourth cell is empty"


def test_holds_distances_that_json_does_not(tmp_path):
    planned = schedule([None, float("nan"), float("inf"), 0.03], 0.1)
    record = dataclasses.replace(
        record_of_a_video(prompt="naïve"),
        distances=finite(planned.distances),
        steps_outside_fitted_range=list(planned.steps_outside_fitted_range),
    )
    record.write(tmp_path / "record.json")
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    data = json.loads(text)
    assert text.count("\n") == len(data) + 2, "a line for each key"
    assert data["prompt"] == "naïve"
    assert data["distances"] == [None, None, None, 0.03]
    assert data["steps_outside_fitted_range"] == [1, 2]
    assert "quality" not in data
    assert read_record(tmp_path / "record.json") == record


def test_settings_are_equal_where_they_make_the_same_video():
    one = record_of_a_video().settings
    same = dataclasses.replace(one, output_path="elsewhere", offload="blocks")
    assert one == same
    for changed in ({"prompt": "a girl"}, {"rel_l1_thresh": 0.2}, {"coefficients": {}}):
        assert dataclasses.replace(one, **changed) != one


def test_what_is_no_record_of_ours(tmp_path):
    whole = record_of_a_video().as_json()
    path = tmp_path / "record.json"
    for content in ("", "[", "[]", '{"rows": []}', json.dumps({**whole, "seed": 1})[:-20]):
        path.write_text(content)
        assert read_record(path) is None
    assert read_record(tmp_path / "none.json") is None
    del whole["device_name"]
    with pytest.raises(TypeError, match="device_name"):
        Record.from_json(whole)


def test_a_record_with_other_keys_is_read(tmp_path):
    """As earlier versions have written it."""
    record = record_of_a_video(steps_outside_fitted_range=[1, 4])
    old = {**record.as_json(), "keep_loaded": True, "calibration": None, "extrapolate": False}
    old["extrapolated_steps"] = old.pop("steps_outside_fitted_range")
    for lacking in ("retain_first", "retain_last", "max_reuse", "mp4_quality"):
        del old[lacking]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_record(tmp_path / "old.json") == record
