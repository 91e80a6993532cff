"""Orthogonalization of whole matrices, and the normalization of their rows: what Muon and NorMuon do to momentum.

Newton-Schulz (Jordan et al., Muon, kellerjordan.github.io/posts/muon, 2024), K = 5 steps of one polynomial:

    X_0 = M / max(||M||_F, 1e-7)
    X_k = a X + (b A + c A^2) X    for A = X X^T, X = X_{k-1},    (a, b, c) = (3.4445, -4.7750, 2.0315)

Polar Express (Amsel et al., arXiv 2505.16932), 5 steps, each of its own polynomial, published with a safety of 1.02:

    X_0 = M / (1.02 ||M||_F + 1e-6)
    X_k = a_k X + (b_k A + c_k A^2) X

Both are odd polynomials of the singular values: M = U S V^T gives U phi(S / ||M||_F) V^T. Values above 1.5e-3 ||M||_F
go into [0.68, 1.21] by Newton-Schulz, into [0.85, 1.15] by Polar Express; those below come out smaller, zero as zero.

NorMuon (Li et al., arXiv 2510.05491), of an orthogonalized matrix O:

    v <- b2 v + (1-b2) mean over columns of O^2
    O' = O / (sqrt(v) + 1e-10),    u = O' ||O||_F / ||O'||_F

| symbol | name | shape |
|---|---|---|
| M | m | [n, rows, columns] or [rows, columns]; rows are outputs |
| O, u | o, the result | the same |
| v | v | [n, rows] or [rows] |
| b2 | beta2 | |

Departs: products are taken on the smaller side, X^T X and X (b A + c A^2) where there are more rows than columns, not
of a transpose. Where the norm is not finite it is worked out in units of the largest element, whose squares are.
Products are in fp32 on a CPU, where published code takes bf16 too. What bf16 costs against float64 (64 x 256 to 768 x
3072, flat and steep spectra): singular values move by up to 0.023 and leave the bands by at most 0.001; the result
moves by 1 to 4% of its norm. fp32: 6e-6 and 3e-6. So bf16 is the default only where it makes products fast, on CUDA.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16"]
Polynomial = tuple[float, float, float]
"""a, b, c of the odd polynomial a x + b x^3 + c x^5."""

NEWTON_SCHULZ: Polynomial = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
BATCHED = 256
"""The largest smaller side at which a CPU takes the matrices of a batch together: beyond, one fills its cores."""


def newton_schulz(
    m: Tensor, steps: int = 5, precision: Precision | None = None, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """phi of the singular values of every matrix, by Newton-Schulz: of m's shape and dtype.

    Matrices of a batch do not see each other: what is NaN or infinite in one makes all of it NaN, and no other. Zeros
    give zeros.

    Args:
        m: n matrices [n, rows, columns], or one [rows, columns]; no side is 0.
        steps: how often the polynomial is applied.
        precision: of the products, "fp32" or "bf16"; None is bf16 on CUDA and fp32 elsewhere. fp64 stays fp64.
        scale: a factor on the result.
        out: where it is written, m itself if you like; None for a new tensor.

    Raises:
        ValueError: m has another number of dimensions, or `precision` is another word.
    """
    return _iterated(
        m, lambda norm, unit: torch.maximum(norm, 1e-7 * unit), (NEWTON_SCHULZ,) * steps, precision, scale, out
    )


def polar_express(
    m: Tensor, precision: Precision | None = None, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """phi of the singular values of every matrix, by Polar Express: as `newton_schulz`, which has the arguments."""
    return _iterated(m, lambda norm, unit: 1.02 * norm + 1e-6 * unit, POLAR_EXPRESS, precision, scale, out)


def normalize_rows(o: Tensor, v: Tensor, beta2: float | Tensor = 0.95, eps: float = 1e-10) -> tuple[Tensor, Tensor]:
    """NorMuon's normalization: rows over the root of the running mean of their squares, the whole at o's norm.

    Args:
        o: n orthogonalized matrices [n, rows, columns], or one [rows, columns].
        v: the running means, [n, rows] or [rows], of o's dtype; zeros before the first step.
        beta2: their decay rate, in [0, 1).
        eps: added to their root.

    Returns:
        u and the new v, both new tensors. Zeros stay zeros.
    """
    v = torch.lerp(v, o.square().mean(-1), 1 - beta2)
    u = o / (v.sqrt() + eps).unsqueeze(-1)
    return u * (_norm(o) / _norm(u).clamp(min=eps)), v


Denominator = Callable[[Tensor, Tensor], Tensor]
"""Of a norm, made of it and what 1 is in its unit."""


def _scaled(m: Tensor, denominator: Denominator, dtype: torch.dtype) -> Tensor:
    """M over a denominator."""
    X = m if m.dtype == torch.float64 else m.float()
    if X.device.type != "cpu":  # where the host would wait for what it asks
        return _scaled_twice(X, denominator).to(dtype)
    norm = _norm(X)
    found = torch.mul(X, denominator(norm, torch.ones_like(norm)).reciprocal(), out=torch.empty_like(X, dtype=dtype))
    for i in torch.nonzero(~norm.view(-1).isfinite()).view(-1).tolist():
        where = i if X.dim() == 3 else ...
        found[where] = _scaled_twice(X[where], denominator)
    return found


def _scaled_twice(X: Tensor, denominator: Denominator) -> Tensor:
    """The same in units of the largest element, so that squares of finite elements are finite."""
    s = torch.linalg.vector_norm(X, torch.inf, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    X = X / s
    return X.div_(denominator(_norm(X), 1 / s))


def _norm(X: Tensor) -> Tensor:
    # Of the norms of rows: over millions of elements at once, fp32 on a CPU is off by 1e-5.
    rows = torch.linalg.vector_norm(X, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)


def _iterated(
    m: Tensor,
    denominator: Denominator,
    polynomials: Sequence[Polynomial],
    precision: Precision | None,
    scale: float,
    out: Tensor | None,
) -> Tensor:
    if m.dim() not in (2, 3):
        raise ValueError(f"expected matrices [n, rows, columns] or one [rows, columns], got shape {tuple(m.shape)}")
    if precision not in (None, "fp32", "bf16"):
        raise ValueError(f"precision: got {precision!r}; allowed are 'fp32', 'bf16' and None, which takes what suits m")
    own = torch.float64 if m.dtype == torch.float64 else torch.float32
    if own == torch.float32 and (precision or ("bf16" if m.is_cuda else "fp32")) == "bf16":
        own = torch.bfloat16
    X = _scaled(m, denominator, own)
    if X.dim() == 3 and X.device.type == "cpu" and min(X.shape[1:]) > BATCHED:
        for one in X:
            one.copy_(reduce(_step, polynomials, one))
    else:
        for polynomial in polynomials:  # by name, so that only the last X is held
            X = _step(X, polynomial)
    return torch.mul(X, scale, out=torch.empty_like(m) if out is None else out)


def _step(X: Tensor, polynomial: Polynomial) -> Tensor:
    a, b, c = polynomial
    addmm = torch.addmm if X.dim() == 2 else torch.baddbmm
    wide = X.shape[-2] <= X.shape[-1]
    A = X @ X.mT if wide else X.mT @ X
    A = addmm(A, A, A, beta=b, alpha=c)
    return addmm(X, A, X, beta=a) if wide else addmm(X, X, A, beta=a)
