"""Against SciPy, against formulas written a second time, and against studies whose truth is known."""

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from sharpwise.compare.statistics import (
    detectable,
    equivalence_p,
    equivalent,
    holm,
    mean_interval,
    paired_difference,
    power,
    seeds_needed,
)
from sharpwise.compare.verdict import Verdict, sentence, verdict

INF, NAN = math.inf, math.nan
ADAMW = [4.8723, 4.8487, 4.8557]
MUON = [4.6684, 4.6640, 4.6561]

LOSS = st.floats(0.5, 12)


def _pairs(least: int = 2):
    pairs = st.lists(st.tuples(LOSS, LOSS), min_size=least, max_size=8)
    return pairs.map(lambda pairs: [list(losses) for losses in zip(*pairs, strict=True)])


# --- against SciPy ---------------------------------------------------------------------------------------------------


@given(_pairs(), st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None, max_examples=50)
def test_the_difference_is_scipys(pair, level):
    arm, baseline = pair
    spread = np.std(np.subtract(arm, baseline))
    if spread < 1e-6:
        return
    ours = paired_difference(arm, baseline, level)
    theirs = stats.ttest_rel(arm, baseline)
    interval = theirs.confidence_interval(level)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9, abs=1e-12)
    assert ours.mean == pytest.approx(np.mean(arm) - np.mean(baseline), abs=1e-12)


def test_the_mean_of_one_arm_is_scipys():
    ours = mean_interval([*ADAMW, None, NAN])
    interval = stats.ttest_1samp(ADAMW, 0).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    assert (ours.n, ours.diverged) == (3, 2)


@given(_pairs(3), st.floats(1e-3, 5))
@settings(deadline=None, max_examples=50)
def test_equivalence_is_two_one_sided_tests_and_the_90_percent_interval(pair, margin):
    d = np.subtract(*pair)
    if np.std(d) < 1e-6:
        return
    above = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(d, margin, alternative="less").pvalue
    difference = paired_difference(*pair)
    p = equivalence_p(difference, margin)
    assert p == pytest.approx(max(above, below), rel=1e-9, abs=1e-12)
    interval = paired_difference(*pair, level=0.9)
    within = -margin < interval.low and interval.high < margin
    if abs(p - 0.05) > 1e-9:
        assert equivalent(difference, margin) == within


@pytest.mark.parametrize(
    ("noncentrality", "n"), [(0, 3), (0.3, 2), (2, 3), (2.9, 10), (8, 2), (8.2, 3), (20, 2), (3, 200)]
)
def test_power_is_an_integral_over_the_chi_distribution(noncentrality, n):
    # |Z + nc| > t* V, with Z normal and V^2 = chi^2 / df independent of it
    df = n - 1
    quantile = stats.t.ppf(0.975, df)

    def seen(v):
        density = stats.chi.pdf(v * math.sqrt(df), df) * math.sqrt(df)
        return density * (stats.norm.cdf(noncentrality - quantile * v) + stats.norm.cdf(-noncentrality - quantile * v))

    expected = integrate.quad(seen, 0, 8, points=[0.05, 0.5, 1, 2], limit=400)[0]
    assert power(1.0, noncentrality / math.sqrt(n), n) == pytest.approx(expected, abs=1e-7)


@given(st.floats(1e-3, 0.5), st.floats(1e-3, 0.5), st.sampled_from([0.5, 0.8, 0.95]))
@settings(deadline=None, max_examples=20)
def test_seeds_needed_is_the_first_number_that_suffices(sd, difference, wanted):
    n = seeds_needed(sd, difference, wanted)
    assert n == seeds_needed(sd, -difference, wanted) >= 2
    assert power(sd, difference, n) >= wanted
    assert n == 2 or power(sd, difference, n - 1) < wanted
    # what n seeds can just see needs n seeds, and is no more than what was asked for
    edge = detectable(sd, n, wanted)
    assert edge <= difference * (1 + 1e-9)
    assert power(sd, edge, n) == pytest.approx(wanted, abs=1e-6)
    assert seeds_needed(sd, edge * (1 + 1e-9), wanted) == n


def test_what_needs_very_many_seeds_goes_as_the_normal_says():
    expected = (100 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.8))) ** 2
    assert seeds_needed(1.0, 0.01) == pytest.approx(expected, rel=1e-4)
    assert seeds_needed(1e-9, 1.0) == seeds_needed(0.0, 1e-300) == 2


def test_one_seed_sees_nothing():
    assert detectable(0.01, 1) == INF
    assert power(0.01, 5.0, 1) == 0
    assert detectable(0.0, 3) == 0
    assert (power(0.0, 0.0, 3), power(0.0, 0.1, 3)) == (0, 1)


def test_power_is_what_simulated_studies_see():
    rng = np.random.default_rng(3)
    d = rng.normal(0.03, 0.012, (4000, 3))
    seen = np.abs(d.mean(1)) > stats.t.ppf(0.975, 2) * d.std(1, ddof=1) / math.sqrt(3)
    assert seen.mean() == pytest.approx(power(0.012, 0.03, 3), abs=0.03)


# --- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 5])
def test_identical_arms_cover_zero_in_95_percent_of_studies(n):
    rng = np.random.default_rng(0)
    covered = alarms = 0
    for _ in range(500):
        seed = rng.normal(4.86, 0.012, n)  # what both runs of a seed share
        arm, baseline = (seed + rng.normal(0, 0.008, n) for _ in range(2))
        difference = paired_difference(arm.tolist(), baseline.tolist())
        covered += difference.low <= 0 <= difference.high
        alarms += difference.p < 0.05
    assert 0.93 <= covered / 500 <= 0.97
    assert covered + alarms == 500


def test_pairing_by_seed_pays():
    rng = np.random.default_rng(1)
    seed = rng.normal(4.86, 0.05, 5)
    arm, baseline = seed - 0.02 + rng.normal(0, 0.005, 5), seed + rng.normal(0, 0.005, 5)
    assert paired_difference(arm.tolist(), baseline.tolist()).p < 0.05 < stats.ttest_ind(arm, baseline).pvalue


def test_holm_keeps_any_false_alarm_at_5_percent():
    rng = np.random.default_rng(0)
    raw = adjusted = 0
    for _ in range(500):
        baseline = rng.normal(0, 1, 4)
        p = [paired_difference(rng.normal(0, 1, 4).tolist(), baseline.tolist()).p for _ in range(4)]
        raw += min(p) < 0.05
        adjusted += min(holm(p)) < 0.05
    assert raw > 50
    assert adjusted <= 35


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p):
    expected = []
    for arm in range(len(p)):
        others = [other for other in range(len(p)) if other != arm]
        subsets = (sub for size in range(len(p)) for sub in itertools.combinations(others, size))
        families = [[p[arm], *(p[other] for other in sub)] for sub in subsets]
        expected.append(max(min(1.0, len(family) * min(family)) for family in families))
    assert holm(p) == pytest.approx(expected)


def test_an_arm_without_a_test_counts_for_holm():
    assert holm([0.01, None, None]) == [pytest.approx(0.03), None, None]
    assert holm([]) == []


# --- seeds that are missing, or that change nothing ------------------------------------------------------------------


@pytest.mark.parametrize("loss", [None, INF, NAN, -INF])
def test_diverged_runs_are_counted_and_left_out(loss):
    difference = paired_difference([4.7, loss, 4.6, 4.8], [4.9, 4.9, 4.7, loss])
    assert (difference.n, difference.seeds, difference.arm_diverged, difference.baseline_diverged) == (2, 4, 1, 1)
    assert difference.mean == pytest.approx(-0.15)
    assert difference.diverged


def test_one_seed_has_no_interval():
    difference = paired_difference([4.7], [4.9])
    assert difference.mean == pytest.approx(-0.2)
    assert (difference.low, difference.high, difference.sd, difference.p) == (None,) * 4
    assert verdict(difference, 0.01) is Verdict.UNDECIDED
    assert equivalence_p(difference, 10.0) is None and not equivalent(difference, 10.0)
    assert mean_interval([4.7]).low is None


def test_no_run_that_ended():
    difference = paired_difference([None, NAN], [None, 4.9])
    assert (difference.mean, difference.low, difference.n) == (None, None, 0)
    assert verdict(difference, 0.01) is Verdict.UNDECIDED
    nothing = mean_interval([None])
    assert (nothing.mean, nothing.n, nothing.diverged) == (None, 0, 1)


def test_arms_equal_to_the_bit_are_equivalent():
    difference = paired_difference(ADAMW, ADAMW)
    assert (difference.mean, difference.low, difference.high, difference.sd, difference.p) == (0, 0, 0, 0, 1)
    assert verdict(difference, 1e-9) is Verdict.EQUIVALENT


def test_seeds_that_change_nothing_are_no_evidence():
    difference = paired_difference([4.7, 4.7 + 1e-16, 4.7], [4.9] * 3)
    assert difference.seeds_changed_nothing
    assert (difference.low, difference.p) == (None, None)
    assert verdict(difference, 0.01) is Verdict.UNDECIDED
    assert mean_interval([4.7, 4.7]).low is None


@given(_pairs(), st.floats(-3, 3))
@settings(deadline=None, max_examples=50)
def test_swapping_the_arms_swaps_the_verdict(pair, shift):
    arm, baseline = [loss + shift for loss in pair[0]], pair[1]
    one, other = paired_difference(arm, baseline), paired_difference(baseline, arm)
    swapped = {Verdict.BETTER: Verdict.WORSE, Verdict.WORSE: Verdict.BETTER}
    found = verdict(one, 0.05)
    assert verdict(other, 0.05) is swapped.get(found, found)


# --- verdicts and sentences ------------------------------------------------------------------------------------------

CASES = [
    (
        MUON,
        ADAMW,
        Verdict.BETTER,
        "ended 0.196 nats below AdamW (95% interval 0.171 to 0.221, 3 seeds)",
    ),
    (
        ADAMW,
        MUON,
        Verdict.WORSE,
        "ended 0.196 nats above AdamW (95% interval 0.171 to 0.221, 3 seeds)",
    ),
    (
        [4.869, 4.857, 4.846],
        ADAMW,
        Verdict.UNDECIDED,
        "ended 0.002 nats below AdamW, which 3 seeds cannot tell from chance (95% interval of the difference -0.024 to "
        "0.021); to confirm a gap of 0.01 would take about 9 seeds",
    ),
    (
        [4.8729, 4.8480, 4.8563],
        ADAMW,
        Verdict.EQUIVALENT,
        "ended within 0.01 nats of AdamW: +0.000 (90% interval -0.001 to 0.001, 3 seeds)",
    ),
    (
        [4.8703, 4.8466, 4.8538],
        ADAMW,
        Verdict.EQUIVALENT,
        "ended within 0.01 nats of AdamW: -0.002 (90% interval -0.002 to -0.002, 3 seeds); a real "
        "difference, too small to matter",
    ),
    (
        [4.7],
        [4.9],
        Verdict.UNDECIDED,
        "ended 0.200 nats below AdamW at one seed: no interval, so no verdict",
    ),
    (
        [4.7, 4.7],
        [4.9, 4.9],
        Verdict.UNDECIDED,
        "ended 0.200 nats below AdamW at each of 2 seeds, to the last digit: the seeds changed nothing, so no verdict",
    ),
    (
        [*MUON, None],
        [*ADAMW, 4.86],
        Verdict.UNDECIDED,
        "ended 0.196 nats below AdamW (95% interval 0.171 to 0.221, 3 seeds); it diverged at 1 of 4 seeds, and "
        "the numbers are of the seeds at which both ended: no verdict",
    ),
    (
        [*MUON, 4.66],
        [*ADAMW, NAN],
        Verdict.BETTER,
        "ended 0.196 nats below AdamW (95% interval 0.171 to 0.221, 3 seeds); AdamW diverged at 1 of 4 seeds, and "
        "the numbers are of the seeds at which both ended",
    ),
    (
        [*ADAMW, 4.66, None],
        [*MUON, NAN, 4.66],
        Verdict.UNDECIDED,
        "ended 0.196 nats above AdamW (95% interval 0.171 to 0.221, 3 seeds); it diverged at 1 and AdamW "
        "at 1 of 5 seeds, and the numbers are of the seeds at which both ended: no verdict",
    ),
    (
        [4.8729, 4.8480, 4.8563, None],
        [*ADAMW, 4.86],
        Verdict.UNDECIDED,
        "ended 0.000 nats above AdamW, which 3 seeds cannot tell from chance (95% interval of the difference -0.002 to "
        "0.002); it diverged at 1 of 4 seeds, and the numbers are of the seeds at which both ended: no verdict",
    ),
    ([None] * 3, ADAMW, Verdict.WORSE, "it diverged at 3 of 3 seeds: there is no difference to give"),
    (MUON, [None] * 3, Verdict.BETTER, "AdamW diverged at 3 of 3 seeds: there is no difference to give"),
    ([None], [4.9], Verdict.UNDECIDED, "it diverged at 1 of 1 seed: there is no difference to give"),
    (
        [None] * 3,
        [*MUON[:2], None],
        Verdict.UNDECIDED,
        "it diverged at 3 and AdamW at 1 of 3 seeds: there is no difference to give",
    ),
]


@pytest.mark.parametrize(("arm", "baseline", "found", "words"), CASES)
def test_verdict_and_sentence(arm, baseline, found, words):
    difference = paired_difference(arm, baseline)
    assert verdict(difference, 0.01) is found
    assert sentence("AdamW", difference, 0.01) == words


def test_a_verdict_among_several_arms_uses_the_adjusted_p():
    difference = paired_difference([4.80, 4.82, 4.83], [4.86, 4.86, 4.86])
    assert difference.p == pytest.approx(0.039, abs=1e-3)
    assert verdict(difference, 0.01) is Verdict.BETTER
    assert verdict(difference, 0.01, adjusted_p=0.074) is Verdict.UNDECIDED
    words = sentence("AdamW", difference, 0.01, adjusted_p=0.074)
    assert words.endswith("3 seeds), which does not stand among several comparisons (adjusted p 0.074)")


@given(st.lists(st.floats(-0.3, 0.3), min_size=2, max_size=6))
def test_a_number_of_seeds_is_said_only_if_somebody_might_train_them(shifts):
    margin = 0.02
    difference = paired_difference([4.0 + shift for shift in shifts], [4.0] * len(shifts))
    words = sentence("AdamW", difference, margin)
    said = re.search(r"a gap of (\S+) would take (about|more than) (\d+) seeds", words)
    if said:
        gap, how, count = said.groups()
        assert float(gap) == pytest.approx(max(abs(difference.mean), margin), abs=6e-4)
        assert len(shifts) < int(count) <= 100
        needed = seeds_needed(difference.sd, max(abs(difference.mean), margin))
        assert needed == int(count) if how == "about" else needed > 100
    numbers = re.findall(r"-?\d+\.\d+", words.replace("0.02 ", ""))
    assert all(len(number.partition(".")[2]) == 3 for number in numbers)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference([4.7], [4.7, 4.8]), "got 1 and 2 losses"),
        (lambda: paired_difference([], []), "at least one"),
        (lambda: paired_difference([4.7], [4.7], level=95), "got level 95"),
        (lambda: mean_interval([]), "got no values"),
        (lambda: equivalence_p(paired_difference([4.7], [4.7]), 0.0), "got a margin of 0"),
        (lambda: seeds_needed(0.01, 0.0), "got a difference of 0"),
        (lambda: seeds_needed(NAN, 0.1), "got a sd of nan"),
        (lambda: seeds_needed(0.01, 0.1, power=0.01), "got a power of 0.01"),
        (lambda: seeds_needed(0.01, 0.1, power=0.25, level=0.75), "got a power of 0.25; allowed is above 1 - level"),
        (lambda: detectable(0.01, 3, power=0.25, level=0.75), "got a power of 0.25; allowed is above 1 - level"),
        (lambda: mean_interval([4.7], level=0.5), "got level 0.5; allowed is a confidence above 0.5"),
        (lambda: power(0.01, 0.1, 0), "got a number of seeds of 0; allowed is 1 or more"),
        (lambda: power(-0.01, 0.1, 3), "got a sd of -0.01; allowed is 0 or more"),
        (lambda: detectable(-0.01, 3), "got a sd of -0.01"),
        (lambda: detectable(0.01, 0), "got a number of seeds of 0"),
        (lambda: detectable(0.01, 3, power=1.0), "got a power of 1"),
        (lambda: power(0.01, INF, 3), "got a difference of inf"),
        (lambda: holm([0.1, 1.2]), "got p = 1.2"),
    ],
)
def test_errors_say_what_was_got(call, message):
    with pytest.raises(ValueError, match=message):
        call()
