"""Products of matrices with thin ones: by torch, and on the CPU by our own loops.

BLAS takes twice as long for them: it copies the matrix into the order that large products want.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.backends.loops import at, empty, library, text, threads_for

_FOUR, _FIVE = ctypes.c_int64 * 4, ctypes.c_int64 * 5


class Products:
    """By torch, of [n, ...] matrices each; one alone is no batch, which is slower."""

    def right(self, m: Tensor, thin: Tensor) -> Tensor:
        """m thin: [n, rows, columns] and [n, columns, r] to [n, rows, r]."""
        return torch.mm(m[0], thin[0])[None] if len(m) == 1 else m @ thin

    def left(self, thin: Tensor, m: Tensor) -> Tensor:
        """thin^T m: [n, rows, r] and [n, rows, columns] to [n, r, columns]."""
        return self.right(m.mT, thin).mT

    def fill(self, x: Tensor, a: Tensor, b: Tensor, m: Tensor, beta: Any) -> Tensor | None:
        """x = a b + beta m; [n, rows, r], [n, r, columns], of the type of x, and m of any.

        Returns:
            Sums of x*x over the columns, fp64 [n, rows], where they are had without another read; else None.
        """
        if isinstance(beta, Tensor):
            torch.matmul(a, b, out=x)
            x.add_(m.to(x.dtype) * beta)
            return None
        for own, *given in zip(x, m, a, b, strict=True):
            torch.addmm(given[0].to(x.dtype), *given[1:], beta=beta, out=own)
        return None


class OwnProducts(Products):
    """By our loops where they take a matrix. Raises whatever building the library raises."""

    def __init__(self) -> None:
        # A product and its sum may be rounded once here: no rule is printed, whose roundings are to be torch's.
        self.source = text("sums") + text("products")
        self._library = library(self.source, "-ffp-contract=fast")
        self._wide = int(self._library.wide_of())

    def right(self, m: Tensor, thin: Tensor) -> Tensor:
        if not _taken(m):
            return super().right(m, thin)
        return self._times("right", m, thin) if _rows_lie(m) else self._times("left", m.mT, thin).mT

    def left(self, thin: Tensor, m: Tensor) -> Tensor:
        return self.right(m.mT, thin).mT

    def fill(self, x: Tensor, a: Tensor, b: Tensor, m: Tensor, beta: Any) -> Tensor | None:
        by_row, n, rows = _rows_lie(m), *m.shape[:2]
        if not by_row:
            x, a, b, m = x.mT, b.mT, a.mT, m.mT
        if not (_taken(m) and x.dtype == m.dtype and _rows_lie(x)):
            return super().fill(x, a, b, m, beta)
        sums, threads = empty(n * rows, torch.float64).view(n, rows), threads_for(m[0].numel())
        scratch = [empty(0 if by_row else threads * m.shape[2], torch.float64) for _ in range(2)]
        numbers = ctypes.c_int64(x.stride(1)), ctypes.c_float(beta), int(by_row), threads
        a, b = a.to(m.dtype).contiguous(), b.to(m.dtype)
        packed = empty(b.shape[1] * self._up(b.shape[2]), m.dtype)
        for i in range(n):
            given = (packed, a[i], x[i], sums[i], *scratch)
            self._library.filled(_lying(m[i]), _thin(b[i]), *map(at, given), *numbers)
        return sums

    def _times(self, side: str, m: Tensor, thin: Tensor) -> Tensor:
        """m thin, or thin^T m, of matrices whose rows lie."""
        n, rows, columns = m.shape
        thin, own, width = thin.to(m.dtype), thin.shape[2], self._up(thin.shape[2])
        shape = (n, rows, width) if side == "right" else (n, width, columns)
        out, packed = empty(math.prod(shape), m.dtype).view(shape), empty(thin.shape[1] * width, m.dtype)
        product = getattr(self._library, side)
        for i in range(n):
            product(_lying(m[i]), _thin(thin[i]), at(packed), at(out[i]), threads_for(rows * columns))
        return out[:, :, :own] if side == "right" else out[:, :own]

    def _up(self, width: int) -> int:
        """A width, filled up."""
        return -(-width // self._wide) * self._wide


def _rows_lie(m: Tensor) -> bool:
    """Whether the numbers of a row are neighbours: else those of a column are."""
    return m.stride(2) == 1 or m.shape[2] == 1


def _taken(m: Tensor) -> bool:
    return m.device.type == "cpu" and m.dtype == torch.float32 and bool(m.numel()) and 1 in (m.stride(1), m.stride(2))


def _lying(m: Tensor) -> Any:
    """A matrix whose rows lie, as the library takes it."""
    return _FOUR(m.data_ptr(), *m.shape, m.stride(0))


def _thin(thin: Tensor) -> Any:
    """A thin one, as it takes that."""
    return _FIVE(thin.data_ptr(), *thin.shape, *thin.stride())
