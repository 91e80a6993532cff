"""Products of matrices with thin ones: by torch, and on the CPU by our own loops.

BLAS takes twice as long for them: it copies the matrix into the order that large products want.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sharpwise.engine.backends.loops import at, empty, library, text, threads_for


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
        if not (_taken(m) and x.dtype == m.dtype and x.is_contiguous()):
            return super().fill(x, a, b, m, beta)
        inner, columns = b.shape[1:]
        panels = F.pad(b, (0, -columns % self._wide)).unflatten(-1, (-1, self._wide)).transpose(1, 2).contiguous()
        sums, threads = empty(n * rows, torch.float64).view(n, rows), threads_for(m[0].numel())
        scratch = [empty(0 if by_row else threads * columns, torch.float64) for _ in range(2)]
        numbers = ctypes.c_int64(inner), ctypes.c_float(beta), int(by_row), threads
        for own, *rest in zip(m, a.contiguous(), panels, x, sums, strict=True):
            self._library.filled(*_told(own), *map(at, (*rest, *scratch)), *numbers)
        return sums

    def _times(self, side: str, m: Tensor, thin: Tensor) -> Tensor:
        """m thin, or thin^T m, of matrices whose rows lie."""
        n, rows, columns = m.shape
        width = -(-thin.shape[2] // self._wide) * self._wide
        padded = F.pad(thin, (0, width - thin.shape[2])).contiguous()
        shape = (n, rows, width) if side == "right" else (n, width, columns)
        out = empty(math.prod(shape), m.dtype).view(shape)
        for own, *thin_ones in zip(m, padded, out, strict=True):
            numbers = ctypes.c_int64(width), threads_for(own.numel())
            self._library[side](*_told(own), *map(at, thin_ones), *numbers)
        return out[:, :, : thin.shape[2]] if side == "right" else out[:, : thin.shape[2]]


def _rows_lie(m: Tensor) -> bool:
    """Whether the numbers of a row are neighbours: else those of a column are."""
    return m.stride(2) == 1 or m.shape[2] == 1


def _taken(m: Tensor) -> bool:
    return m.device.type == "cpu" and m.dtype == torch.float32 and bool(m.numel()) and 1 in (m.stride(1), m.stride(2))


def _told(m: Tensor) -> tuple[Any, ...]:
    """A matrix whose rows lie: its address, shape, and how far its rows are apart."""
    return at(m), *map(ctypes.c_int64, (*m.shape, m.stride(0)))
