"""The arithmetic of benchmarks/sharpness_sources.py, on sharpnesses whose answer is known."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def judge() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import sharpness_sources

        yield sharpness_sources
    sys.modules.pop("sharpness_sources", None)


def test_the_power_and_the_distance_of_what_was_put_in(judge: Any) -> None:
    """S is the searched ratio to the power -2, but for noise: 0.5 leads to the search; one says nothing, and one has
    a gap. A factor of all types is no matter."""
    draw = random.Random(0)
    runs = []
    for seed in (1, 2, 3):
        for step in (10, 25):
            exact = {kind: 7.0 * ratio**-2.0 * math.exp(draw.gauss(0, 0.01)) for kind, ratio in judge.SEARCHED.items()}
            S = {name: dict(exact) for name in ("second_moment", "probe", "newton")}
            S["centred"] = {kind: 0.9 * value for kind, value in exact.items()}
            S["nothing"] = dict.fromkeys(exact, 3.0) | {"Emb": 3.0 * math.exp(step / 25)}
            if seed == 2 and step == 25:
                del S["newton"]["Emb"]
            runs.append({"seed": seed, "step": step, "S": S})
    found = judge.with_tables({"runs": runs}, judge.SEARCHED)
    last = {name: own["25"] for name, own in found["distances"].items()}
    assert last["probe"]["power"][0] == pytest.approx(0.5, abs=0.01)
    mean, half = last["probe"]["distance at 0.5"]
    assert mean < 0.02 and 0 < half < 0.02
    logs = [math.log(ratio) for ratio in judge.SEARCHED.values()]
    middle = sum(logs) / len(logs)
    root = math.sqrt(sum((log - middle) ** 2 for log in logs) / len(logs))
    assert last["probe"]["distance at 1"][0] == pytest.approx(root, rel=0.05)
    assert judge.flat_distance(dict.fromkeys(judge.SEARCHED, 3.0), judge.SEARCHED) == pytest.approx(root)
    assert last["newton"]["types"] == [kind for kind in judge.SEARCHED if kind != "Emb"]
    assert found["moved"]["nothing"]["10 to 25"] == pytest.approx([0.6, 0.0])
    built = found["as built"]["10"]
    assert built["square of the mean in the second moment"]["QK"] == pytest.approx([0.1, 0.0])
    assert built["multipliers, probe"]["Emb"][0] == pytest.approx(16**0.6, rel=0.05)
    assert built["multipliers, probe"]["VO"] == [1.0, 0.0]
    json.dumps(found, allow_nan=False)
