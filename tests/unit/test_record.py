"""The record: what it holds, and reading it again."""

from __future__ import annotations

import dataclasses
import json

import pytest
from records import record_of_a_video

from teacache.core.rule import schedule
from teacache.results.record import Record, finite, read_record


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
