"""The benchmark of schedules, on few steps."""

from __future__ import annotations

import re

import pytest

from teacache.benchmark import schedules


@pytest.mark.parametrize("scheduler", schedules.SCHEDULERS)
def test_every_rule_is_measured(capsys, tiny, monkeypatch, scheduler):
    monkeypatch.setattr(schedules, "STEPS", 8)
    monkeypatch.setattr(schedules, "COMPUTED", (6, 4))
    schedules.compare(scheduler, videos=2, calibrated_on=1)
    output = capsys.readouterr().out
    for computed in (6, 4):
        steps = re.search(rf"calibrated, {computed}: ([\d ]+)", output)[1].split()
        assert len(steps) == computed
        assert (steps[0], steps[-1]) == ("0", "7")
    table = output[output.index(scheduler) :]
    for name in ("even, last 2", "calibrated"):
        line = next(line for line in table.splitlines() if line.strip().startswith(name))
        means = [float(value) for value in re.findall(r"(\d+\.\d), \d+\.\d", line)]
        assert len(means) == 2
        assert 10 < means[1] < means[0] < 80, "more steps, nearer"
