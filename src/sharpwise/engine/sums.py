"""What is read of the gradients before anything moves: block sums, the global norm, whether all is finite.

One pass over the rows serves all three, and one collective per group of processes carries it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine import kernels
from sharpwise.engine.items import Item
from sharpwise.engine.mesh import all_reduce, local
from sharpwise.engine.plan import Entry

Groups = tuple[Any, ...]


class Sums:
    """Sums of g*g, by the compiled kernel where there is one.

    Args:
        compiler: None for eager, exact fp64 sums.
        total: whether the sum over everything is wanted too.
    """

    def __init__(self, compiler: kernels.Compiler | None, total: bool) -> None:
        self.compiler = compiler
        self.wants_total = total

    def of(
        self, items: Sequence[Item], grads: Sequence[Tensor], fused: Sequence[Entry]
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Sum of g*g per block of every item (None without blocks), and over everything (None if not wanted), fp64.

        Args:
            items, grads: what is moved item by item; `fused`: parameters that torch's kernel moves.
        """
        sums: list[Tensor | None] = []
        totals: dict[Groups, list[Tensor]] = {}
        for item, g in zip(items, grads, strict=True):
            rows: Tensor | None = None
            blocks: Tensor | None = None
            if item.layout.rule.has_blocks:
                rows = self._rows(g, item.layout.dim)
                blocks = item.layout.gather(rows if rows.dim() == 1 else rows.reshape(-1))
            elif self.wants_total:
                rows = self._everything(g)
            sums.append(blocks)
            if self.wants_total and rows is not None:
                totals.setdefault(item.layout.shard.groups, []).append(rows.sum())
        for entry in fused if self.wants_total else ():
            squares = self._everything(local(entry.param.grad))  # type: ignore[arg-type]
            totals.setdefault(entry.shard.groups, []).append(squares.sum())
        total = _reduce(items, sums, {groups: torch.stack(parts).sum() for groups, parts in totals.items()})
        if total is not None and self.compiler is not None and total.device.type == "cpu" and not math.isfinite(total):
            return Sums(None, True).of(items, grads, fused)  # fp32 squares overflow at 1e19: ask again in fp64
        return sums, total

    def _rows(self, g: Tensor, dim: int) -> Tensor:
        if self.compiler is not None and g.dim() == 2 and g.numel() >= kernels.COMPILE_EACH and min(g.shape) > 1:
            return self.compiler.row_squares(g, dim)
        return kernels.row_squares(g, dim)

    def _everything(self, g: Tensor) -> Tensor:
        flat = g.contiguous().view(-1)
        width = math.gcd(flat.numel(), 3 * 4096)
        if width >= 256:
            return self._rows(flat.view(-1, width), 1)
        parts = [kernels.row_squares(part.view(1, -1), 1).sum() for part in flat.split(kernels.CHUNK)]
        return torch.stack(parts) if parts else flat.new_zeros((), dtype=torch.float64)


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
