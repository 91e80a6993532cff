"""LLR: layerwise learning rates by the tails of the weight spectra (arXiv 2605.22297), float64.

    lambda_1 <= ... <= lambda_n                 eigenvalues of W^T W, n = min(rows, columns)
    alpha = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k}),   k = floor(n/2)                       "hill"
    alpha = 1 + N / (sum_{j>=i} ln lambda_j - N ln lambda_i),  i = int(n/2) from 0, N = n - i              "published"
    m = s1 + (s2 - s1) (alpha - min alpha) / (max alpha - min alpha)            over all matrices

Embeddings (positions too) and the head have s2, vectors and matrices without an alpha 1. Shape-corrected: alpha less
the alpha of the n quantiles at (i - 1/2)/n of Marchenko and Pastur's law for the shape of the matrix. Geometric: m
over the geometric mean of the m of all that have one (segments count alike). By type: each matrix has the mean alpha of
those of its type.
"""

import numpy as np

from reference.ablations import ROLES_OF_TYPE
from reference.measured_lr import matrix_of

TYPE_OF_ROLE = {role: kind for kind, roles in ROLES_OF_TYPE.items() for role in roles}


def hill(eigenvalues, convention="hill"):
    """alpha of eigenvalues, ascending; NaN where it is not defined."""
    n = len(eigenvalues)
    if convention == "hill":
        k = n // 2
        one_based = np.concatenate(([np.nan], eigenvalues))
        threshold = one_based[n - k]
        total = sum(np.log(one_based[n - i + 1] / threshold) for i in range(1, k + 1)) if threshold > 0 else 0.0
    else:
        i = int(n / 2)
        k = n - i
        total = np.sum(np.log(eigenvalues[i:])) - k * np.log(eigenvalues[i]) if eigenvalues[i] > 0 else 0.0
    return 1 + k / total if total > 1e-12 * n else np.nan


def alpha(matrix, convention="hill"):
    """alpha of a matrix, by its singular values; those that rounding leaves of zeros count as zeros."""
    s = np.sort(np.linalg.svd(matrix, compute_uv=False))
    return hill(np.where(s > s[-1] * 1e-7, s, 0.0) ** 2, convention)


def quantiles_of_random(rows, columns):
    """The quantiles (i - 1/2)/n of Marchenko and Pastur's law, of ratio y = n/max(rows, columns).

    density sqrt((b - x)(x - a)) / (2 pi y x) on [a, b], a, b = (1 -+ sqrt y)^2, with x = a + (b - a) sin^2 u.
    """
    n, y = min(rows, columns), min(rows, columns) / max(rows, columns)
    a, b = (1 - np.sqrt(y)) ** 2, (1 + np.sqrt(y)) ** 2
    edges = np.linspace(0.0, np.pi / 2, 40001)
    u = (edges[1:] + edges[:-1]) / 2
    x = a + (b - a) * np.sin(u) ** 2
    mass = np.sqrt((b - x) * (x - a)) / (2 * np.pi * y * x) * 2 * (b - a) * np.sin(u) * np.cos(u)
    below = np.concatenate(([0.0], np.cumsum(mass)))
    at = np.interp((np.arange(n) + 0.5) / n, below / below[-1], edges)
    return a + (b - a) * np.sin(at) ** 2


class HeavyTail:
    """For `measured_lr.Follows`. What is rounded to fp32 shows more in alpha - min alpha, which cancel."""

    tolerance = 1e-5

    def __init__(
        self, pieces, *, low=1.0, high=5.0, shape_corrected=False, normalize="none", by="matrix", convention="hill",
        least=50,
    ):  # fmt: skip
        self.parts = [(name, piece) for name, own in pieces.items() for piece in own]
        self.low, self.high, self.corrected, self.normalize = low, high, shape_corrected, normalize
        self.by, self.convention, self.least = by, convention, least
        self.alpha = None

    def look(self, view):
        """The alphas of all pieces."""
        self.alpha = np.array([self.of(piece, view.p[name]) for name, piece in self.parts])

    def of(self, piece, weight):
        """alpha of a piece; NaN where it has none."""
        if weight.ndim < 2 or piece.role in ("tok_emb", "pos_emb", "head", "norm"):
            return np.nan
        matrix = matrix_of(piece, weight)
        if min(matrix.shape) < self.least:
            return np.nan
        found = alpha(matrix, self.convention)
        return found - hill(quantiles_of_random(*matrix.shape), self.convention) if self.corrected else found

    def multipliers(self):
        """One per piece."""
        if self.alpha is None or np.isnan(self.alpha).all():
            return np.ones(len(self.parts))
        values = self.alpha.copy()
        if self.by == "type":
            kinds = np.array([TYPE_OF_ROLE[piece.role] for _, piece in self.parts])
            for kind in set(kinds):
                own = (kinds == kind) & ~np.isnan(self.alpha)
                values[own] = self.alpha[own].mean() if own.any() else np.nan
        least, most = np.nanmin(values), np.nanmax(values)
        m = self.low + (self.high - self.low) * ((values - least) / (most - least) if most > least else 0 * values)
        top = [piece.role in ("tok_emb", "pos_emb", "head") and not piece.bias for _, piece in self.parts]
        m[top] = self.high
        if self.normalize == "geometric":
            m = m / np.exp(np.nanmean(np.log(m)))
        return np.where(np.isnan(m), 1.0, m)
