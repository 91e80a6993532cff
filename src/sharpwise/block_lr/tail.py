"""The tail of a spectrum: PL_Alpha_Hill of the eigenvalues of W^T W, as in LLR (arXiv 2605.22297).

    lambda_1 <= ... <= lambda_n    eigenvalues of W^T W that need not be zero, n = min(rows, columns)
    alpha = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k}),    k = floor(n/2)

A small alpha is a heavy tail. At initialization alpha is nothing but the shape of the matrix: 2.12 where it is square,
3.45 at an aspect of 4. So there is also that of a random matrix of the same shape: of the n quantiles of Marchenko and
Pastur's law at (i - 1/2)/n, nothing is drawn. (A single Gaussian matrix scatters around it by 2.8 (alpha - 1)/n.)

| symbol | name |
|---|---|
| W | matrix |
| lambda | eigenvalues |

Departs: the eigenvalues come from the smaller Gram matrix instead of a singular value decomposition, in fp64 up to a
side of 2048 (in fp32 beyond, where alpha is right to 4e-7). The released code also counts ln(lambda_m / lambda_m) = 0
of its threshold, m = floor(n/2) + 1, in numerator and sum; `convention="published"` does the same.
"""

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Convention = Literal["hill", "published"]
EXACT = 2048
"""The largest side of a Gram matrix that is worked out in fp64."""
CHUNK = 2**22
"""Elements of a matrix that are taken to fp64 at a time, so that little memory is needed beside it."""


def gram_eigenvalues(matrix: Tensor) -> Tensor:
    """The min(m, n) largest eigenvalues of W^T W of a matrix [m, n], ascending: fp64, on the CPU.

    They are squares: of a matrix with elements beyond 1e154 they are infinite, and `alpha_hill` has none for it.

    Raises:
        ValueError: the matrix is not one, is empty or not finite.
    """
    if matrix.dim() != 2 or not matrix.numel():
        raise ValueError(f"gram_eigenvalues: expected a matrix, got shape {tuple(matrix.shape)}")
    spec = Spectrum.of(matrix)
    if spec is None:
        raise ValueError("gram_eigenvalues: some elements of the matrix are not finite")
    return spec.eigenvalues


class Spectrum:
    """Eigenvalues of W^T W, in units of the square of its largest element: squares of large or tiny ones have none."""

    def __init__(self, scaled: Tensor, scale: float, squares: float) -> None:
        self.scaled, self.scale, self.squares = scaled, scale, squares

    @staticmethod
    def of(matrix: Tensor) -> "Spectrum | None":
        """None of a matrix that is not finite."""
        W = matrix.detach().cpu() if matrix.device.type == "mps" else matrix.detach()  # which has no fp64
        scale = float(W.abs().max())
        if not math.isfinite(scale):
            return None
        W = W if W.shape[0] <= W.shape[1] else W.T
        n = W.shape[0]
        if scale == 0:
            return Spectrum(torch.zeros(n, dtype=torch.float64, device="cpu"), 0.0, 0.0)
        dtype = torch.float64 if n <= EXACT else torch.float32
        gram = torch.zeros(n, n, dtype=dtype, device=W.device)
        for part in W.split(max(CHUNK // n, 1), dim=1):
            # In fp64 first: 1/scale may be beyond fp32, and so may the elements of a wider dtype.
            part = (part.double() / scale).to(dtype)
            gram.addmm_(part, part.T)
        values = torch.linalg.eigvalsh(gram).double().cpu().clamp_(min=0)
        # Rounding leaves something in the place of a zero.
        floor = n * torch.finfo(dtype).eps * float(values[-1])
        return Spectrum(torch.where(values > floor, values, 0.0), scale, float(gram.diagonal().double().sum()))

    @property
    def eigenvalues(self) -> Tensor:
        """Ascending, fp64 [n]."""
        return self.scaled * self.scale * self.scale

    @property
    def norm(self) -> float:
        """The largest singular value."""
        return math.sqrt(float(self.scaled[-1])) * self.scale

    @property
    def frobenius(self) -> float:
        """The square root of the sum of squares of all elements."""
        return math.sqrt(self.squares) * self.scale

    @property
    def stable_rank(self) -> float:
        """From 1 to n, 0 of a zero matrix."""
        return self.squares / float(self.scaled[-1]) if self.scale else 0.0


def alpha_hill(eigenvalues: Tensor, convention: Convention = "hill") -> float | None:
    """PL_Alpha_Hill of eigenvalues >= 0, ascending [n].

    Args:
        eigenvalues: >= 0, ascending [n].
        convention: "hill", as above, or "published", which counts the threshold among those above it.

    Returns:
        alpha > 1; infinite where those of the upper half are all alike; None where it is not defined: for n < 2, values
        that are not finite, and lambda_{n-k} = 0.
    """
    values = eigenvalues.double()
    n = len(values)
    k = n // 2
    # One threshold below the k largest; the published one is counted among those above it.
    threshold, above = (n - k - 1, n - k) if convention == "hill" else (n // 2, n // 2)
    if k < 1 or not bool(values.isfinite().all()) or float(values[threshold]) <= 0:
        return None
    total = float((values[above:] / values[threshold]).log().sum())
    count = n - above
    # What rounding of eigenvalues that are alike can add up to.
    return math.inf if total <= 8 * n * count * 2.0**-52 else 1 + count / total


@lru_cache(maxsize=1024)
def alpha_of_random(rows: int, columns: int, convention: Convention = "hill") -> float:
    """What `alpha_hill` gives, on average, for a matrix of independent entries of one variance, to about 0.01.

    Args:
        rows, columns: sides of the matrix, 2 or more.
        convention: as of `alpha_hill`.

    Raises:
        ValueError: a side below 2 has no alpha.
    """
    if min(rows, columns) < 2:
        raise ValueError(f"a matrix of {rows} x {columns} has no alpha")
    alpha = alpha_hill(torch.from_numpy(marchenko_pastur(rows, columns)), convention)
    assert alpha is not None
    return alpha


def marchenko_pastur(rows: int, columns: int) -> np.ndarray:
    """The quantiles (i - 1/2)/n, i = 1..n, n = min(rows, columns), of the limiting law of the eigenvalues of W^T W/max,
    entries of variance 1: fp64 [n], ascending."""
    n, y = min(rows, columns), min(rows, columns) / max(rows, columns)
    # lambda = 1 + y - 2 sqrt(y) cos(theta) has the density sin(theta)^2 / lambda in theta: no edge is singular.
    points = 8 * n + 4096
    theta = (np.arange(points) + 0.5) * np.pi / points
    values = 1 + y - 2 * np.sqrt(y) * np.cos(theta)
    density = np.sin(theta) ** 2 / values
    below = np.cumsum(density) - density / 2
    return np.interp((np.arange(n) + 0.5) / n, below / density.sum(), values)
