"""The search of factors per block type: which steps it tries and takes, what it costs, and when it ends."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharpwise.block_lr import PerRole, make_block_lr
from sharpwise.compare.role_search import Search, search
from sharpwise.compare.roles import BLOCK_LR, SEEDS, Roles, factor
from sharpwise.compare.trial import SETTINGS_OF, Trial, plain
from sharpwise.compare.tuning import Space, Taken, chosen, count_trials, needed, searched, tried

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
    assert dict(found.factors["lr"]) == {"Emb": 4.0, "QK": 1.0, "FFN": 2.83}
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
    assert found.factors["lr"]["Emb"] == (2 if taken else 1)
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
    assert dict(found.factors["lr"]) == {"Emb": 2.0, "QK": 1.0, "FFN": 1.0}
    after = next(step for step in found.steps if step.type == "FFN")
    assert after.against[0] == pytest.approx(5.0)


def test_small_steps_are_tried_again_until_a_whole_round_takes_nothing() -> None:
    """Emb, the first of a round, wants its step once FFN, the last one, has taken its own."""

    def loss(trial: Trial) -> float:
        emb, qk, ffn = (math.log2(factors_of(trial)[name]) for name in TYPES)
        return 5 + 0.2 * (ffn - 0.5) ** 2 + 0.1 * (emb - ffn) ** 2 + 0.1 * qk**2

    found, _ = play(loss)
    assert dict(found.factors["lr"]) == {"Emb": 1.41, "QK": 1.0, "FFN": 1.41}
    taken = [(step.type, step.round) for step in found.steps if step.taken]
    assert [name for name, _ in taken] == ["FFN", "Emb"] and taken[0][1] < taken[1][1]


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
    assert at == dict(found.factors["lr"])
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
    assert found.factors["lr"]["Emb"] * found.factors["lr"]["FFN"] < 0.9
    assert found.ended == "nothing" and math.isfinite(done[Trial("a", "roles", found.setting, SEEDS[0])])
    found, _ = play(lambda trial: math.inf)
    assert found.setting == START and found.ended == "nothing"


def test_the_way_back_is_not_tried_with_a_step_of_the_same_size() -> None:
    found, _ = play(bowl({"Emb": 2.0}))
    factors = {(step.before, step.after) for step in found.steps if step.type == "Emb"}
    assert factors == {(1, 2), (1, 0.5), (2, 4), (2, 2.83), (2, 1.41)}


# --- weight decay and beta2 ------------------------------------------------------------------------------------------

BASE = (("optimizer.weight_decay", 0.1), ("optimizer.betas", (0.9, 0.95)))
OF = ("lr", "weight_decay", "beta2")
THREE = Roles(TYPES, runs=300, of=OF, base=BASE)


def all_factors_of(trial: Trial, base=BASE) -> dict[tuple[str, str], float]:
    """By quantity and type, from the values that the setting has."""
    known, found = dict(base), {("lr", name): value for name, value in factors_of(trial).items()}
    known |= {key: value for key, value in trial.setting if key in known}
    for name, own in plain(trial.setting).get(SETTINGS_OF, {}).items():
        beta1, beta2 = own.get("betas", known["optimizer.betas"])
        assert beta1 == 0.9 and 0 <= beta2 < 1
        found["beta2", name] = (1 - beta2) / (1 - known["optimizer.betas"][1])
        found["weight_decay", name] = (
            own.get("weight_decay", known["optimizer.weight_decay"]) / known["optimizer.weight_decay"]
        )
    return found


def bowl_of_three(optimum, noise=0.0):
    def loss(trial: Trial) -> float:
        at = all_factors_of(trial)
        far = [math.log2(at.get(key, 1.0) / optimum.get(key, 1.0)) for key in {*at, *optimum}]
        chance = random.Random(f"{trial.setting}{trial.seed}").gauss(0, noise) if noise else 0.0
        return 5.0 + 0.1 * sum(x * x for x in far) + 0.1 * (trial.seed % 7) + chance

    return loss


def test_one_quantity_after_the_other_from_what_holds() -> None:
    optimum = {("lr", "Emb"): 2.0, ("weight_decay", "FFN"): 0.25, ("beta2", "Emb"): 2.8, ("beta2", "QK"): 0.5}
    found, done = play(bowl_of_three(optimum))
    assert list(dict(found.setting)) == ["optimizer.lr", BLOCK_LR]
    found, done = play(bowl_of_three(optimum), THREE)
    ratios = {of: {name: optimum.get((of, name), 1.0) for name in TYPES} for of in OF}
    assert found.factors == ratios | {"beta2": {"Emb": 2.83, "QK": 0.5, "FFN": 1.0}}
    assert plain(found.setting) == {
        "optimizer.lr": 3e-3,
        BLOCK_LR: "per_role(ratios={Emb: 2, QK: 1, FFN: 1})",
        SETTINGS_OF: {
            "Emb": {"weight_decay": 0.1, "betas": [0.9, 0.858]},  # 1 - 0.05 x 2.83, that to three digits
            "QK": {"weight_decay": 0.1, "betas": [0.9, 0.975]},
            "FFN": {"weight_decay": 0.025, "betas": [0.9, 0.95]},
        },
    }
    order = [step.of for step in found.steps]
    assert order == sorted(order, key=OF.index) and set(order) == set(OF)
    first = next(step for step in found.steps if step.of == "weight_decay")
    held = next(step for step in reversed(found.steps) if step.of == "lr" and step.taken)
    assert first.against[0] == held.losses[0] and (first.before, first.after) == (1, 2)
    assert found.ended == "nothing" and {trial.seed for trial in done} == set(SEEDS)


def test_the_order_is_the_one_that_is_asked_for() -> None:
    found, _ = play(bowl_of_three({("beta2", "QK"): 2.0}), Roles(TYPES, of=("beta2", "weight_decay"), base=BASE))
    assert list(dict.fromkeys(step.of for step in found.steps)) == ["beta2", "weight_decay"]
    assert BLOCK_LR not in dict(found.setting)
    # What no step was taken of is not said.
    assert plain(found.setting)[SETTINGS_OF]["Emb"] == {"betas": [0.9, 0.95]}


def test_values_start_from_what_was_tuned() -> None:
    start = (("optimizer.lr", 3e-3), ("optimizer.weight_decay", 0.4))
    roles = Roles(("Emb",), of=("weight_decay",), base=BASE)
    setting = plain(roles.setting(start, {"weight_decay": {"Emb": -1}}))
    assert setting == {**dict(start), SETTINGS_OF: {"Emb": {"weight_decay": 0.283}}}


@pytest.mark.parametrize(("beta2", "tried"), [(0.3, {0.5}), (0.5, {2.0, 0.5}), (0.0, {0.5})])
def test_beta2_stays_in_its_range(beta2: float, tried: set[float]) -> None:
    base = (("optimizer.betas", (0.9, beta2)),)
    found, done = play(lambda trial: 5.0, Roles(("Emb",), of=("beta2",), base=base))
    assert {step.after for step in found.steps if step.after in (2, 0.5)} == tried
    values = [dict(own).get("betas") for t in done for _, own in dict(t.setting).get(SETTINGS_OF, ())]
    assert values and all(0 <= found < 1 for _, found in values)


@given(
    st.permutations(OF),
    st.integers(1, 3),
    st.tuples(*[st.integers(-4, 4)] * 4),
    st.floats(0, 0.2),
    st.integers(0, 60),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_every_factor_is_tried_whatever_those_before_it_took(of, count, powers, noise, more, order) -> None:
    roles = Roles(TYPES, of=tuple(of[:count]), base=BASE, lr_only=("QK",))
    roles = Roles(TYPES, roles.least + more, of=roles.of, base=BASE, lr_only=("QK",))
    keys = [(of[0], "Emb"), (of[0], "FFN"), (of[1], "Emb"), ("lr", "QK")]
    loss = bowl_of_three(dict(zip(keys, map(factor, powers), strict=True)), noise=noise)
    found, done = play(loss, roles)
    assert (found, done) == play(loss, roles, order=order)
    assert len(done) == len(found.trials) <= roles.most
    tried = {(step.of, step.type) for step in found.steps}
    assert tried == {(one, name) for one in roles.of for name in TYPES if one == "lr" or name != "QK"}
    # The setting that is found has the factors that are said.
    at = all_factors_of(Trial("a", "roles", found.setting, 0))
    for one, own in found.factors.items():
        for name, value in own.items():
            assert at.get((one, name), 1.0) == pytest.approx(value, rel=5e-3)


def test_runs_that_more_of_them_lead_away_from_stay_counted() -> None:
    """With more runs the learning rates go further, and what comes after them is searched again from there."""
    loss = bowl_of_three({("lr", "Emb"): 16.0, ("lr", "QK"): 0.1, ("beta2", "Emb"): 2.0})
    roles = [Roles(TYPES, runs, of=("lr", "beta2"), base=BASE) for runs in (26, 100)]
    short, done = play(loss, roles[0])
    assert short.ended == "runs"
    longer, more = play(loss, roles[1], done=done)
    assert longer == play(loss, roles[1])[0]
    assert len(more) > len(longer.trials)
    done = {Trial("a", "tune", (("optimizer.lr", lr),), 0): abs(lr - 3e-3) for lr in LRS} | more
    assert count_trials("a", done, {"a": roles[1]}) == len(LRS) + len(more)


# --- in a study ------------------------------------------------------------------------------------------------------


def plan(spaces, roles, loss, *, taken=None, order=None, seeds=(1, 2)) -> dict[Trial, float]:
    """Run a study in which `loss(trial)` is the result of a trial."""
    done: dict[Trial, float] = {}
    chance = random.Random(order)
    taken = {arm: Taken(of) for arm, of in (taken or {}).items()}
    while trials := needed(spaces, "base", seeds, done, (), taken, roles):
        assert not any(trial in done for trial in trials) and len(set(trials)) == len(trials)
        for trial in trials if order is None else chance.sample(trials, chance.randint(1, len(trials))):
            done[trial] = loss(trial)
    return done


def both(optimum, lr=2.5e-3, noise=0.02):
    """Loss against the learning rate and the factors."""
    factors = bowl(optimum, noise=noise)
    return lambda trial: factors(trial) + 0.1 * math.log(trial.lr / lr) ** 2


@pytest.mark.parametrize("order", [None, 1, 2])
def test_every_arm_gets_as_many_trials_as_one_with_a_search(order: int | None) -> None:
    spaces, roles = {"base": Space(LRS), "own": Space(LRS)}, {"own": ALL}
    done = plan(spaces, roles, both({"Emb": 4.0, "QK": 0.5}), order=order)
    assert done == plan(spaces, roles, both({"Emb": 4.0, "QK": 0.5}))
    counts = {arm: sum(t.arm == arm and t.stage not in ("final", "horizon") for t in done) for arm in spaces}
    assert counts["base"] == counts["own"] > 20
    assert counts["own"] == count_trials("own", done, roles)
    found = searched("own", done, {}, roles)
    assert found.factors["lr"]["Emb"] > 2 and chosen("own", done, {}, roles) == found.setting
    # What base got besides is a grid around its best rate, on one seed after the other; the best in the mean is taken.
    grid = {t: loss for t, loss in done.items() if t.arm == "base" and t.stage == "refine"}
    lrs = sorted({t.lr for t in grid})
    assert lrs[0] == pytest.approx(lrs[-1] / 4, rel=0.01) and len(lrs) == 9
    whole = [seed for seed in {t.seed for t in grid} if sum(t.seed == seed for t in grid) == 9]
    means = {lr: sum(loss for t, loss in grid.items() if t.lr == lr and t.seed in whole) for lr in lrs}
    assert dict(chosen("base", done, {}, roles)) == {"optimizer.lr": min(means, key=lambda lr: means[lr])}
    final = {(t.arm, t.setting) for t in done if t.stage == "final"}
    assert final == {(arm, chosen(arm, done, {}, roles)) for arm in spaces}


def test_an_arm_with_a_search_that_had_fewer_trials_gets_more_of_its_learning_rate() -> None:
    spaces = {"base": Space(LRS, {"optimizer.eps": tuple(range(60))}), "own": Space(LRS)}
    done = plan(spaces, {"own": ALL}, both({"Emb": 4.0}, lr=3.5e-3, noise=0.0))
    counts = {arm: sum(t.arm == arm and t.stage != "final" for t in done) for arm in spaces}
    assert counts == {"base": 63, "own": 63}
    refined = [t for t in done if t.stage == "refine"]
    assert {t.arm for t in refined} == {"own"}
    assert {dict(t.setting)[BLOCK_LR] for t in refined} == {"per_role(ratios={Emb: 4, QK: 1, FFN: 1})"}
    assert chosen("own", done, {}, {"own": ALL})[0] == ("optimizer.lr", 3.57e-3)


def test_a_search_from_the_setting_of_another_is_on_top_and_nobody_gets_more() -> None:
    roles = {"own": Roles(TYPES, 26)}
    done = plan({"base": Space(LRS)}, roles, both({"FFN": 0.5}, noise=0.0), taken={"own": "base"})
    assert len(tried("base", done)) == 3 and not any(t.stage in ("even", "refine") for t in done)
    assert {t.stage for t in done if t.arm == "own"} == {"roles", "final"}
    final = {t.arm: dict(t.setting) for t in done if t.stage == "final"}
    assert final["base"] == {"optimizer.lr": 3e-3}
    assert final["own"] == {"optimizer.lr": 3e-3, BLOCK_LR: "per_role(ratios={Emb: 1, QK: 1, FFN: 0.5})"}
    assert all(t.lr == 3e-3 for t in done if t.arm == "own")


@pytest.mark.parametrize("tuned_itself", [False, True])
def test_the_factors_that_a_search_found_can_be_taken_by_another_arm(tuned_itself: bool) -> None:
    spaces = {"base": Space(LRS), **({"own": Space(LRS)} if tuned_itself else {})}
    taken = {"third": "own", **({} if tuned_itself else {"own": "base"})}
    done = plan(spaces, {"own": ALL}, both({"Emb": 4.0}, noise=0.0), taken=taken)
    settings = {t.arm: t.setting for t in done if t.stage == "final"}
    assert settings["third"] == settings["own"] != settings["base"]
    assert not any(t.arm == "third" and t.stage != "final" for t in done)


def test_no_search_begins_where_every_learning_rate_diverged() -> None:
    done = plan({"base": Space(LRS)}, {"own": ALL}, lambda trial: math.inf, taken={"own": "base"})
    assert not any(t.stage == "roles" for t in done)
    assert {t.stage for t in done} == {"tune", "final"}
