"""Probes find the same on a model that two processes share as on a whole one."""

from pathlib import Path

import pytest
from distributed.launch import launch

from probes.shared_worker import STEPS


@pytest.mark.slow  # two processes start
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    found = launch("probes.shared_worker", 2, tmp_path)
    whole, sharded = found["whole"], found["sharded"]
    for step in range(1, STEPS + 1):
        mine, theirs = sharded[f"step {step}"], whole[f"step {step}"]
        assert mine.keys() == theirs.keys()
        assert step == 1 or {"gradient_signal", "update_angle", "sharpness"} <= mine.keys()
        for name, values in mine.items():
            # Of types whose gradients are a thousandth of the largest, the order of summation shows.
            largest = max(abs(x) for x in values.values())
            assert values == pytest.approx(theirs[name], rel=1e-3, abs=1e-3 * largest), name
        assert sharded[f"sizes {step}"] == pytest.approx(whole[f"sizes {step}"], rel=1e-3, abs=1e-6)
    assert sharded["spectrum"] == pytest.approx(whole["spectrum"], rel=1e-3)
