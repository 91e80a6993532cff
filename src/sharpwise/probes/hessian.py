"""Trace, diagonal and norms of a curvature matrix from its products with random vectors.

    Tr A            E v^T A v          v Rademacher (+-1)                      Hutchinson 1990
    diag A          E v * A v          the same                                Bekas, Kokiopoulou and Saad 2007
    |A|_F^2         E |A v|^2          the same
    |A_i|_1         median |(A v)_i|   v standard Cauchy: (A v)_i ~ |A_i|_1 times a Cauchy variable

and what concerns a block are the terms of its rows. |A|_{1,1}/d, the mean over rows of |A_i|_1, is what Adam's
convergence rests on as that of gradient descent on |A|_2 (Xie et al., arXiv 2410.08198).

| symbol | meaning |
|---|---|
| A | `Curvature`, d x d: a Hessian or Gauss-Newton matrix over a selection of blocks |
| v | a random vector [d] |
| A_i | a row |

Departs: the paper's code reports the sum of medians as it is. The median of n absolute Cauchy variables is too large in
the mean, by 2.6% for n = 50; here it is divided by that factor, and an interval is given.

The products are exact up to rounding, so that intervals are for the random vectors alone, on exactly these batches.
"""

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sharpwise.probes.estimate import Cost, Estimate, Measurement, t_quantile
from sharpwise.probes.gather import Groups
from sharpwise.probes.monte_carlo import Draws, check_count, check_rtol, not_reached
from sharpwise.probes.products import Operator

_ROUND = 10
"""Cauchy vectors per round: medians of so many are one draw."""


def trace(matrix: Operator, *, samples: int = 30, rtol: float | None = None, seed: int = 0) -> Measurement:
    """Trace of the matrix, and of its diagonal blocks by segment, layer, type and role.

    Args:
        matrix: a `Curvature`.
        samples: Rademacher vectors, one product each; with `rtol` at most.
        rtol: stop as soon as the trace of all is known to this relative error, after ten vectors at least.
        seed: of the random vectors.

    Returns:
        Quantity "trace", sums of eigenvalues; divided by `elements` they compare with `sharpness`.

    Raises:
        ValueError: for bad arguments.
        FloatingPointError: for a product that is not finite.
    """
    run = _Run("trace", matrix, samples, rtol, seed)
    groups = run.groups
    for v, av in run.products():
        run.draws.add(groups.sums(matrix.selection.sums(v * av)))
    mean, error = run.draws.interval()
    return run.measurement(groups.estimates("trace", mean, error, samples=len(run.draws)))


def frobenius(matrix: Operator, *, samples: int = 30, rtol: float | None = None, seed: int = 0) -> Measurement:
    """Frobenius norm of the matrix, and of its rows by segment, layer, type and role (all columns of the selection).

    Args:
        matrix, samples, rtol, seed: as `trace` takes them; it raises the same errors.
    """
    run = _Run("frobenius", matrix, samples, rtol, seed, of="root")
    for _, av in run.products():
        run.draws.add(run.groups.sums(matrix.selection.sums(av.double().square())))
    norm, error = run.draws.interval()
    return run.measurement(run.groups.estimates("frobenius norm", norm, error, samples=len(run.draws)))


class Diagonal(Measurement):
    """Means of the diagonal per block as estimates, and the diagonal itself.

    Attributes:
        values, errors: by segment, tensors shaped as the segment's rows of its parameter; the errors are half the width
            of each element's 95% interval, None from a single vector.
    """

    values: dict[str, Tensor]
    errors: dict[str, Tensor] | None


def diagonal(matrix: Operator, *, samples: int = 100, rtol: float | None = None, seed: int = 0) -> Diagonal:
    """The diagonal, element by element, and its mean by segment, layer, type and role.

    Single elements need many more vectors than the trace: one's variance is the sum of squares of the rest of its row.

    Args:
        matrix: a `Curvature`.
        samples: Rademacher vectors, one product each; with `rtol` at most.
        rtol: stop as soon as |errors| / |diagonal|, as Euclidean norms, is at most this, after ten vectors at least.
        seed: of the random vectors.

    Returns:
        Quantity "mean diagonal", and the tensors. It holds two vectors as long as the selection.
    """
    run = _Run("diagonal", matrix, samples, None, seed)
    check_rtol(rtol, run.who)
    mean = squares = torch.zeros((), dtype=torch.float64, device="cpu")
    reached = math.inf
    for n, (v, av) in enumerate(run.products(), start=1):
        x = v * av
        run.draws.add(run.groups.means(matrix.selection.sums(x)))
        before, mean = mean, x.clone() if n == 1 else mean + (x - mean) / n
        squares = torch.zeros_like(x) if n == 1 else squares + (x - before) * (x - mean)  # Welford's
        reached = _diagonal_error(mean, squares, n)
        if rtol is not None and n >= _ROUND and reached <= rtol:
            break
    n = len(run.draws)
    run.warn(not_reached(run.who, rtol, reached, n, "take more samples"))
    value, error = run.draws.interval()
    settings = {"relative_error": reached}
    found = run.measurement(run.groups.estimates("mean diagonal", value, error, samples=n), Diagonal, settings)
    assert isinstance(found, Diagonal)
    found.values = matrix.selection.split(mean)
    half = None if n < 2 else t_quantile(n - 1) * (squares / (n - 1) / n).sqrt()
    found.errors = None if half is None else matrix.selection.split(half)
    return found


def _diagonal_error(mean: Tensor, squares: Tensor, n: int) -> float:
    norm = float(torch.linalg.vector_norm(mean, dtype=torch.float64))
    if n < 2 or norm == 0:
        return math.inf
    return t_quantile(n - 1) * math.sqrt(float(squares.sum(dtype=torch.float64)) / (n - 1) / n) / norm


def norm_11(
    matrix: Operator, *, samples: int = 50, rtol: float | None = None, rows: int | None = None, seed: int = 0
) -> Measurement:
    """|A|_{1,1}/d: the mean over rows of the sum of absolute entries, for all rows and those of each segment and type.

    The value is the median over all vectors, its interval comes from rounds of ten of them, each corrected for its
    own size: rows share vectors, so that they do not average out. It is in the Hessian's units, as its eigenvalues are.

    Args:
        matrix: a `Curvature`; in float32 rounding is relative to the largest of d Cauchy numbers, about 2d/pi.
        samples: Cauchy vectors, one product each, 20 at least; with `rtol` at most.
        rtol: stop as soon as the mean over all rows is known to this relative error; tested every ten vectors.
        rows: keep so many rows of each segment, chosen at random, the uncertainty of which is in the error; None keeps
            all. It holds `samples` numbers per row.
        seed: of the random vectors.

    Returns:
        Quantity "norm_11 / d": the mean of |A_i|_1 over the rows of a block, the columns being those of the selection.

    Raises:
        ValueError: for bad arguments.
        FloatingPointError: for a product that is not finite.
    """
    run = _Run("norm_11", matrix, samples, rtol, seed)
    check_count(run.who, least=2 * _ROUND, samples=samples)
    check_count(run.who, least=2, rows=rows)
    kept = _Rows(matrix, rows, run.generator)
    products: list[Tensor] = []
    for _, av in run.products(_cauchy, enough=lambda: False):
        products.append(kept.of(av).abs().cpu())
        if len(products) % _ROUND == 0:
            run.draws.add(kept.means(_medians(products[-_ROUND:]), run.groups))
            if rtol is not None and len(run.draws) > 2 and run.draws.relative_error([0]) <= rtol:
                break
    medians = _medians(products)
    value = kept.means(medians, run.groups)
    _, error = run.draws.interval()
    assert error is not None
    error = np.hypot(error, kept.errors(medians, run.groups))
    run.warn(not_reached(run.who, rtol, float(error[0] / value[0]), len(products), "take more samples, or rows"))
    return run.measurement(
        run.groups.estimates("norm_11 / d", value, error, samples=len(products)), settings={"rows": rows}
    )


class _Rows:
    """Some rows of every segment."""

    def __init__(self, matrix: Operator, rows: int | None, generator: torch.Generator) -> None:
        sizes = matrix.selection.sizes
        self.counts = np.array([size if rows is None else min(size, rows) for size in sizes])
        self.sizes = np.array(sizes)
        self.index: Tensor | None = None
        if rows is not None:
            starts = np.cumsum(self.sizes) - self.sizes
            picks = [
                int(start) + torch.randperm(int(size), generator=generator, device=matrix.device)[:rows].sort().values
                for start, size in zip(starts, sizes, strict=True)
            ]
            self.index = torch.cat(picks)

    def of(self, v: Tensor) -> Tensor:
        return v if self.index is None else v[self.index]

    def means(self, medians: np.ndarray, groups: Groups) -> np.ndarray:
        """Per group, each segment's rows standing for all of its rows."""
        return groups.means(self._split(medians, np.mean) * self.sizes)

    def errors(self, medians: np.ndarray, groups: Groups) -> np.ndarray:
        """Half the width of the 95% interval that leaving rows out costs, per group."""
        some = np.where(self.counts < self.sizes, 1 - self.counts / np.maximum(self.sizes, 1), 0.0)
        spread = np.where(some > 0, self._split(medians, np.var), 0.0)
        variance = spread * some / np.maximum(self.counts - 1, 1) * self.sizes**2
        return (
            t_quantile(max(int(self.counts.min()) - 1, 1))
            * np.sqrt(groups.sums(variance))
            / np.maximum(groups.elements, 1)
        )

    def _split(self, rows: np.ndarray, how: Callable[..., Any]) -> np.ndarray:
        return np.array([how(part) if len(part) else 0.0 for part in np.split(rows, np.cumsum(self.counts)[:-1])])


def _medians(products: list[Tensor]) -> np.ndarray:
    """Of each row, over the vectors, without the bias that a median of so few has: float64 [rows]."""
    chunks = zip(*(product.split(2**20) for product in products), strict=True)
    found = np.concatenate([np.median(torch.stack(chunk).double().numpy(), axis=0) for chunk in chunks])
    return found / median_bias(len(products))


@lru_cache
def median_bias(n: int) -> float:
    """Mean of the median of n absolute values of standard Cauchy variables, whose median is 1; 1.026 for n = 50.

    The k-th of n is tan(pi U / 2) with U ~ Beta(k, n + 1 - k); the median of an even number is the mean of two.

    Raises:
        ValueError: for n < 3, where it is infinite.

    >>> round(median_bias(50), 3), round(median_bias(10), 3)
    (1.026, 1.155)
    """
    if n < 3:
        raise ValueError(f"the median of {n} Cauchy variables has no mean; take 3 or more")
    middle = {(n + 1) // 2, n // 2 + 1}
    return sum(_mean_of_order(k, n) for k in middle) / len(middle)


def _mean_of_order(k: int, n: int) -> float:
    # In x = tan(pi u / 2) = e^s the integrand is smooth and decays at both ends: the trapezoid rule is all but exact.
    s = np.linspace(-60.0, 60.0, 24001)
    u = 2 / np.pi * np.arctan(np.exp(s))
    rest = 2 / np.pi * np.arctan(np.exp(-s))  # 1 - u, without cancellation
    log_beta = math.lgamma(k) + math.lgamma(n + 1 - k) - math.lgamma(n + 1)
    density = np.exp((k - 1) * np.log(u) + (n - k) * np.log(rest) - log_beta)
    du = 2 / np.pi / (np.exp(s) + np.exp(-s))
    return float(np.sum(np.exp(s) * density * du) * (s[1] - s[0]))


# --- random vectors --------------------------------------------------------------------------------------------------


def _rademacher(matrix: Operator, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (matrix.dim,), generator=generator, device=matrix.device)
    return bits.to(matrix.dtype).mul_(2).sub_(1)


def _cauchy(matrix: Operator, generator: torch.Generator) -> Tensor:
    u = torch.rand(matrix.dim, generator=generator, device=matrix.device, dtype=torch.float64)
    return torch.tan(math.pi * (u - 0.5)).to(matrix.dtype)


class _Run:
    """A measurement under way: products with random vectors until there are enough, then what came out."""

    def __init__(
        self,
        who: str,
        matrix: Operator,
        samples: int,
        rtol: float | None,
        seed: int,
        of: Literal["mean", "root"] = "mean",
    ) -> None:
        check_count(who, samples=samples)
        check_rtol(rtol, who)
        if not isinstance(matrix, Operator):
            raise TypeError(f"{who}: got {type(matrix).__name__}, expected a Curvature: Curvature(model, batches)")
        self.who, self.matrix, self.samples, self.rtol, self.seed = who, matrix, samples, rtol, seed
        self.generator = torch.Generator(matrix.device).manual_seed(seed)
        self.groups, self.draws = Groups(matrix.selection.segments), Draws(of)
        self.started, self.before, self.paid = time.perf_counter(), matrix.products, matrix.gradients
        self.warnings: list[str] = list(matrix.warnings)

    def products(
        self,
        draw: Callable[[Operator, torch.Generator], Tensor] = _rademacher,
        enough: Callable[[], bool] | None = None,
    ) -> Any:
        """Pairs v, A v; ends when the draws are enough."""
        with self.matrix.kept():
            for _ in range(self.samples):
                v = draw(self.matrix, self.generator)
                yield v, self.matrix.matvec(v)
                if enough() if enough else self.draws.enough(self.rtol, [0]):
                    return
        if enough is None and self.rtol is not None:
            reached = self.draws.relative_error([0])
            self.warn(not_reached(self.who, self.rtol, reached, len(self.draws), "take more samples"))

    def warn(self, warnings: list[str]) -> None:
        """Add to what the result says."""
        self.warnings += warnings

    def measurement(
        self, estimates: list[Estimate], kind: type[Measurement] = Measurement, settings: dict[str, Any] | None = None
    ) -> Measurement:
        """The result, with what it took."""
        products = self.matrix.products - self.before
        cost = Cost(time.perf_counter() - self.started, self.matrix.gradients - self.paid)
        own = {**self.matrix.settings(), "products": products, "seed": self.seed, "rtol": self.rtol, **(settings or {})}
        return kind(self.who, estimates, settings=own, cost=cost, warnings=self.warnings)


__all__ = ["Diagonal", "diagonal", "frobenius", "median_bias", "norm_11", "trace"]
