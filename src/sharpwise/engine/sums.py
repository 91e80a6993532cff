"""What is read of the gradients before anything moves: block sums, the global norm, whether all is finite.

One pass over the rows serves all three, and one collective per group of processes carries it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine import kernels
from sharpwise.engine.items import SMALL, Item
from sharpwise.engine.mesh import all_reduce, local
from sharpwise.engine.plan import Entry

Groups = tuple[Any, ...]


@dataclass
class Total:
    """Parts of a sum of squares, as vectors: fp64 sums, fp32 norms, and small fp32 tensors as they are."""

    squares: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    small: list[Tensor] = field(default_factory=list)

    def sum(self) -> Tensor:
        """All of them in one number, fp64."""
        norms = self.norms + (kernels.quick_norms(torch.cat(self.small)) if self.small else [])
        squares = self.squares + ([torch.cat(norms).double().square_()] if norms else [])
        return torch.cat(squares).sum()


class Sums:
    """Sums of g*g, by the compiled kernel where there is one.

    Args:
        compiler: sums up matrices, if there is one.
        total: whether the sum over everything is wanted too.
        exact: in fp64 throughout, eager; else fp32 squares are added in fp32 before the few sums left in fp64.
    """

    def __init__(self, compiler: kernels.Compiler | None, total: bool, exact: bool) -> None:
        self.compiler = compiler
        self.wants_total = total
        self.exact = exact

    def of(
        self, items: Sequence[Item], grads: Sequence[Tensor], fused: Sequence[Entry]
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Sum of g*g per block of every item (None without blocks), and over everything (None if not wanted), fp64.

        Args:
            items, grads: what is moved item by item; `fused`: parameters that torch's kernel moves.
        """
        sums: list[Tensor | None] = []
        totals: dict[Groups, Total] = {}
        for item, g in zip(items, grads, strict=True):
            blocks: Tensor | None = None
            groups = item.layout.shard.groups
            if item.layout.rule.has_blocks:
                rows = self._rows(g, item.layout.dim).reshape(-1)
                blocks = item.layout.gather(rows)
                if self.wants_total:
                    totals.setdefault(groups, Total()).squares.append(rows)
            elif self.wants_total:
                self._everything(g, totals.setdefault(groups, Total()))
            sums.append(blocks)
        for entry in fused if self.wants_total else ():
            grad: Tensor = entry.param.grad  # type: ignore[assignment]
            self._everything(local(grad), totals.setdefault(entry.shard.groups, Total()))
        total = _reduce(items, sums, {groups: found.sum() for groups, found in totals.items()})
        if total is not None and not self.exact and total.device.type == "cpu" and not math.isfinite(total):
            return Sums(None, True, True).of(items, grads, fused)  # fp32 squares overflow at 1e19: ask again in fp64
        return sums, total

    def _rows(self, g: Tensor, dim: int) -> Tensor:
        if self.compiler is not None and g.dim() == 2 and g.numel() >= kernels.COMPILE_EACH and min(g.shape) > 1:
            return self.compiler.row_squares(g, dim)
        if self.exact or g.dtype != torch.float32:
            return kernels.row_squares(g, dim)
        return kernels.quick_row_squares(g, dim)

    def _everything(self, g: Tensor, total: Total) -> None:
        flat = g.contiguous().view(-1)
        compiles = self.compiler is not None and g.numel() >= kernels.COMPILE_EACH
        if g.dtype == torch.float32 and not self.exact and not compiles:
            if flat.numel() <= SMALL:
                total.small.append(flat)
            else:
                total.norms += kernels.quick_norms(flat)
            return
        width = math.gcd(flat.numel(), 3 * 4096)
        if width >= 256:
            total.squares.append(self._rows(flat.view(-1, width), 1))
        else:
            total.squares += [kernels.row_squares(part.view(1, -1), 1) for part in flat.split(kernels.CHUNK)]


def _reduce(items: Sequence[Item], sums: list[Tensor | None], totals: dict[Groups, Tensor]) -> Tensor | None:
    """Complete the sums over the processes that hold parts, in place; the total over everything."""
    keys = [item.layout.shard.groups for item, s in zip(items, sums, strict=True) if s is not None] + list(totals)
    for groups in filter(None, dict.fromkeys(keys)):  # by first appearance: the order is the same in every process
        mine = [i for i, s in enumerate(sums) if s is not None and items[i].layout.shard.groups == groups]
        parts: list[Tensor] = [s for i in mine if (s := sums[i]) is not None]
        parts += [totals[groups].view(1)] if groups in totals else []
        flat = torch.cat(parts)
        all_reduce(flat, groups)
        pieces = flat.split([len(part) for part in parts])
        for i, piece in zip(mine, pieces, strict=False):
            sums[i] = piece
        if groups in totals:
            totals[groups] = pieces[-1][0]
    return torch.stack(list(totals.values())).sum() if totals else None
