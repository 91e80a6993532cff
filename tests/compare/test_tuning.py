"""Fair tuning: interior optimum, equal numbers of trials, the same decisions in any order of results."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwise.compare.trial import Trial
from sharpwise.compare.tuning import HORIZONS, Space, Taken, at_edge, best, needed, tried, widened

LRS = (1e-3, 3e-3, 1e-2)


def play(spaces, loss, *, seeds=(1, 2, 3), order=None, limit=1000, taken=None):
    """Run a study in which `loss(trial)` is the result of a trial; some trials at a time, in a random order."""
    done: dict[Trial, float] = {}
    chance = random.Random(order)
    for _ in range(limit):
        trials = needed(spaces, "base", seeds, done, taken={arm: Taken(of) for arm, of in (taken or {}).items()})
        if not trials:
            return done
        assert not any(trial in done for trial in trials)
        assert len(set(trials)) == len(trials)
        some = trials if order is None else chance.sample(trials, chance.randint(1, len(trials)))
        for trial in some:
            done[trial] = loss(trial)
    raise AssertionError("the study did not come to an end")


def bowl(optimum, curvature=0.1, diverges=math.inf):
    """Loss against learning rate: a parabola in log lr, diverging beyond."""

    def loss(trial: Trial) -> float:
        at = optimum[trial.arm] if isinstance(optimum, dict) else optimum
        if trial.lr > diverges:
            return math.inf
        return 4.0 + curvature * math.log(trial.lr / at) ** 2 + 0.001 * trial.seed + 0.05 / trial.horizon

    return loss


OPTIMA = st.floats(-12, 2).map(math.exp)


@settings(deadline=None)  # the machine may be busy
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), OPTIMA, max_size=3), OPTIMA, st.integers(0, 5), st.floats(0.5, 8)
)
def test_every_arm_gets_the_same_number_of_trials_and_an_interior_optimum(others, own, order, beyond) -> None:
    optima = {"base": own, **others}
    spaces = {arm: Space(LRS) for arm in optima}
    done = play(spaces, bowl(optima, diverges=beyond), order=order)
    counts = {arm: len(tried(arm, done)) for arm in optima}
    assert len(set(counts.values())) == 1
    assert 3 <= next(iter(counts.values())) <= 7
    for arm, optimum in optima.items():
        reach = (LRS[0] * 10 ** (-4 / 2) * 1.8, min(LRS[-1] * 10 ** (4 / 2) / 1.8, beyond / 4))
        if reach[0] < optimum < reach[1]:  # seven trials get that far
            assert at_edge(arm, done) == ""
        final = {trial.setting for trial in done if trial.arm == arm and trial.stage == "final"}
        assert final == {best(arm, done).setting}


@settings(deadline=None)
@given(OPTIMA, OPTIMA)
def test_the_order_of_results_decides_nothing(a, b) -> None:
    spaces = {"base": Space(LRS), "other": Space(LRS, {"optimizer.weight_decay": (0.0, 0.3)})}
    loss = bowl({"base": a, "other": b})
    studies = [play(spaces, loss, order=order) for order in (None, 1, 2)]
    assert studies[0] == studies[1] == studies[2]


def test_seeds_are_paired_and_not_those_of_tuning() -> None:
    done = play({"base": Space(LRS), "other": Space(LRS)}, bowl(3e-3), seeds=(1, 2))
    for arm in ("base", "other"):
        assert sorted(t.seed for t in done if t.arm == arm and t.stage == "final") == [1, 2]
        assert {t.seed for t in tried(arm, done)} == {0}
    horizons = sorted((t.horizon, t.seed) for t in done if t.stage == "horizon")
    assert horizons == [(share, seed) for share in HORIZONS for seed in (1, 2)]
    assert all(t.arm == "base" for t in done if t.stage == "horizon")


def test_further_settings_come_one_after_the_other_at_the_best_so_far() -> None:
    search = {"optimizer.weight_decay": (0.0, 0.3), "schedule.warmup": (0.2,)}

    def loss(trial: Trial) -> float:
        said = dict(trial.setting)
        return (
            bowl(3e-3)(trial)
            - 0.1 * (said.get("optimizer.weight_decay") == 0.3)
            + 0.1 * (said.get("schedule.warmup") == 0.2)
        )

    done = play({"base": Space(LRS, search), "other": Space(LRS)}, loss)
    assert dict(best("base", done).setting) == {"optimizer.lr": 3e-3, "optimizer.weight_decay": 0.3}
    warm = [dict(t.setting) for t in tried("base", done) if "schedule.warmup" in dict(t.setting)]
    assert warm == [{"optimizer.lr": 3e-3, "optimizer.weight_decay": 0.3, "schedule.warmup": 0.2}]
    assert len(tried("base", done)) == len(tried("other", done)) == 6


def test_a_learning_rate_between_others_is_no_edge_whatever_else_was_set() -> None:
    def loss(trial: Trial) -> float:
        return bowl(3e-3)(trial) - 0.1 * (dict(trial.setting).get("optimizer.weight_decay") == 0.3)

    spaces = {"base": Space(LRS, {"optimizer.weight_decay": (0.3,)}), "other": Space((*LRS, 3e-2, 0.1))}
    done = play(spaces, loss)
    assert best("base", done).setting == (("optimizer.lr", 3e-3), ("optimizer.weight_decay", 0.3))
    assert {t.lr for t in tried("base", done) if len(t.setting) == 2} == {3e-3, 5.48e-3}
    assert at_edge("base", done) == ""  # 1e-3 was tried, and worse


@pytest.mark.parametrize("order", [None, 1])
def test_an_arm_that_takes_a_setting_has_final_runs_alone(order) -> None:
    spaces = {"tuned": Space(LRS, {"optimizer.weight_decay": (0.3,)}), "other": Space(LRS)}
    found = play(spaces, bowl({"tuned": 2e-3, "other": 9e-3, "base": 1.0}), order=order, taken={"base": "tuned"})
    own = [trial for trial in found if trial.arm == "base"]
    assert {trial.setting for trial in own} == {best("tuned", found).setting}
    stages = sorted((trial.stage, trial.horizon, trial.seed) for trial in own)
    assert stages == [("final", 1.0, seed) for seed in (1, 2, 3)] + [
        ("horizon", share, seed) for share in HORIZONS for seed in (1, 2, 3)
    ]
    alone = play(spaces, bowl({"tuned": 2e-3, "other": 9e-3}), order=order)
    assert {trial for trial in found if trial.arm != "base"} == set(alone)


def test_diverged_trials_are_results() -> None:
    done = play({"base": Space(LRS)}, bowl(1e-3, diverges=2e-3))
    assert {t.lr for t in tried("base", done) if math.isinf(done[t])} == {3e-3, 1e-2}
    assert best("base", done).lr == 1e-3
    assert at_edge("base", done) == ""  # beyond it they diverge, below it is worse


def test_where_all_diverge_smaller_ones_are_tried_and_the_study_ends() -> None:
    done = play({"base": Space(LRS)}, lambda trial: math.inf)
    assert min(t.lr for t in done) < 1e-4
    assert len(tried("base", done)) == 7


@pytest.mark.parametrize(
    ("known", "lr"),
    [
        ({1e-3: 1.0, 3e-3: 2.0, 1e-2: 3.0}, 3.16e-4),
        ({1e-3: 3.0, 3e-3: 2.0, 1e-2: 1.0}, 3.16e-2),
        ({1e-3: 3.0, 3e-3: 1.0, 1e-2: 2.0}, None),
        ({1e-3: math.inf, 3e-3: math.inf}, 3.16e-4),
    ],
)
def test_the_range_is_widened_where_the_best_one_is(known, lr) -> None:
    assert widened(known, 10**0.5) == lr


def test_keys_name_trials() -> None:
    trials = [
        Trial("a", stage, (("optimizer.lr", lr),), seed, horizon)
        for stage in ("tune", "final") for lr in (1e-3, 2e-3) for seed in (0, 1) for horizon in (0.5, 1.0)
    ]  # fmt: skip
    assert len({trial.key for trial in trials}) == len(trials)
