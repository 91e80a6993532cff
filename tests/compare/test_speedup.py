"""The speed-up of studies whose truth is known, its bounds, and what no noise may do to it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from sharpwise.compare.speedup import pool, speedup
from sharpwise.compare.statistics import paired_difference
from sharpwise.compare.verdict import sentence

HORIZONS = (0.5, 1.0, 2.0)
FLAT = {500: [5.0, 5.0], 1000: [4.0, 4.0], 2000: [3.0, 3.0]}


def _law(tokens, a=0.2, b=0.3):
    return 3.0 + a * np.asarray(tokens) ** -b


def _study(rng, n, true, curve=_law, sd=0.01, shared=0.5):
    """Losses of one study: `shared` is the part of the variance that all runs of one seed have in common."""
    noise = rng.normal(0, sd * math.sqrt(1 - shared), (4, n)) + rng.normal(0, sd * math.sqrt(shared), n)
    baseline = {h: (float(curve(h)) + noise[k]).tolist() for k, h in enumerate(HORIZONS)}
    return (float(curve(true)) + noise[3]).tolist(), baseline


def _coverage(n, true, studies=500, **settings):
    """Part of the intervals that cover the truth, and the median of the estimates and of the widths."""
    rng = np.random.default_rng(0)
    found = [speedup(*_with_tokens(*_study(rng, n, true, **settings))) for _ in range(studies)]
    covered = sum(s.low <= true <= s.high for s in found) / studies
    values = [s.value if s.value is not None else (0.5 if "<" in s.bound else 2.0) for s in found]
    widths = [min(s.high, 2.0) - max(s.low, 0.5) for s in found]
    return covered, float(np.median(values)), float(np.median(widths))


def _with_tokens(arm, baseline, tokens=1000):
    return arm, tokens, {tokens * horizon: losses for horizon, losses in baseline.items()}


# --- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0.0, 0.5])
@pytest.mark.parametrize("n", [3, 4, 5])
def test_a_planted_speedup_is_covered(n, shared):
    # The loss falls by 0.038 per doubling, 4 sd of a run.
    covered, value, width = _coverage(n, 1.3, shared=shared)
    assert 0.94 <= covered <= 0.99
    assert value == pytest.approx(1.3, abs=0.03)
    assert width < {3: 1.25, 4: 1.05, 5: 0.85}[n]


@pytest.mark.parametrize(("a", "width"), [(1.0, 0.25), (0.5, 0.45)])
def test_little_noise_leaves_a_narrow_interval(a, width):
    covered, value, found = _coverage(3, 1.3, studies=200, curve=lambda d: _law(d, a))
    assert covered >= 0.94
    assert value == pytest.approx(1.3, abs=0.01)
    assert found < width


@pytest.mark.parametrize("true", [0.75, 1.0, 1.8])
def test_other_speedups_are_covered(true):
    covered, _, _ = _coverage(3, true, studies=400)
    assert 0.93 <= covered <= 0.99


def test_much_noise_leaves_an_interval_that_says_so():
    # The loss falls by half a sd per doubling: three seeds cannot tell, and do not claim to.
    covered, _, width = _coverage(3, 1.3, studies=200, curve=lambda d: _law(d, 0.026))
    assert covered >= 0.93
    assert width > 1.3


@pytest.mark.parametrize(
    "curve",
    [
        pytest.param(lambda d: 3 + 0.3 * d**-0.1 + 0.05 * d**-1.0, id="two powers"),
        pytest.param(lambda d: 3 - 0.08 * np.log(d), id="a straight line"),
        pytest.param(lambda d: 3 - 0.08 * np.log(d) - 0.03 * np.log(d) ** 2, id="concave"),
    ],
)
def test_a_curve_that_is_no_power_law_is_covered(curve):
    covered, _, _ = _coverage(4, 1.3, studies=300, curve=curve, sd=0.003)
    assert covered >= 0.93


def test_a_percentile_bootstrap_would_be_too_narrow():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        arm, baseline = _study(rng, 3, 1.3)
        seeds = rng.integers(0, 3, (400, 3))
        means = np.stack([np.array(losses)[seeds].mean(1) for losses in (arm, *baseline.values())], 1)
        values = [np.interp(-row[0], np.sort(-row[1:]), np.log(HORIZONS)) for row in means]
        low, high = np.exp(np.percentile(values, [2.5, 97.5]))
        covered += low <= 1.3 <= high
    assert covered / 100 < 0.85


# --- without noise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", [-0.4, -1e-9, 1e-9, 0.2, 0.5, 1.5])
@pytest.mark.parametrize("true", [0.5, 0.61, 1.0, 1.3, 1.97, 2.0])
def test_a_power_law_is_inverted_exactly(true, b):
    def curve(tokens):
        return 3 + 0.5 * np.sign(b) * np.asarray(tokens) ** -b if abs(b) > 1e-6 else 3 - 0.2 * np.log(tokens)

    baseline = {1000 * horizon: [float(curve(horizon))] for horizon in HORIZONS}
    found = speedup([float(curve(true))], 1000, baseline)
    if found.bound:
        assert true in (0.5, 2.0)  # within rounding of the end
    else:
        assert found.value == pytest.approx(true, rel=1e-9)
    assert (found.low, found.high) == (None, None)


def test_identical_arms_have_a_speedup_of_1():
    _, baseline = _study(np.random.default_rng(0), 3, 1.0)
    found = speedup(*_with_tokens(baseline[1.0], baseline))
    assert found.value == pytest.approx(1.0, abs=1e-12)
    assert found.low <= found.value <= found.high


def test_the_law_is_below_its_chord():
    baseline = {h: [float(_law(h, 1.0, 0.5))] for h in HORIZONS}
    loss = [float(_law(1.3, 1.0, 0.5))]
    assert speedup(loss, 1, baseline).value == pytest.approx(1.3)
    chord = {h: baseline[h] for h in (1.0, 2.0)}
    assert speedup(loss, 1, chord).value == pytest.approx(1.338, abs=1e-3)


def test_other_horizons_are_joined_by_straight_lines():
    baseline = {100: [5.0, 5.1], 1000: [4.0, 4.1], 2000: [3.0, 3.1], 4000: [2.9, 3.0]}
    assert speedup([4.5, 4.6], 1000, baseline).value == pytest.approx(10**-0.5)
    assert speedup([3.5, 3.6], 1000, baseline).value == pytest.approx(2**0.5)
    uneven = {500: [5.0], 1000: [4.0], 4000: [3.0]}
    assert speedup([3.5], 1000, uneven).value == pytest.approx(2.0)


def test_a_horizon_rounded_to_whole_steps_still_has_a_law():
    baseline = {499: [float(_law(0.499))], 1000: [float(_law(1.0))], 2001: [float(_law(2.001))]}
    assert speedup([float(_law(1.3))], 1000, baseline).value == pytest.approx(1.3, abs=1e-3)


# --- bounds and pooling ----------------------------------------------------------------------------------------------


def test_beyond_the_horizons_there_is_a_bound_and_no_number():
    _, baseline = _study(np.random.default_rng(0), 3, 1.0, sd=0.001)
    good = speedup(*_with_tokens([2.9, 2.902, 2.901], baseline))
    assert (good.value, good.bound, good.low, good.high) == (None, ">2", 2.0, math.inf)
    bad = speedup(*_with_tokens([3.9, 3.902, 3.901], baseline))
    assert (bad.value, bad.bound, bad.low, bad.high) == (None, "<0.5", 0.0, 0.5)
    assert str(good) == ">2x (95% interval from 2.00, 3 seeds)"
    assert str(bad) == "<0.5x (95% interval up to 0.50, 3 seeds)"


def test_a_bound_may_be_noise_and_then_says_so():
    baseline = {500: [5.01, 4.99, 5.0], 1000: [4.01, 4.0, 3.99], 2000: [3.5, 3.49, 3.51]}
    found = speedup([3.47, 3.52, 3.47], 1000, baseline)
    assert (found.value, found.bound, found.high) == (None, ">2", math.inf)
    assert 1 < found.low < 2


def test_losses_that_rise_with_the_tokens_are_pooled():
    baseline = {500: [5.0, 5.1, 5.05], 1000: [4.0, 4.2, 4.1], 2000: [4.3, 4.1, 4.2]}
    found = speedup([4.6, 4.7, 4.5], 1000, baseline)
    assert found.pooled
    assert found.value == pytest.approx(math.exp(np.interp(5.05 - 4.6, [0, 0.9], np.log([0.5, 1]))))
    assert "rose with its tokens and were pooled" in str(found)
    assert not speedup([4.6, 4.7], 1000, FLAT).pooled
    # At the level of the pooled means the baseline is there after the first of them; that it may never be more is open.
    level = speedup([4.15, 4.15, 4.15], 1000, baseline)
    assert level.value == pytest.approx(1.0)
    assert level.high == math.inf


def test_all_horizons_pooled():
    # Nothing can be said: the curve is one number, the arm's mean is above it, and no speed-up is ruled out.
    found = speedup([4.1, 4.2], 1000, {500: [4.0, 4.1], 1000: [4.1, 4.2], 2000: [4.2, 4.25]})
    assert (found.bound, found.value, found.low, found.high) == ("<0.5", None, 0.0, math.inf)
    assert "95% interval below 0.5 to above 2" in str(found)
    assert found.pooled


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_pooling_is_the_nearest_sequence_that_does_not_rise(means):
    pooled = pool(means)
    assert np.all(np.diff(pooled) <= 1e-12)
    assert pooled.sum() == pytest.approx(sum(means))
    # The min-max formula of isotonic regression (Barlow et al. 1972), which shares nothing with pooling neighbours.
    n = len(means)
    for i in range(n):
        best = min(max(np.mean(means[j : k + 1]) for k in range(i, n)) for j in range(i + 1))
        assert pooled[i] == pytest.approx(best, abs=1e-9)


# --- the ends of the interval ----------------------------------------------------------------------------------------


def _curve(means, u):
    """The law through three means at the position u, and the straight lines."""
    l = math.log((means[1] - means[2]) / (means[0] - means[1]))  # noqa: E741
    return means[0] - (means[0] - means[1]) * math.expm1(l * u) / math.expm1(l), np.interp(u, [0, 1, 2], means)


def _excess(arm, baseline, u, level):
    """|mean contrast| beyond what the seeds and the interpolation allow: negative inside the interval.

    What the curve takes from each mean is a difference quotient here.
    """
    means, h = baseline.mean(1), 1e-6
    if len(means) == 2:
        weights, disagreement = np.array([1 - u, u]), 0.0
    else:
        law, lines = _curve(means, u)
        weights = [(_curve(means + h * e, u)[0] - _curve(means - h * e, u)[0]) / (2 * h) for e in np.eye(3)]
        disagreement = abs(law - lines)
    contrast = arm - weights @ baseline
    allowed = stats.t.ppf((1 + level) / 2, len(arm) - 1) * stats.sem(contrast)
    return abs(contrast.mean()) - allowed - disagreement


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("horizons", [(1.0, 2.0), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("seed", range(4))
def test_the_ends_are_where_the_seeds_begin_to_reject(seed, horizons, level):
    """Rounded outwards to a thousandth of the way between two horizons: never inside, and never further."""
    arm, baseline = _study(np.random.default_rng(seed), 4, 1.4, curve=lambda d: _law(d, 1.0, 0.5), sd=0.006)
    found = speedup(arm, 1000, {1000 * h: baseline[h] for h in horizons}, level)
    losses, one = np.array([baseline[h] for h in horizons]), horizons.index(1.0)

    def excess(log2):
        return _excess(np.array(arm), losses, one + log2, level)

    estimate = math.log2(found.value)
    outwards = optimize.brentq(excess, 0, estimate) - math.log2(found.low)
    assert -1e-7 <= outwards <= 1.0001e-3
    outwards = math.log2(found.high) - optimize.brentq(excess, estimate, 1)
    assert -1e-7 <= outwards <= 1.0001e-3


# --- properties ------------------------------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 6), st.floats(0.3, 3.0), st.floats(1e-4, 0.05))
@settings(deadline=None, max_examples=50)
def test_the_estimate_lies_in_its_interval_and_between_the_horizons(seed, n, true, sd):
    found = speedup(*_with_tokens(*_study(np.random.default_rng(seed), n, true, sd=sd)))
    assert (found.value is None) == bool(found.bound)
    if found.value is not None:
        assert 0.5 <= found.value <= 2.0
    if n == 1:
        assert found.low is found.high is None
    else:
        assert found.low <= found.high
        if found.value is not None:
            assert found.low <= found.value <= found.high
        assert found.bound != ">2" or found.high == math.inf
        assert found.bound != "<0.5" or found.low == 0


@given(SEEDS, st.floats(0.6, 1.9), st.floats(0.1, 10), st.floats(-2, 2), st.sampled_from([1, 7, 4096, 1e12]))
@settings(deadline=None, max_examples=50)
def test_units_do_not_matter(seed, true, scale, offset, tokens):
    arm, baseline = _study(np.random.default_rng(seed), 3, true, sd=0.005)
    one = speedup(*_with_tokens(arm, baseline))
    moved = {h: [scale * loss + offset for loss in losses] for h, losses in baseline.items()}
    other = speedup(*_with_tokens([scale * loss + offset for loss in arm], moved, tokens))
    assert other.bound == one.bound
    if one.value is not None:
        assert other.value == pytest.approx(one.value, rel=1e-6)
    assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=2e-3)


@given(SEEDS, st.floats(0.6, 1.9), st.floats(0.0, 0.02), st.floats(1e-4, 0.05))
@settings(deadline=None, max_examples=50)
def test_a_lower_loss_is_no_slower(seed, true, less, sd):
    arm, baseline = _study(np.random.default_rng(seed), 3, true, sd=sd)
    rank = []
    for losses in (arm, [loss - less for loss in arm]):
        found = speedup(*_with_tokens(losses, baseline))
        rank.append(found.value if found.value is not None else {"<0.5": 0.0, ">2": 9.0}[found.bound])
    assert rank[0] <= rank[1] + 1e-9


@given(SEEDS, st.permutations(range(4)))
@settings(deadline=None, max_examples=25)
def test_the_order_of_seeds_does_not_matter(seed, order):
    arm, baseline = _study(np.random.default_rng(seed), 4, 1.3)
    one = speedup(*_with_tokens(arm, baseline))
    mixed = {h: [baseline[h][s] for s in order] for h in reversed(HORIZONS)}
    other = speedup(*_with_tokens([arm[s] for s in order], mixed))
    assert other.bound == one.bound and other.value == pytest.approx(one.value)
    assert (other.low, other.high) == pytest.approx((one.low, one.high), rel=2e-3)


# --- degenerate input ------------------------------------------------------------------------------------------------


def test_seeds_with_a_diverged_run_are_left_out_and_counted():
    baseline = {500: [5.0, 5.1, 5.0, None], 1000: [4.0, 4.1, 4.0, 4.0], 2000: [3.5, math.inf, 3.6, 3.5]}
    found = speedup([3.8, 3.8, 3.9, 3.8], 1000, baseline)
    assert (found.n, found.seeds) == (2, 4)
    assert str(found).endswith("the 2 of 4 seeds at which all runs ended)")


def test_nothing_ended():
    found = speedup([None, math.nan], 1000, FLAT)
    assert (found.value, found.low, found.high, found.bound, found.n) == (None, None, None, "", 0)
    assert str(found) == "unknown (at no seed did all runs end)"


def test_one_seed_and_seeds_that_change_nothing_have_no_interval():
    one = speedup([3.5], 1000, {tokens: losses[:1] for tokens, losses in FLAT.items()})
    assert str(one) == "1.41x (no interval, 1 seed)"
    assert speedup([3.5, 3.5], 1000, FLAT).low is None


def test_a_kink_is_no_law():
    baseline = {500: [5.0], 1000: [4.0], 2000: [4.0 - 1e-9]}
    assert speedup([4.5], 1000, baseline).value == pytest.approx(2**-0.5)


def test_a_sentence_ends_with_the_speedup():
    adamw = {500: [5.27, 5.26, 5.28], 1000: [4.87, 4.85, 4.86], 2000: [4.60, 4.59, 4.61]}
    arm = [4.74, 4.73, 4.75]
    words = sentence("AdamW", paired_difference(arm, adamw[1000]), 0.01, speedup(arm, 1000, adamw))
    assert words.endswith("; speed-up 1.33x (95% interval 1.22 to 1.44, 3 seeds)")


@pytest.mark.parametrize(
    ("arm", "tokens", "baseline", "message"),
    [
        ([4.0], 1000, {1000: [4.0]}, "got 1 horizons"),
        ([4.0], 0, {1000: [4.0], 2000: [3.0]}, "got 0 tokens"),
        ([4.0], 1000, {-1: [4.0], 2000: [3.0]}, "horizons"),
        ([4.0], 1000, {1000: [4.0, 3.9], 2000: [3.0]}, "the same seeds"),
        ([], 1000, {1000: [], 2000: []}, "the same seeds"),
    ],
)
def test_errors_say_what_was_got(arm, tokens, baseline, message):
    with pytest.raises(ValueError, match=message):
        speedup(arm, tokens, baseline)
