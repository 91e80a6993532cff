"""What a comparison came to, and in words: whichever way, with its uncertainty."""

import math
from enum import StrEnum
from typing import TYPE_CHECKING

from sharpwise.compare.statistics import Difference, equivalent, seeds_needed, t_interval

if TYPE_CHECKING:
    from sharpwise.compare.speedup import Speedup


class Verdict(StrEnum):
    """What a comparison came to; see `verdict`."""

    BETTER = "better"
    WORSE = "worse"
    EQUIVALENT = "equivalent"
    UNDECIDED = "undecided"


def verdict(difference: Difference, margin: float, adjusted_p: float | None = None) -> Verdict:
    """What a difference comes to, where one below `margin` does not matter.

    - Equivalent: `equivalent` says so, even if the difference is significant; it is then real and too small to matter.
      This is not adjusted for the number of arms.
    - Better, worse: p is below 1 - level.
    - Undecided: else, and with fewer than two pairs.

    The means are those of the survivors, so that who diverged at a seed does not win by the rest, and nobody is then
    called equivalent. An arm of which no run ended is worse, if all of at least two runs of the baseline did.

    Args:
        difference: of two arms.
        margin: nats per token, above 0; the smallest difference that matters.
        adjusted_p: takes the place of `difference.p` where several arms are compared, see `holm`.
    """
    p = difference.p if adjusted_p is None else adjusted_p
    arm_lost, baseline_lost = difference.arm_diverged, difference.baseline_diverged
    if difference.n == 0 and difference.seeds > 1 and 0 in (arm_lost, baseline_lost):
        return Verdict.WORSE if arm_lost else Verdict.BETTER
    if equivalent(difference, margin):
        return Verdict.UNDECIDED if difference.diverged else Verdict.EQUIVALENT
    if difference.mean is None or difference.p is None or p is None or p >= 1 - difference.level:
        return Verdict.UNDECIDED
    if difference.mean < 0:
        return Verdict.UNDECIDED if arm_lost else Verdict.BETTER
    return Verdict.UNDECIDED if baseline_lost else Verdict.WORSE


# --- sentences -------------------------------------------------------------------------------------------------------


def sentence(
    arm: str,
    baseline: str,
    difference: Difference,
    margin: float,
    speedup: "Speedup | None" = None,
    adjusted_p: float | None = None,
) -> str:
    """What came out of one arm against the baseline, in words, whichever way, with its uncertainty.

    Args:
        arm: name of the arm.
        baseline: name of the baseline.
        difference: of the two.
        margin: nats per token, above 0; the smallest difference that matters.
        speedup: of the arm, if there is one.
        adjusted_p: see `verdict`.

    >>> from sharpwise.compare.statistics import paired_difference
    >>> found = paired_difference([4.67, 4.66, 4.65], [4.87, 4.85, 4.86])
    >>> sentence("Muon", "AdamW", found, margin=0.01)
    'Muon ended 0.200 nats below AdamW (95% interval 0.175 to 0.225, 3 seeds)'
    >>> found = paired_difference([4.858, 4.846, 4.878], [4.87, 4.85, 4.86])
    >>> sentence("Lion", "AdamW", found, margin=0.01)
    'Lion and AdamW: no difference that 3 seeds could see: +0.001 nats (95% interval -0.038 to 0.039); a difference of
    0.01 would need about 21 seeds'
    """
    found = verdict(difference, margin, adjusted_p)
    parts = [_outcome(arm, baseline, difference, margin, found, adjusted_p)]
    if difference.n and difference.diverged:
        parts.append(f"{_lost(arm, baseline, difference)}, and the numbers are of the seeds at which both ended")
        if found is Verdict.UNDECIDED:
            parts[-1] += ": no verdict"
    if speedup is not None:
        parts.append(f"speed-up {speedup}")
    return "; ".join(parts)


def _outcome(
    arm: str, baseline: str, difference: Difference, margin: float, found: Verdict, adjusted_p: float | None
) -> str:
    mean, low, high, spec = difference.mean, difference.low, difference.high, f".{_digits(difference)}f"
    if mean is None:
        return f"{_lost(arm, baseline, difference)}: there is no difference to give"
    side = f"{arm} ended {abs(mean):{spec}} nats {'below' if mean < 0 else 'above'} {baseline}"
    if difference.sd is None:
        return f"{side} at one seed: no interval, so no verdict"
    seeds = f"{difference.n} seeds"
    if low is None or high is None:
        return f"{side} at each of {seeds}, to the last digit: the seeds changed nothing, so no verdict"
    significant = not low <= 0 <= high
    if found is Verdict.EQUIVALENT:
        level = 2 * difference.level - 1
        low, high = t_interval(mean, difference.sd, difference.n, level)
        small = "; a real difference, too small to matter" if significant else ""
        return (
            f"{arm} ended within {margin:g} nats of {baseline}: {mean:+{spec}} "
            f"({100 * level:.4g}% interval {low:{spec}} to {high:{spec}}, {seeds}){small}"
        )
    interval = f"{100 * difference.level:.4g}% interval"
    if significant:
        near, far = sorted((abs(low), abs(high)))
        text = f"{side} ({interval} {near:{spec}} to {far:{spec}}, {seeds})"
        if adjusted_p is not None and adjusted_p >= 1 - difference.level:
            text += f", which does not stand among several arms (adjusted p {adjusted_p:.2g})"
        return text
    text = (
        f"{arm} and {baseline}: no difference that {seeds} could see: {mean:+{spec}} nats "
        f"({interval} {low:{spec}} to {high:{spec}})"
    )
    needed = seeds_needed(difference.sd, margin, level=difference.level)
    if needed > difference.n:
        text += f"; a difference of {margin:g} would need about {needed:,} seeds"
    return text


def _lost(arm: str, baseline: str, difference: Difference) -> str:
    lost = ((arm, difference.arm_diverged), (baseline, difference.baseline_diverged))
    who = " and ".join(f"{name} diverged at {count}" for name, count in lost if count)
    return f"{who} of {difference.seeds} seed{'s' if difference.seeds > 1 else ''}"


def _digits(difference: Difference) -> int:
    """Decimals that show the width of the interval with two digits; 3 at least, 6 at most."""
    if difference.low is None or difference.high is None or difference.high <= difference.low:
        return 3
    return min(6, max(3, 1 - math.floor(math.log10((difference.high - difference.low) / 2))))
