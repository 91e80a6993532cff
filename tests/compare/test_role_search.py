"""The search of factors per block type: which steps it tries and takes, what it costs, and when it ends."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwise.block_lr import PerRole, make_block_lr
from sharpwise.compare.role_search import BLOCK_LR, SEEDS, Roles, Search, factor, search
from sharpwise.compare.trial import Trial

LRS = (1e-3, 3e-3, 1e-2)
START = (("optimizer.lr", 3e-3),)
TYPES = ("Emb", "QK", "FFN")
ALL = Roles(TYPES, runs=200)


def factors_of(trial: Trial) -> dict[str, float]:
    spelled = dict(trial.setting).get(BLOCK_LR)
    found = make_block_lr(spelled)
    assert found is None or isinstance(found, PerRole)
    return dict.fromkeys(TYPES, 1.0) | (dict(found.ratios) if found else {})


def bowl(optimum, curvature=0.1, noise=0.0, base=5.0):
    """Loss against the factors: a parabola in each of their logarithms, and noise that a seed repeats."""

    def loss(trial: Trial) -> float:
        far = [math.log2(factor / optimum.get(name, 1.0)) for name, factor in factors_of(trial).items()]
        chance = random.Random(f"{trial.setting}{trial.seed}").gauss(0, noise) if noise else 0.0
        return base + curvature * sum(x * x for x in far) + 0.1 * (trial.seed % 7) + chance

    return loss


def play(loss, roles=ALL, *, order=None, done=None) -> tuple[Search, dict[Trial, float]]:
    """Run a search to its end; some of what it wants at a time, in a random order."""
    done, chance = dict(done or {}), random.Random(order)
    while (found := search("a", START, roles, done)).wanted:
        assert not found.ended and not set(found.wanted) & set(done)
        some = found.wanted if order is None else chance.sample(found.wanted, chance.randint(1, len(found.wanted)))
        done |= {trial: loss(trial) for trial in some}
    assert found.ended and set(found.trials) <= set(done)
    return found, done


def test_a_separable_bowl_is_searched_to_its_bottom() -> None:
    found, done = play(bowl({"Emb": 4.0, "FFN": 2.7, "QK": 1.0}))
    assert dict(found.factors) == {"Emb": 4.0, "QK": 1.0, "FFN": 2.83}
    assert dict(found.setting)[BLOCK_LR] == "per_role(ratios={Emb: 4, QK: 1, FFN: 2.83})"
    assert found.setting[0] == START[0]
    assert found.ended == "nothing"
    assert {trial.seed for trial in done} == set(SEEDS)
    assert {trial.stage for trial in done} == {"roles"}
    # To 2, to 4, not to 8; then none of the smaller steps but that of FFN from 2.
    taken = [(step.type, step.before, step.after) for step in found.steps if step.taken]
    assert taken == [("Emb", 1, 2), ("FFN", 1, 2), ("Emb", 2, 4), ("FFN", 2, 2.83)]


def test_what_loses_on_the_first_seed_is_not_tried_on_the_second() -> None:
    found, done = play(bowl({}))
    assert found.setting == START  # the uniform rate, as it is spelled without any factor
    assert not any(step.taken for step in found.steps)
    assert len(done) == Roles(TYPES).least == 2 + 4 * len(TYPES)
    assert all(len(step.losses) == len(step.against) == len(step.seeds) == 1 for step in found.steps)
    assert sorted(trial.seed for trial in done) == [SEEDS[0]] * (1 + 4 * len(TYPES)) + [SEEDS[1]]


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ((0.1, 0.1), True),
        ((0.3, -0.01), False),  # the mean is better, one seed is not
        ((0.3, 0.0), False),
        ((0.02, 0.02), True),  # at the margin
        ((0.019, 0.019), False),
        ((0.001, 0.04), True),
    ],
)
def test_a_step_has_to_win_on_both_seeds_and_by_the_margin(gains: tuple[float, float], taken: bool) -> None:
    def loss(trial: Trial) -> float:
        emb = factors_of(trial)["Emb"]
        gain = gains[SEEDS.index(trial.seed)] if emb == 2 else 0.0 if emb == 1 else -1.0
        return 8.0 - gain + sum(value != 1 for name, value in factors_of(trial).items() if name != "Emb")

    found, _ = play(loss, Roles(TYPES, margin=0.02 - 1e-9))
    first = found.steps[0]
    assert (first.type, first.before, first.after) == ("Emb", 1, 2)
    assert first.taken == taken
    assert found.factors["Emb"] == (2 if taken else 1)
    gained = [before - after for before, after in zip(first.against, first.losses, strict=True)]
    assert gained == pytest.approx(list(gains))


def test_where_both_directions_win_the_better_one_is_taken() -> None:
    def loss(trial: Trial) -> float:
        return {2.0: 4.9, 0.5: 4.8}.get(factors_of(trial)["Emb"], 5.0) + sum(
            factors_of(trial)[n] != 1 for n in TYPES[1:]
        )

    found, _ = play(loss)
    first, second = found.steps[:2]
    assert (first.after, first.taken, second.after, second.taken) == (2, False, 0.5, True)


def test_a_step_is_compared_with_the_factors_that_hold() -> None:
    """FFN wants twice alone, and nothing once Emb has moved."""

    def loss(trial: Trial) -> float:
        at = factors_of(trial)
        emb, ffn = math.log2(at["Emb"]), math.log2(at["FFN"])
        return 5 + 0.2 * (emb + ffn - 1) ** 2 + 0.1 * (emb - 1) ** 2 + 0.1 * math.log2(at["QK"]) ** 2

    found, _ = play(loss)
    assert dict(found.factors) == {"Emb": 2.0, "QK": 1.0, "FFN": 1.0}
    after = next(step for step in found.steps if step.type == "FFN")
    assert after.against[0] == pytest.approx(5.0)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(*[st.integers(-5, 5)] * 3),
    st.floats(0, 0.3),
    st.integers(2 + 4 * 3, 70),
    st.integers(0, 3),
    st.floats(0, 0.05),
)
def test_any_search_keeps_to_its_runs_and_ends_the_same_in_any_order(powers, noise, runs, order, margin) -> None:
    roles = Roles(TYPES, runs, margin)
    loss = bowl(dict(zip(TYPES, map(factor, powers), strict=True)), noise=noise)
    found, done = play(loss, roles)
    again, other = play(loss, roles, order=order)
    assert found == again and done == other
    assert len(done) == len(found.trials) <= runs
    # What holds is what the steps that were taken lead to, and each won on both seeds.
    at = dict.fromkeys(TYPES, 1.0)
    for step in found.steps:
        assert at[step.type] == step.before or not step.taken
        if step.taken:
            assert len(step.losses) == 2 and all(a < b for a, b in zip(step.losses, step.against, strict=True))
            at[step.type] = step.after
    assert at == dict(found.factors)
    if found.ended == "nothing":  # no smaller step is better on both seeds; those of other types were all tried there
        held = {seed: loss(Trial("a", "roles", found.setting, seed)) for seed in SEEDS}
        assert all(step.against == tuple(held.values())[: len(step.against)] for step in found.steps[-1:])
    # Every type was tried, whatever the noise.
    assert {step.type for step in found.steps} == set(TYPES)


def test_more_runs_go_on_from_what_is_done() -> None:
    loss = bowl({"Emb": 8.0, "QK": 0.25, "FFN": 2.0})
    short, done = play(loss, Roles(TYPES, 20))
    assert short.ended == "runs" and len(done) <= 20
    longer, more = play(loss, Roles(TYPES, 60), done=done)
    assert longer.ended == "nothing"
    assert done.items() <= more.items() and longer.steps[: len(short.steps)] == short.steps
    assert longer == play(loss, Roles(TYPES, 60))[0]


def test_what_diverges_loses_and_what_does_not_wins_against_it() -> None:
    def loss(trial: Trial) -> float:
        at = factors_of(trial)
        return math.inf if at["Emb"] * at["FFN"] > 0.9 else 5.0 + abs(math.log2(at["QK"]))

    found, done = play(loss)
    assert found.factors["Emb"] * found.factors["FFN"] < 0.9
    assert found.ended == "nothing" and math.isfinite(done[Trial("a", "roles", found.setting, SEEDS[0])])
    found, _ = play(lambda trial: math.inf)
    assert found.setting == START and found.ended == "nothing"


def test_the_way_back_is_not_tried_with_a_step_of_the_same_size() -> None:
    found, _ = play(bowl({"Emb": 2.0}))
    factors = {(step.before, step.after) for step in found.steps if step.type == "Emb"}
    assert factors == {(1, 2), (1, 0.5), (2, 4), (2, 2.83), (2, 1.41)}
