"""Independent draws of several quantities at once: their means, intervals, and whether these are narrow enough."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sharpwise.probes.estimate import t_quantile

FEWEST = 10
"""Draws before a probe may stop early: an interval that looks narrow after two or three often is so by luck."""


class Draws:
    """Rows of independent draws, float64 [quantities] each, with weights.

        mean = sum w x / sum w
        error = t sqrt(n / (n-1) sum w^2 (x - mean)^2) / sum w

    With equal weights that is the usual 95% interval of Student's t, half its width; else the ratio estimator's
    (Cochran, Sampling Techniques, chapter 6).

    Squares and products of them are skewed: a few draws rarely hold the large ones that make up the mean, and where
    they are missing the interval is narrow too (squares of one normal variable: it covers 86% with ten draws, 91% with
    30). The error is therefore the wider side of an interval that knows it. For positive quantities that is one of the
    logarithm, mean (exp(error / mean) - 1), with 93% and 95% there; for others Johnson's (Journal of the American
    Statistical Association 73, 1978), error + |m3| (1 + 2 t^2) / (6 s^2 n) with the third central moment m3: 90% and
    94%. Where 30 draws are normal it is 4% wider than it has to be (`benchmarks/coverage.py`).

    Args:
        of: "mean" of any draws; "positive": of positive ones; "root" of the mean of positive ones.
    """

    def __init__(self, of: Literal["mean", "positive", "root"] = "mean") -> None:
        self.of = of
        self.rows: list[np.ndarray] = []
        self.weights: list[float] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: np.ndarray, weight: float = 1.0) -> None:
        """One more draw of every quantity."""
        self.rows.append(np.asarray(row, dtype=np.float64))
        self.weights.append(weight)

    def interval(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Values and half widths of 95% intervals, [quantities] each; None from fewer than two draws."""
        x, w, n = np.stack(self.rows), np.array(self.weights)[:, None], len(self.rows)
        mean = (w * x).sum(0) / w.sum()
        power = 0.5 if self.of == "root" else 1.0
        if n < 2:
            return mean**power, None
        t = t_quantile(n - 1)
        error = t * np.sqrt(n / (n - 1) * (w**2 * (x - mean) ** 2).sum(0)) / w.sum()
        if self.of != "mean":
            return mean**power, wider(mean, error, power)
        square, cube = ((x - mean) ** 2).sum(0) / (n - 1), np.abs(((x - mean) ** 3).mean(0))
        return mean, error + cube / np.where(square == 0, 1.0, square) * (1 + 2 * t * t) / (6 * n)

    def relative_error(self, columns: Sequence[int]) -> float:
        """The largest of error / |mean| among some of the quantities, inf where there is no interval yet."""
        mean, error = self.interval()
        return np.inf if error is None else relative(mean, error, columns)

    def enough(self, rtol: float | None, columns: Sequence[int]) -> bool:
        """Whether all of these quantities are known to the relative error `rtol`; never for None."""
        return rtol is not None and len(self) >= FEWEST and self.relative_error(columns) <= rtol


def wider(mean: np.ndarray, error: np.ndarray, power: float = 1.0) -> np.ndarray:
    """Of positive means: the wider side of the interval of mean ** power that a symmetric one of log(mean) gives."""
    share = error / np.where(mean == 0, 1.0, mean)
    result: np.ndarray = mean**power * np.expm1(np.minimum(power * share, 100.0))
    return result


def relative(mean: np.ndarray, error: np.ndarray, columns: Sequence[int]) -> float:
    """The largest of error / |mean| among some of the quantities; what is exactly 0 is known."""
    own, of = np.abs(mean[columns]), error[columns]
    return float(np.max(np.where(of == 0, 0.0, of / np.where(own == 0, np.finfo(float).tiny, own))))


def check_rtol(rtol: float | None, who: str) -> None:
    """Raise ValueError for a relative error that is none."""
    if rtol is not None and not 0 < rtol < 1:
        raise ValueError(f"{who}: rtol is a relative error between 0 and 1, as 0.05, got {rtol}")


def check_count(who: str, least: int = 1, **counts: int | None) -> None:
    """Raise ValueError for a number of samples, steps or batches that is too small."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{who}: {name} must be at least {least}, got {count}")


def not_reached(who: str, rtol: float | None, reached: float, samples: int, remedy: str) -> list[str]:
    """A warning where a relative error was asked for and not reached."""
    if rtol is None or (reached <= rtol and samples >= FEWEST):
        return []
    few = f", and at least {FEWEST} samples are needed to tell" if samples < FEWEST else ""
    got = "is not known" if not np.isfinite(reached) else f"is {reached:.2g}"
    return [f"{who}: the relative error {got} after {samples} samples, {rtol:g} was asked for{few}; {remedy}"]
