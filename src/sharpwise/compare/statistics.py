"""Two arms compared by seed: differences with their uncertainty, what a budget can see, and the verdict in words.

Losses are those at the ends of complete schedules, in nats per token. The runs of two arms are paired by seed (the same
initial weights, the same order of the data), which takes the part of the noise that they share out of the difference:
d_s = arm_s - baseline_s, negative where the arm is better. The d_s count as independent and normal, so that with their
mean d, their standard deviation s and n seeds, (d - true) sqrt(n) / s follows Student's t with n - 1 degrees of
freedom. Nothing here corrects for an arm that was tuned on the seeds that it is judged by: keep seeds for that apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from scipy import optimize, stats

# A spread of this many units in the last place of the losses is rounding, and none of the seeds' doing.
ROUNDING = 8 * float(np.finfo(np.float64).eps)
# The largest confidence, and the largest probability to see something, that can be asked for.
MOST = 0.9999


@dataclass(frozen=True)
class Mean:
    """The mean of one arm over the seeds at which it ended, nats per token; see `mean_interval`."""

    mean: float | None
    low: float | None
    high: float | None
    sd: float | None
    n: int
    diverged: int
    level: float


@dataclass(frozen=True)
class Difference:
    """The mean difference of two arms over the seeds at which both ended, nats per token; see `paired_difference`.

    Attributes:
        mean: of arm minus baseline, negative where the arm is better; None if there is no such seed.
        low: lower end of the interval of confidence `level`; None where `sd` is, or if the seeds changed nothing.
        high: its upper end.
        sd: standard deviation of the difference of a pair; None with fewer than two pairs.
        n: number of pairs of which both runs ended.
        p: of a two-sided t-test of no difference; None where there is no interval.
        level: confidence of the interval, such as 0.95.
        seeds: number of pairs that were started.
        arm_diverged: number of seeds at which the arm did not reach a finite loss.
        baseline_diverged: number of seeds at which the baseline did not.
    """

    mean: float | None
    low: float | None
    high: float | None
    sd: float | None
    n: int
    p: float | None
    level: float
    seeds: int
    arm_diverged: int
    baseline_diverged: int

    @property
    def diverged(self) -> bool:
        """Whether pairs are missing: the mean is then over the survivors, and whoever quotes it has to say so."""
        return self.n < self.seeds

    @property
    def seeds_changed_nothing(self) -> bool:
        """Whether all pairs differ by the same, and not by zero: runs repeated rather than drawn, or rounded losses."""
        return self.sd == 0 and self.mean != 0


def ended(loss: float | None) -> TypeGuard[float]:
    """Whether a run ended at a finite loss.

    >>> [ended(x) for x in (4.2, None, float("inf"), float("nan"))]
    [True, False, False, False]
    """
    return loss is not None and math.isfinite(loss)


def mean_interval(values: Sequence[float | None], level: float = 0.95) -> Mean:
    """The mean over seeds with its t-interval, mean -+ t sd / sqrt(n).

    Args:
        values: by seed, nats per token; None, infinite or nan for a run that diverged, which is counted and left out.
        level: confidence of the interval.

    Returns:
        The mean; without an interval if fewer than two runs ended, or if all ended at the same loss.

    Raises:
        ValueError: no values, or a level outside 0.5 to 0.9999.

    >>> result = mean_interval([4.87, 4.85, 4.86, None])
    >>> f"{result.mean:.3f} ({result.low:.3f} to {result.high:.3f}), {result.diverged} diverged"
    '4.860 (4.835 to 4.885), 1 diverged'
    """
    check_level(level)
    if not values:
        raise ValueError("got no values; an arm needs at least one run")
    kept = np.array([value for value in values if ended(value)], dtype=np.float64)
    mean, sd = _moments(kept, np.abs(kept).max(initial=0.0))
    low, high = (None, None) if sd is None or mean is None or sd == 0 else t_interval(mean, sd, len(kept), level)
    return Mean(mean, low, high, sd, len(kept), len(values) - len(kept), level)


def paired_difference(arm: Sequence[float | None], baseline: Sequence[float | None], level: float = 0.95) -> Difference:
    """The mean difference arm - baseline, paired by seed, with its two-sided t-interval and p.

    Only pairs of which both runs ended count. What is left out is counted in the result: an arm that loses its worst
    seeds looks better than it is, and `verdict` does not let it win by that. If all pairs differ by exactly the same,
    other than zero, the seeds changed nothing (the same run twice, or losses rounded until they agree), and there is
    no interval; arms that agree to the last bit have the interval from 0 to 0.

    Args:
        arm: final losses by seed, nats per token; None, infinite or nan for a run that diverged.
        baseline: the same of the baseline, in the same order of seeds.
        level: confidence of the interval.

    Raises:
        ValueError: no seeds, different numbers of seeds, or a level outside 0.5 to 0.9999.

    >>> result = paired_difference([4.67, 4.66, 4.65], [4.87, 4.85, 4.86])
    >>> f"{result.mean:.2f} ({result.low:.2f} to {result.high:.2f}), p = {result.p:.1g}"
    '-0.20 (-0.22 to -0.18), p = 0.0008'
    """
    check_level(level)
    if len(arm) != len(baseline) or not arm:
        raise ValueError(f"got {len(arm)} and {len(baseline)} losses; two arms need the same seeds, at least one")
    pairs = [(a, b) for a, b in zip(arm, baseline, strict=True) if ended(a) and ended(b)]
    losses = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    n = len(pairs)
    mean, sd = _moments(losses[:, 0] - losses[:, 1], np.abs(losses).max(initial=0.0))
    low, high, p = None, None, None
    if mean is not None and sd is not None and (sd > 0 or mean == 0):
        low, high = t_interval(mean, sd, n, level)
        p = 1.0 if sd == 0 else float(2 * stats.t.sf(abs(mean) * math.sqrt(n) / sd, n - 1))
    lost = [sum(not ended(loss) for loss in losses) for losses in (arm, baseline)]
    return Difference(mean, low, high, sd, n, p, level, len(arm), *lost)


def equivalence_p(difference: Difference, margin: float) -> float | None:
    """p of two one-sided t-tests: the larger of that of "at or below -margin" and that of "at or above margin".

    Source: Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987) 657.

    Args:
        difference: of two arms.
        margin: nats per token, above 0.

    Returns:
        None where the difference has no interval.
    """
    _check("margin", margin, margin > 0)
    if difference.low is None or difference.mean is None:
        return None
    if not difference.sd:
        return 0.0  # equal to the last bit
    away = (margin - abs(difference.mean)) * math.sqrt(difference.n) / difference.sd
    return float(stats.t.sf(away, difference.n - 1))


def equivalent(difference: Difference, margin: float) -> bool:
    """Whether two arms differ by less than `margin`, nats per token, by two one-sided tests at 1 - `level` each.

    The same as: the interval of confidence 2 `level` - 1 (90% for 95%) lies within -margin to margin. "No significant
    difference" is not that; with few seeds it says little.
    """
    p = equivalence_p(difference, margin)
    return p is not None and p < 1 - difference.level


def power(sd: float, difference: float, n: int, level: float = 0.95) -> float:
    """Probability that the interval of n paired seeds leaves out zero if the true difference is `difference`.

    With t* the two-sided quantile of Student's t with n - 1 degrees of freedom, and T' the noncentral t of the same
    with noncentrality |difference| sqrt(n) / sd: P(T' > t*) + P(T' < -t*).

    Args:
        sd: standard deviation of the difference of a pair, nats per token.
        difference: true difference, nats per token, of either sign.
        n: number of seeds; one seed sees nothing.
        level: confidence of the interval.
    """
    check_level(level)
    _check("sd", sd, sd >= 0)
    _check("difference", difference, True)
    _check("number of seeds", n, n >= 1)
    if n == 1:
        return 0.0
    return _power(abs(difference) * math.sqrt(n) / sd, n, level) if sd else float(difference != 0)


def seeds_needed(sd: float, difference: float, power: float = 0.8, level: float = 0.95) -> int:
    """The smallest number of paired seeds that see a true difference with probability `power`; at least 2.

    `sd` is mostly an estimate, and so is what comes out: from 3 seeds the true deviation is known to lie between half
    and six times the estimate (95%), and the number needed goes with its square.

    Args:
        sd: standard deviation of the difference of a pair, nats per token, not negative.
        difference: nats per token, of either sign, not zero.
        power: probability to see it, above 1 - level and at most 0.9999.
        level: confidence of the interval that has to leave out zero.

    >>> seeds_needed(sd=0.012, difference=0.01)
    14
    """
    check_level(level)
    _check("sd", sd, sd >= 0)
    _check("difference", difference, difference != 0)
    _check("power", power, 1 - level < power <= MOST)

    def enough(n: int) -> bool:
        return sd == 0 or _power(abs(difference) * math.sqrt(n) / sd, n, level) >= power

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2  # not enough, or one seed
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def detectable(sd: float, n: int, power: float = 0.8, level: float = 0.95) -> float:
    """The smallest true difference, nats per token, that n paired seeds see with probability `power`.

    Args:
        sd: standard deviation of the difference of a pair, nats per token, not negative.
        n: number of seeds; what one seed can see is infinite.
        power: probability to see it, above 1 - level and at most 0.9999.
        level: confidence of the interval that has to leave out zero.

    >>> f"{detectable(sd=0.012, n=3):.3f} {detectable(sd=0.012, n=14):.4f}"
    '0.039 0.0097'
    """
    check_level(level)
    _check("sd", sd, sd >= 0)
    _check("number of seeds", n, n >= 1)
    _check("power", power, 1 - level < power <= MOST)
    if n == 1:
        return math.inf
    far = 1.0
    while _power(far, n, level) < power:
        far *= 2
    root = optimize.brentq(lambda noncentrality: _power(noncentrality, n, level) - power, 0.0, far, xtol=1e-12)
    return float(root) * sd / math.sqrt(n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p of several arms against one baseline, adjusted for their number: any false alarm among them stays below p.

    The i-th smallest of m, counted from 0, becomes the largest of (m - j) p_j over j up to i, at most 1. An arm without
    a p (None) keeps none and counts in m, as it was meant to be tested. Source: Holm, Scand. J. Stat. 6 (1979) 65.

    >>> holm([0.01, 0.04, None, 0.02])
    [0.04, 0.08, None, 0.06]
    """
    for p in p_values:
        if p is not None and not 0 <= p <= 1:
            raise ValueError(f"got p = {p}; allowed is 0 to 1, or None for an arm without a test")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[index] = largest
    return adjusted


# --- pieces ----------------------------------------------------------------------------------------------------------


def _moments(values: np.ndarray, scale: float) -> tuple[float | None, float | None]:
    """Mean and standard deviation, each None if there are too few values; what is rounding at `scale` becomes 0."""
    if len(values) == 0:
        return None, None
    rounding = ROUNDING * scale
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None
    sd = float(np.std(values, ddof=1))
    if sd > rounding:
        return mean, sd
    return (mean if abs(mean) > rounding else 0.0), 0.0


def t_interval(mean: float, sd: float, n: int, level: float) -> tuple[float, float]:
    """Where the true mean lies, with confidence `level`."""
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * sd / math.sqrt(n)
    return mean - half, mean + half


def _power(noncentrality: float, n: int, level: float) -> float:
    quantile = stats.t.ppf((1 + level) / 2, n - 1)
    noncentrality = min(noncentrality, 1e6)  # certain there, and nan from 1e12 on
    # The second term is P(T' < -t*), mirrored: nct.cdf(-t*, df, nc) is nan for many nc above 7.5 (SciPy 1.17).
    return float(stats.nct.sf(quantile, n - 1, noncentrality) + stats.nct.sf(quantile, n - 1, -noncentrality))


def check_level(level: float) -> None:
    """Refuse what is no confidence; two one-sided tests need more than one half."""
    if not 0.5 < level <= MOST:
        raise ValueError(f"got level {level}; allowed is a confidence above 0.5 and at most {MOST}, such as 0.95")


ALLOWED = {
    "sd": "0 or more nats per token",
    "difference": "nats per token; seeds_needed wants it other than 0",
    "margin": "more than 0 nats per token",
    "number of seeds": "1 or more",
    "power": "above 1 - level, the rate of false alarms, and at most 0.9999",
}


def _check(name: str, value: float, allowed: bool) -> None:
    if not (allowed and math.isfinite(value)):
        raise ValueError(f"got a {name} of {value}; allowed is {ALLOWED[name]}")
