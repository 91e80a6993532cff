"""The study of the demo: small, and large enough to decide something."""

import math
import random
from pathlib import Path

from compare.test_results import fill, result_of
from sharpwise.compare.demo import ARMS, demo_study
from sharpwise.compare.trial import Trial

# In nats: the gap to adamw, and how far seeds move it. The real ones were -0.4 and 0.1, with 0.05 and 0.03.
GAPS = {"adamw": (0.0, 0.0), "adamw+blockwise": (-0.2, 0.06), "adam-mini": (0.15, 0.06)}


def test_the_demo_decides_what_its_seeds_can_show(data: Path, tmp_path: Path) -> None:
    def loss(trial: Trial) -> float:
        gap, noise = GAPS[trial.arm]
        seed = random.Random(trial.seed).gauss(0, 0.1)  # moves all arms alike
        return 5.8 + gap + seed + random.Random(f"{trial.arm} {trial.seed}").gauss(0, noise)

    given = demo_study(data, 60)
    result = result_of(fill(given, tmp_path, loss), tmp_path, shown=False)
    assert [arm["verdict"] for arm in result["arms"]] == ["baseline", "better", "worse"]
    assert given["seeds"] >= 4


def test_every_arm_of_the_demo_is_tuned_alike(data: Path, tmp_path: Path) -> None:
    def loss(trial: Trial) -> float:
        best = 1e-2 if trial.arm == "adam-mini" else ARMS[trial.arm]["lrs"][1]  # beyond the range that it begins with
        return 5.8 + abs(math.log(trial.lr / best))

    result = result_of(fill(demo_study(data, 60), tmp_path, loss), tmp_path, shown=False)
    assert {len(arm["tuning"]) for arm in result["arms"]} == {6}
    assert [arm["edge"] for arm in result["arms"]] == ["", "", ""]
