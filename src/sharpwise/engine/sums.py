"""What is read of the gradients before anything moves: block sums, the global norm, whether all is finite.

One pass over the rows serves all three, and one collective carries them, and what rules ask for in their first round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sharpwise.engine import kernels, loops
from sharpwise.engine.items import SMALL, Item
from sharpwise.engine.mesh import Bucket, Shard, Share, Team, local
from sharpwise.engine.plan import Entry


@dataclass
class Total:
    """Parts of a sum of squares, as vectors: fp64 sums, fp32 norms, and small fp32 tensors as they are.

    All of them come from tensors that are cut as `shard` is.
    """

    shard: Shard
    squares: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    small: list[Tensor] = field(default_factory=list)

    def sum(self) -> Tensor:
        """All of them in one number, fp64."""
        norms = self.norms + (kernels.quick_norms(torch.cat(self.small)) if self.small else [])
        squares = self.squares + ([torch.cat(norms).double().square_()] if norms else [])
        return torch.cat(squares).sum()


class Wanted(NamedTuple):
    """A matrix whose g*g are summed up over a dimension: for a total, for the blocks of an item, or both."""

    g: Tensor
    dim: int
    total: Total | None
    item: Item | None


class Sums:
    """Sums of g*g, by our own loop where there is one.

    Args:
        compiler: builds it, if there is one.
        total: whether the sum over everything is wanted too.
        exact: in fp64 throughout; else fp32 squares are added in fp32 before the few sums left in fp64.
    """

    def __init__(self, team: Team, compiler: kernels.Compiler | None, total: bool, exact: bool) -> None:
        self.team = team
        self.compiler = compiler
        self.wants_total = total
        self.exact = exact

    def of(
        self, items: Sequence[Item], grads: Sequence[Tensor], fused: Sequence[Entry], bucket: Bucket
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Sum of g*g per block of every item (None without blocks), and over everything (None if not wanted), fp64.

        Args:
            items, grads: what is moved item by item; `fused`: parameters that torch's kernel moves.
            bucket: what else is to be summed up over the processes; all is reduced together.
        """
        totals: dict[tuple[int, ...], Total] = {}
        wanted: list[Wanted] = []
        for item, g in zip(items, grads, strict=True):
            own = _of(totals, item.layout.shard) if self.wants_total else None
            if item.layout.rule.has_blocks:
                wanted.append(Wanted(g, item.layout.dim, own, item))
            elif own is not None:
                wanted += self._everything(g, own)
        for entry in fused if self.wants_total else ():
            grad: Tensor = entry.param.grad  # type: ignore[assignment]
            wanted += self._everything(local(grad), _of(totals, entry.shard))
        sums: dict[int, Share] = {}
        for one, squares in zip(wanted, self._squares(wanted), strict=True):
            if one.total is not None:
                one.total.squares.append(squares)
            if one.item is not None:
                layout = one.item.layout
                sums[id(one.item)] = bucket.add(layout.gather(squares), layout.shard)
        shares = [bucket.add(found.sum().view(1), found.shard) for found in totals.values()]
        bucket.reduce()
        total = torch.cat([share.values for share in shares]).sum() if shares else None
        if total is not None and not self.exact and total.device.type == "cpu" and not math.isfinite(total):
            # fp32 squares overflow at 1e19: ask again in fp64.
            return Sums(self.team, None, True, True).of(items, grads, fused, Bucket(self.team))
        return [sums[id(item)].values if id(item) in sums else None for item in items], total

    def _squares(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """Sums of g*g over a dimension of matrices, as vectors."""
        large = [i for i, one in enumerate(wanted) if self.compiler is not None and _is_ours(one.g)]
        loop = self.compiler.squares() if self.compiler is not None and large else None
        found: dict[int, Tensor] = {}
        if loop is not None:
            sums = loop([wanted[i].g for i in large], [wanted[i].dim for i in large], self.exact)
            found = dict(zip(large, sums, strict=True))
        return [found[i] if i in found else self._eager(g, dim).reshape(-1) for i, (g, dim, *_) in enumerate(wanted)]

    def _eager(self, g: Tensor, dim: int) -> Tensor:
        if self.exact or g.dtype == torch.float64 or (g.dtype != torch.float32 and g.device.type == "cpu"):
            return kernels.row_squares(g, dim)
        return kernels.quick_row_squares(g, dim)

    def _everything(self, g: Tensor, total: Total) -> list[Wanted]:
        """Add a tensor to a total, or say as which matrix it is to be summed up."""
        flat = g.reshape(-1)
        compiles = self.compiler is not None and g.numel() >= kernels.COMPILE_EACH
        if g.dtype == torch.float32 and not self.exact and not compiles:
            if flat.numel() <= SMALL:
                total.small.append(flat)
            else:
                total.norms += kernels.quick_norms(flat)
            return []
        width = math.gcd(flat.numel(), 3 * 4096)
        if width >= 256:
            return [Wanted(flat.view(flat.numel() // width, width), 1, total, None)]
        total.squares += [kernels.row_squares(part.view(1, -1), 1) for part in flat.split(kernels.CHUNK)]
        return []


def _is_ours(g: Tensor) -> bool:
    """Whether our own loop sums up a matrix: where another takes about as long to be called, it does not pay."""
    fits = g.dim() == 2 and g.device.type == "cpu" and g.dtype in loops.TYPES and g.is_contiguous()
    return fits and g.numel() >= kernels.COMPILE_EACH


def _of(totals: dict[tuple[int, ...], Total], shard: Shard) -> Total:
    """The total that a tensor adds to: one for all that are cut alike."""
    found = totals.get(shard.holders)
    if found is None:
        found = totals[shard.holders] = Total(shard)
    return found
