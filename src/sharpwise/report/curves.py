"""Curves made short enough to draw: averaged, or thinned so that their extremes stay."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
POINTS = 2000


def averaged(x: Sequence[float], y: Sequence[float], width: int) -> tuple[list[float], list[float]]:
    """Means over `width` points, at the middle of each; a rest shorter than that is averaged too.

    What is not finite does not count; where nothing else is left the mean is left out.

    >>> averaged([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, float("nan"), 7.0], 2)
    ([1.5, 3.5, 5.0], [2.0, 5.0, 7.0])
    """
    middles, means = [], []
    for i in range(0, len(y), width):
        known = [value for value in y[i : i + width] if math.isfinite(value)]
        if known:
            middles.append((x[i] + x[min(i + width, len(y)) - 1]) / 2)
            means.append(sum(known) / len(known))
    return middles, means


def thinned(y: Array, points: int = POINTS) -> NDArray[np.intp]:
    """Indices of at most `points` values: the smallest and the largest of each of equal stretches, first and last.

    What is not finite is left out, so that an index may be missing even where y is short.

    >>> thinned(np.array([5.0, 1.0, 2.0, 9.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0]), points=6).tolist()
    [0, 1, 3, 5, 9]
    """
    known = np.flatnonzero(np.isfinite(y))
    if len(known) <= points:
        return known
    stretches = np.array_split(known, max((points - 2) // 2, 1))
    extremes = [part[function(y[part])] for part in stretches for function in (np.argmin, np.argmax)]
    return np.unique(np.array([known[0], *extremes, known[-1]]))


def rounded(values: Sequence[float] | Array, digits: int = 5) -> list[float]:
    """With so many significant digits, which is what a page needs; whole numbers stay as they are.

    >>> rounded([3.14159265, 123456.0, 123456.7])
    [3.1416, 123456, 123460.0]
    """
    return [int(value) if value == int(value) else float(f"{value:.{digits}g}") for value in map(float, values)]
