"""Extreme eigenvalues and the density of eigenvalues, by Lanczos with full reorthogonalization.

    A Q_m = Q_m T_m + beta_m q_{m+1} e_m^T          T_m tridiagonal, Q_m orthonormal
    T_m s_i = theta_i s_i,   x_i = Q_m s_i          Ritz values and vectors
    |A x_i - theta_i x_i| = beta_m |s_mi|           some eigenvalue lies within this of theta_i
    v^T f(A) v ~ sum_i s_1i^2 f(theta_i)            Gauss quadrature; the mean over random unit v is Tr f(A) / d

| symbol | meaning |
|---|---|
| A | a symmetric matrix, here `Curvature` |
| m | steps, one product each; Q_m holds m vectors as long as the selection |

Departs: without reorthogonalization, as in the code of arXiv 2402.16788 and of many, rounding brings converged
eigenvalues back as copies ("ghosts"), which spoil both the second largest and the density. Here every new vector is
made orthogonal to all before it, twice.

References: Golub and Van Loan, Matrix Computations, chapter 10; Parlett, The Symmetric Eigenvalue Problem (bounds);
Lin, Saad and Yang, arXiv 1308.5467, and Ghorbani, Krishnan and Xiao, arXiv 1901.10159 (density).
"""

import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sharpwise.probes.estimate import Cost, Estimate, Measurement, t_quantile
from sharpwise.probes.monte_carlo import FEWEST, Draws, check_count, check_rtol, not_reached
from sharpwise.probes.products import Operator

Which = Literal["largest", "smallest", "both", "magnitude"]
ROUNDING = 1e-6
"""Eigenvalues closer than this part of the largest are not told apart."""


class Lanczos:
    """The process from one start vector, a step at a time.

    Args:
        steps: at most; more than the dimension there cannot be.
        restart: at an invariant subspace go on from a new random direction, for what the start vector had no part in.
    """

    def __init__(self, matrix: Operator, start: Tensor, steps: int, *, restart: torch.Generator | None = None) -> None:
        self.matrix, self.restart = matrix, restart
        self.limit = min(steps, matrix.dim)
        self.basis = start.new_empty(self.limit, matrix.dim)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self._next: Tensor | None = start / torch.linalg.vector_norm(start)

    @property
    def steps(self) -> int:
        """Taken so far."""
        return len(self.alpha)

    def step(self) -> bool:
        """One product; False if there was nothing left to do."""
        if self._next is None or self.steps == self.limit:
            return False
        q, m = self._next, self.steps
        self.basis[m] = q
        w = self.matrix.matvec(q)
        self.alpha.append(float(q.double() @ w.double()))
        w = self._orthogonal(w, m + 1)
        beta = float(torch.linalg.vector_norm(w, dtype=torch.float64))
        scale = max(map(abs, self.alpha + self.beta), default=0.0)
        broken = beta <= 10 * torch.finfo(w.dtype).eps * max(scale, float(torch.finfo(w.dtype).tiny))
        self.beta.append(0.0 if broken or m + 1 == self.matrix.dim else beta)
        self._next = self._fresh(m + 1) if broken else w / beta
        return True

    def _orthogonal(self, w: Tensor, count: int) -> Tensor:
        q = self.basis[:count]
        for _ in range(2):
            w = w - q.T @ (q @ w)
        return w

    def _fresh(self, count: int) -> Tensor | None:
        if self.restart is None or count == self.limit:
            return None
        w = _gaussian(self.matrix, self.restart)
        w = self._orthogonal(w / torch.linalg.vector_norm(w), count)
        return w / torch.linalg.vector_norm(w)

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Values [m], ascending, and coordinates of the vectors in the basis, columns of [m, m]."""
        off = self.beta[: self.steps - 1]
        found: tuple[np.ndarray, np.ndarray] = np.linalg.eigh(np.diag(self.alpha) + np.diag(off, 1) + np.diag(off, -1))
        return found

    def vector(self, coordinates: np.ndarray) -> Tensor:
        """A Ritz vector [d], of norm 1."""
        return self.basis[: self.steps].T @ torch.from_numpy(coordinates).to(self.basis)


def eigenvalues(
    matrix: Operator,
    k: int = 1,
    *,
    which: Which = "both",
    rtol: float = 1e-2,
    steps: int = 100,
    seed: int = 0,
) -> Measurement:
    """The k largest and the k smallest eigenvalues, with residual bounds.

    Within the error of each value there is an eigenvalue for certain; that it is the largest one is as good as certain
    for a random start vector and a converged value, not proven. Of a multiple eigenvalue one copy is found.

    Args:
        matrix: a `Curvature`.
        k: how many at each end that is asked for.
        which: "largest", "smallest" (most negative), "both", or "magnitude" (k in all).
        rtol: stop as soon as every residual bound is at most this part of the largest absolute eigenvalue.
        steps: products at most; as many vectors as long as the selection are held, and two products per value follow.
        seed: of the random vectors.

    Returns:
        Quantity "eigenvalue" of "largest 1", "largest 2", ..., "smallest 1", ...; the error is the norm of the residual
        A x - theta x, computed anew from the vector. Notes: the share of each block type in the eigenvector's square.

    Raises:
        ValueError: for bad arguments.
        FloatingPointError: for a product that is not finite.
    """
    who, started, before, paid = "eigenvalues", time.perf_counter(), matrix.products, matrix.gradients
    check_count(who, k=k, steps=steps)
    check_rtol(rtol, who)
    if which not in ("largest", "smallest", "both", "magnitude"):
        raise ValueError(f"{who}: which must be 'largest', 'smallest', 'both' or 'magnitude', got {which!r}")
    if steps < k:
        raise ValueError(
            f"{who}: steps={steps} find no more than as many eigenvalues, got k={k}; take about 20 more than k"
        )
    generator = torch.Generator(matrix.device).manual_seed(seed)
    process = Lanczos(matrix, _gaussian(matrix, generator), steps, restart=generator)
    wanted: list[tuple[str, int]] = []
    values, vectors = np.zeros(0), np.zeros((0, 0))
    with matrix.kept():
        while process.step():
            values, vectors = process.ritz()
            wanted = _wanted(values, k, which)
            bounds = process.beta[-1] * np.abs(vectors[-1, [i for _, i in wanted]])
            if process.steps >= min(k + 1, matrix.dim) and bounds.max() <= rtol * np.abs(values).max():
                break
        found = [_eigenvalue(matrix, process, values[i], vectors[:, i], of) for of, i in wanted]
    scale = max(np.abs(values).max(), np.finfo(float).tiny)
    reached = max(e.error or 0.0 for e in found) / scale
    warnings = list(matrix.warnings)
    if reached > rtol:
        warnings.append(
            f"{who}: not converged: after {process.steps} steps a residual is {reached:.2g} of the largest eigenvalue, "
            f"{rtol:g} was asked for; take more steps"
        )
    if process.steps < k:
        warnings.append(f"{who}: the selection has {matrix.dim} elements, and no more eigenvalues; got k={k}")
    settings = {"which": which, "k": k, "steps": process.steps, "rtol": rtol, "seed": seed}
    products = matrix.products - before
    cost = Cost(time.perf_counter() - started, matrix.gradients - paid)
    own = {**matrix.settings(), **settings, "products": products}
    return Measurement(who, found, settings=own, cost=cost, warnings=warnings)


def _wanted(values: np.ndarray, k: int, which: Which) -> list[tuple[str, int]]:
    n = len(values)
    k = min(k, n)
    if which == "magnitude":
        order = np.argsort(-np.abs(values))[:k]
        return [(f"magnitude {rank}", int(i)) for rank, i in enumerate(order, 1)]
    found = [(f"largest {rank}", n - rank) for rank in range(1, k + 1)] if which != "smallest" else []
    return found + ([(f"smallest {rank}", rank - 1) for rank in range(1, k + 1)] if which != "largest" else [])


def _eigenvalue(matrix: Operator, process: Lanczos, value: float, coordinates: np.ndarray, of: str) -> Estimate:
    x = process.vector(coordinates)
    x = x / torch.linalg.vector_norm(x)
    residual = float(torch.linalg.vector_norm(matrix.matvec(x) - float(value) * x, dtype=torch.float64))
    shares: dict[str, float | str] = {}
    for segment, share in zip(matrix.selection.segments, matrix.selection.sums(x.double().square()), strict=True):
        key = f"share {segment.block_type}"
        shares[key] = float(shares.get(key, 0.0)) + float(share)
    return Estimate(
        "eigenvalue",
        "model",
        of,
        float(value),
        residual,
        "residual",
        samples=process.steps,
        elements=matrix.dim,
        notes=shares,
    )


class Density(Measurement):
    """The density of eigenvalues: moments as estimates, and the density itself.

    Attributes:
        nodes, weights: [vectors, steps]; each row is one quadrature, its weights sum up to 1 (unused ones are 0). They
            are in `arrays` too, row by row, so that JSON keeps them.
    """

    nodes: np.ndarray
    weights: np.ndarray

    @staticmethod
    def of(measurement: Measurement) -> "Density":
        """A density that was saved and read again.

        Raises:
            KeyError: that is of something else.
        """
        found = Density(measurement.probe, measurement, settings=measurement.settings, step=measurement.step)
        shape = (-1, int(measurement.settings["steps"]))
        found.nodes, found.weights = (np.reshape(measurement.arrays[name], shape) for name in ("nodes", "weights"))
        return found

    def curve(
        self, points: int | Sequence[float] = 400, sigma: float | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """x, the density at x smoothed by a Gaussian of width `sigma`, and half the width of its 95% interval.

        Args:
            points: how many, over the range of the eigenvalues and 4 sigma beyond, or the points themselves.
            sigma: in units of the eigenvalues; None: a hundredth of their range.
        """
        low, high = self._range()
        width = sigma if sigma is not None else max(high - low, 1e-3 * max(abs(high), abs(low)), 1e-30) / 100
        x = np.linspace(low - 4 * width, high + 4 * width, points) if isinstance(points, int) else np.asarray(points)
        each = np.stack([_smooth(x, n, w, width) for n, w in zip(self.nodes, self.weights, strict=True)])
        return x, each.mean(0), _half_width(each)

    def share(self, low: float, high: float) -> tuple[float, float | None]:
        """Part of the eigenvalues within [low, high], and half the width of its 95% interval (None from one vector).

        The interval is over the start vectors, and wider by what so few steps cannot tell apart: a node stands for all
        eigenvalues around it. Between nodes of little weight an end costs little; at -inf or inf it costs nothing.

        Raises:
            ValueError: low is above high, or one of them is no number.
        """
        if not low <= high:
            raise ValueError(f"share: expected low <= high, got low={low!r}, high={high!r}")
        return _share(self.nodes, self.weights, low, high, self[0].elements)

    def _range(self) -> tuple[float, float]:
        some = self.nodes[self.weights > 0]
        return float(some.min()), float(some.max())


def density(
    matrix: Operator, *, samples: int = 20, steps: int = 50, rtol: float | None = None, seed: int = 0
) -> Density:
    """The density of eigenvalues, by stochastic Lanczos quadrature; its integral is 1.

    Args:
        matrix: a `Curvature`.
        samples: random start vectors, with `rtol` at most.
        steps: products per start vector; so many vectors as long as the selection are held. The resolution within the
            spectrum is about its range over `steps`, at its ends better.
        rtol: stop as soon as the half width of the curve's interval, integrated, is at most this; after ten vectors
            at least.
        seed: of the random vectors.

    Returns:
        Quantities "mean eigenvalue", "root mean square eigenvalue" and, of a Hessian, "share of negative eigenvalues",
        with intervals over the start vectors, that of the share widened by what so few steps cannot tell apart next to
        zero; and `curve`, `share`, `nodes`, `weights`.

    Raises:
        ValueError: for bad arguments.
        FloatingPointError: for a product that is not finite.
    """
    who, started, before, paid = "density", time.perf_counter(), matrix.products, matrix.gradients
    check_count(who, samples=samples, steps=steps)
    check_rtol(rtol, who)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    width = min(steps, matrix.dim)
    nodes, weights = np.zeros((0, width)), np.zeros((0, width))
    reached = np.inf
    with matrix.kept():
        for n in range(1, samples + 1):
            theta, tau = _quadrature(matrix, generator, steps)
            pad = width - len(theta)
            nodes = np.vstack([nodes, np.pad(theta, (0, pad), constant_values=theta[-1])])
            weights = np.vstack([weights, np.pad(tau, (0, pad))])
            if rtol is not None and n >= FEWEST:
                reached = _curve_error(nodes, weights)
                if reached <= rtol:
                    break
    warnings = [*matrix.warnings, *not_reached(who, rtol, reached, len(nodes), "take more samples")]
    products = matrix.products - before
    cost = Cost(time.perf_counter() - started, matrix.gradients - paid)
    settings = {**matrix.settings(), "steps": width, "products": products, "seed": seed, "rtol": rtol}
    arrays = {"nodes": nodes.ravel().tolist(), "weights": weights.ravel().tolist()}
    estimates = _moments(nodes, weights, matrix.dim)
    if matrix.what == "gauss-newton":  # which has no negative eigenvalues
        estimates = estimates[:2]
    found = Density(who, estimates, settings=settings, cost=cost, warnings=warnings, arrays=arrays)
    found.nodes, found.weights = nodes, weights
    return found


def _quadrature(matrix: Operator, generator: torch.Generator, steps: int) -> tuple[np.ndarray, np.ndarray]:
    process = Lanczos(matrix, _gaussian(matrix, generator), steps)
    while process.step():
        pass
    values, vectors = process.ritz()
    return values, vectors[0] ** 2


def _curve_error(nodes: np.ndarray, weights: np.ndarray) -> float:
    so_far = Density("density", ())
    so_far.nodes, so_far.weights = nodes, weights
    x, _, error = so_far.curve()
    assert error is not None
    return float(error.sum() * (x[1] - x[0]))


def _moments(nodes: np.ndarray, weights: np.ndarray, dim: int) -> list[Estimate]:
    def estimate(quantity: str, value: float, error: float | None) -> Estimate:
        return Estimate(quantity, "model", "model", value, error, samples=len(nodes), elements=dim)

    zero = -ROUNDING * np.abs(nodes).max()  # what rounding has left of a zero is not negative
    return [
        estimate("mean eigenvalue", *_interval((weights * nodes).sum(1))),
        estimate("root mean square eigenvalue", *_interval((weights * nodes**2).sum(1), "root")),
        estimate(
            "share of negative eigenvalues", *_share(nodes, weights, -np.inf, float(np.nextafter(zero, -np.inf)), dim)
        ),
    ]


def _interval(each: np.ndarray, of: Literal["mean", "root"] = "mean") -> tuple[float, float | None]:
    draws = Draws(of)
    for one in each:
        draws.add(np.array([one]))
    value, error = draws.interval()
    return float(value[0]), None if error is None else float(error[0])


def _share(nodes: np.ndarray, weights: np.ndarray, low: float, high: float, dim: int) -> tuple[float, float | None]:
    """The weight of the nodes within [low, high], mean over vectors, and half the width of its 95% interval."""
    value, error = _interval((weights * ((nodes >= low) & (nodes <= high))).sum(1))
    if error is None:
        return value, None
    return value, min(error + _coarseness(nodes, weights, low, high, dim), max(value, 1 - value))  # it is from 0 to 1


def _coarseness(nodes: np.ndarray, weights: np.ndarray, low: float, high: float, dim: int) -> float:
    """How far the weight of the nodes within [low, high] may be off, in the mean over vectors.

    A node stands for eigenvalues around it, also some beyond an end: by Chebyshev, Markov and Stieltjes no more than
    its own weight, and only the nodes next to the end. Where the process came to its end, nodes are eigenvalues, and
    rounding alone may put one on the wrong side.
    """
    near = ROUNDING / 2 * np.abs(nodes).max()
    too_much, too_little = np.zeros(len(nodes)), np.zeros(len(nodes))
    for row, (n, w) in enumerate(zip(nodes, weights, strict=True)):
        used = int(np.searchsorted(n, n[-1])) + 1  # after it the last one is repeated
        ended = used < len(n) or len(n) == dim
        n, w, within = n[:used], w[:used], near if ended else np.finfo(float).max  # an open end is farther
        at_low, at_high = (np.pad(np.where(np.abs(n - end) <= within, w, 0.0), 1) for end in (low, high))
        first, last = int(np.searchsorted(n, low, "left")) + 1, int(np.searchsorted(n, high, "right"))
        too_little[row] = at_low[first - 1] + at_high[last + 1]
        if first <= last:
            both = at_low[first], at_high[last]
            too_much[row] = sum(both) if first < last else max(both)
    return float(max(too_much.mean(), too_little.mean()))


def _smooth(x: np.ndarray, nodes: np.ndarray, weights: np.ndarray, sigma: float) -> np.ndarray:
    z = (x[:, None] - nodes[None, :]) / sigma
    smoothed: np.ndarray = np.exp(-z * z / 2) @ weights / (sigma * np.sqrt(2 * np.pi))
    return smoothed


def _half_width(each: np.ndarray) -> np.ndarray | None:
    n = len(each)
    return None if n < 2 else t_quantile(n - 1) * each.std(0, ddof=1) / np.sqrt(n)


def _gaussian(matrix: Operator, generator: torch.Generator) -> Tensor:
    return torch.randn(matrix.dim, generator=generator, device=matrix.device, dtype=matrix.dtype)


__all__ = ["Density", "Lanczos", "Which", "density", "eigenvalues"]
