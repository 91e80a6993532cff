"""Intervals of benchmarks know that processes differ, and the committed ones are those of the committed rounds."""

import json
import random
import statistics
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def intervals(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import intervals

    yield intervals
    sys.modules.pop("intervals")


def test_intervals_hold_the_median_over_processes(intervals):
    """Six processes that differ by 15%, of seven rounds that differ by 3%; pooled, they cover far less."""
    rng, inside, studies = random.Random(0), 0, 100
    for _ in range(studies):
        centres = [rng.gauss(0, 0.15) for _ in range(6)]
        processes = [[2.0 ** (centre + rng.gauss(0, 0.03)) for _ in range(7)] for centre in centres]
        low, high = intervals.bootstrap(processes, 200)
        inside += low <= 1.0 <= high
    assert inside / studies >= 0.88


def test_one_process_that_differs_shows(intervals):
    ratios = {
        7 * process + turn: 0.8 + 0.001 * turn + 0.4 * (process == 5) for process in range(6) for turn in range(7)
    }
    found = intervals.over_processes(ratios, 7)
    assert found["ratio"] == pytest.approx(0.803)
    assert found["ratio_by_process"] == pytest.approx([0.803] * 5 + [1.203])
    low, high = intervals.over_processes({k: v + 0.4 * (k // 7 == 4) for k, v in ratios.items()}, 7)["ratio_95"]
    assert low < 0.81 and high > 1.19


def test_the_saved_ratios_are_those_of_the_saved_rounds(intervals):
    result = json.loads((BENCHMARKS / "results/step_time.json").read_text())
    for layout in result["layouts"].values():
        for name, taken in layout["taken"].items():
            row = layout["arms"][name]
            ratios = intervals.within_rounds(taken["seconds"], taken["beside"])
            by_round = dict(zip(taken["rounds"], ratios, strict=True))
            assert len(row["ratio_by_process"]) == result["processes"]
            assert row["ratio"] == pytest.approx(statistics.median(row["ratio_by_process"]))
            if name in ("sharpwise AdamMini", "torch AdamW foreach"):
                found = intervals.over_processes(by_round, result["rounds"])
                assert found["ratio_95"] == pytest.approx(row["ratio_95"])
                assert found["ratio_by_process"] == pytest.approx(row["ratio_by_process"])
