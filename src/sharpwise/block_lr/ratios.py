"""From what was measured of segments to multipliers of blocks: means, and a redistribution that keeps their mean.

    arithmetic   S_b = sum n_s S_s / sum n_s                            over the segments s of block b
    geometric    S_b = exp(sum n_s log S_s / sum n_s)
    balanced     log m_b = clip(c - power log S_b, -log cap, log cap)   c such that sum n_b log m_b = 0

n_s are elements. Balanced multipliers only take from some blocks what they give to others: nothing in them is a larger
step for all, which the learning rate is for.
"""

import math
from collections.abc import Sequence

ROUNDING = 1e-12
"""Of the largest sharpness: what is below is left by rounding, as of biases of keys, and enters no geometric mean."""


def arithmetic(values: Sequence[tuple[float, int]]) -> float:
    """The mean of (value, elements); NaN of nothing. Scaled, as the sum of many large ones may have no double."""
    scale = max((value for value, _ in values), default=math.nan)
    total = sum(size for _, size in values)
    if math.isnan(scale) or not total:
        return math.nan
    return scale * (math.fsum(value / scale * size for value, size in values) / total)


def geometric(values: Sequence[tuple[float, int]]) -> float:
    """The same in the logarithm."""
    total = sum(size for _, size in values)
    if not total:
        return math.nan
    return math.exp(math.fsum(math.log(value) * size for value, size in values) / total)


def balanced(sharpness: Sequence[float], sizes: Sequence[int], power: float, cap: float) -> list[float]:
    """Multipliers from 1 / cap to cap whose geometric mean, weighted with the sizes, is 1.

    Args:
        sharpness: of every block, > 0; NaN where it is not known: its multiplier is 1.
        sizes: elements; 0 for a block that follows without a part in the mean.
    """
    most = math.log(cap)
    wanted = [-power * math.log(value) for value in sharpness]
    level = _level([(x, n) for x, n in zip(wanted, sizes, strict=True) if n and not math.isnan(x)], most)
    return [1.0 if math.isnan(x) else _within(x + level, most, cap) for x in wanted]


def _within(log: float, most: float, cap: float) -> float:
    """exp(log), at most `cap` and at least its reciprocal; exact at both ends."""
    return cap if log >= most else 1 / cap if log <= -most else math.exp(log)


def _level(wanted: Sequence[tuple[float, int]], most: float) -> float:
    """c with sum n clip(x + c, -most, most) = 0: the sum is piecewise linear in c, and rises."""
    if not wanted:
        return 0.0

    def total(c: float) -> float:
        return math.fsum(n * min(max(x + c, -most), most) for x, n in wanted)

    bends = sorted({sign * most - x for x, _ in wanted for sign in (-1, 1)})
    low, high = 0, len(bends) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total(bends[middle]) <= 0 else (low, middle)
    begin, end = total(bends[low]), total(bends[high])
    return bends[low] if begin >= end else bends[low] - begin * ((bends[high] - bends[low]) / (end - begin))
