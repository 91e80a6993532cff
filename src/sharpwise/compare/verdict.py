"""What a comparison came to, and in words: whichever way, with its uncertainty."""

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

MANY = 100
"""More seeds than this nobody will train: their number is not worth saying."""


def sentence(
    baseline: str,
    difference: Difference,
    margin: float,
    speedup: "Speedup | None" = None,
    adjusted_p: float | None = None,
) -> str:
    """What came out of one arm against the baseline, whichever way, with its uncertainty: to stand beside its name.

    Args:
        baseline: name of the baseline, or what the arm is compared with in words.
        difference: of the two.
        margin: nats per token, above 0; the smallest difference that matters.
        speedup: of the arm, if there is one.
        adjusted_p: see `verdict`.

    >>> from sharpwise.compare.statistics import paired_difference
    >>> found = paired_difference([4.67, 4.66, 4.65], [4.87, 4.85, 4.86])
    >>> sentence("AdamW", found, margin=0.01)
    'ended 0.200 nats below AdamW (95% interval 0.175 to 0.225, 3 seeds)'
    >>> found = paired_difference([4.848, 4.856, 4.838], [4.87, 4.85, 4.86])
    >>> sentence("AdamW", found, margin=0.01)
    'ended 0.013 nats below AdamW, which 3 seeds cannot tell from chance (95% interval of the difference -0.053 to
    0.027); to confirm a gap of 0.013 would take about 15 seeds'
    """
    found = verdict(difference, margin, adjusted_p)
    parts = [_outcome(baseline, difference, margin, found, adjusted_p)]
    if difference.n and difference.diverged:
        parts.append(f"{_lost(baseline, difference)}, and the numbers are of the seeds at which both ended")
        if found is Verdict.UNDECIDED:
            parts[-1] += ": no verdict"
    if speedup is not None:
        parts.append(f"speed-up {speedup}")
    return "; ".join(parts)


def _outcome(baseline: str, difference: Difference, margin: float, found: Verdict, adjusted_p: float | None) -> str:
    mean, low, high = difference.mean, difference.low, difference.high
    if mean is None:
        return f"{_lost(baseline, difference)}: there is no difference to give"
    side = f"ended {abs(mean):.3f} nats {'below' if mean < 0 else 'above'} {baseline}"
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
            f"ended within {margin:g} nats of {baseline}: {mean:+.3f} "
            f"({100 * level:.4g}% interval {low:.3f} to {high:.3f}, {seeds}){small}"
        )
    interval = f"{100 * difference.level:.4g}% interval"
    if significant:
        near, far = sorted((abs(low), abs(high)))
        text = f"{side} ({interval} {near:.3f} to {far:.3f}, {seeds})"
        if adjusted_p is not None and adjusted_p >= 1 - difference.level:
            text += f", which does not stand among several comparisons (adjusted p {adjusted_p:.2g})"
        return text
    text = f"{side}, which {seeds} cannot tell from chance ({interval} of the difference {low:.3f} to {high:.3f})"
    return text + _needed(difference, abs(mean), margin)


def _needed(difference: Difference, seen: float, margin: float) -> str:
    """How many seeds would confirm the gap that was seen, or the smallest that matters where less was seen."""
    needed = seeds_needed(difference.sd or 0.0, max(seen, margin), level=difference.level)
    if needed <= difference.n:
        return ""
    count = f"about {needed}" if needed <= MANY else f"more than {MANY}"
    gap = f"{seen:.3f}" if seen > margin else f"{margin:g}"
    return f"; to confirm a gap of {gap} would take {count} seeds"


def _lost(baseline: str, difference: Difference) -> str:
    mine, others, seeds = difference.arm_diverged, difference.baseline_diverged, difference.seeds
    if mine and others:
        who = f"it diverged at {mine} and {baseline} at {others}"
    else:
        who = f"{'it' if mine else baseline} diverged at {mine or others}"
    return f"{who} of {seeds} seed{'s' if seeds > 1 else ''}"
