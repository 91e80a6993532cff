"""What is read of the gradients before anything moves: block sums, the global norm, whether all is finite.

One pass over the rows serves all three, and one collective carries them, and what rules ask for in their first round.

Sums of what is finite are finite. fp32 squares overflow at 1.8e19: on the CPU such sums are taken again in fp64; on a
device they are in fp64 from the start, as asking would wait for it. fp64 squares overflow at 1.3e154: large elements of
fp64 gradients are summed up apart, in a unit of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine import kernels, loops
from sharpwise.engine.items import SMALL, Item
from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.plan import Entry
from sharpwise.shards import Shard, local

LARGE = 2.0**480
"""From here on fp64 elements are squared in units of UNIT: what is smaller has finite sums of up to 2**60 squares."""
UNIT = 2.0**600


class SquareSum(NamedTuple):
    """Sums of squares, fp64: `values` times the square of `unit`, which is 1.0, or a tensor of powers of two."""

    values: Tensor
    unit: Any = 1.0

    @property
    def root(self) -> Tensor:
        """The norm."""
        return self.values.sqrt() * self.unit

    def mean(self, counts: Tensor, clip: Any) -> Tensor:
        """The mean over so many elements, of gradients times `clip` (None: 1): scaled before it can overflow."""
        factor = self.unit if clip is None else self.unit * clip
        mean = self.values / counts
        return mean * factor * factor if isinstance(factor, Tensor) or factor != 1.0 else mean

    @staticmethod
    def joined(sums: "Sequence[SquareSum]") -> "SquareSum":
        """Vectors of sums one after the other, all of gradients of one type."""
        units = [own.unit for own in sums if isinstance(own.unit, Tensor)]
        return SquareSum(torch.cat([own.values for own in sums]), torch.cat(units) if units else 1.0)


@dataclass
class Total:
    """Parts of a sum of squares, as vectors: fp64 sums, fp32 norms, and tensors as they are: small fp32 ones, or any.

    All of them come from tensors that are cut as `shard` is.
    """

    shard: Shard
    squares: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    small: list[Tensor] = field(default_factory=list)
    whole: list[Tensor] = field(default_factory=list)

    def sum(self) -> Tensor:
        """All of them in one number, fp64 [1]."""
        norms = self.norms + (kernels.quick_norms(torch.cat(self.small)) if self.small else [])
        squares = self.squares + ([torch.cat(norms).double().square_()] if norms else [])
        if self.whole:
            # In one pass over memory, in fp64. Never run on a GPU so far.
            squares = [*squares, torch.stack(torch._foreach_norm(self.whole, 2, torch.float64)).square_()]
        return torch.cat(squares).sum().view(1)


class Wanted(NamedTuple):
    """A matrix whose g*g are summed up over a dimension: for a total, for the blocks of an item, or both."""

    g: Tensor
    dim: int
    total: Total | None
    item: Item | None
    large: bool = False


Parts = dict[tuple[Any, bool], Partial]
"""Sums by what they are of, and whether of the large elements of fp64 gradients."""


class Sums:
    """Sums of g*g, by our own loop where there is one.

    Args:
        compiler: builds it, if there is one.
        total: whether the sum over everything is wanted too.
        exact: in fp64 throughout; else fp32 squares are added in fp32 before the few sums left in fp64.
    """

    def __init__(self, team: ReduceGroup, compiler: kernels.Compiler | None, total: bool, exact: bool) -> None:
        self.team = team
        self.compiler = compiler
        self.wants_total = total
        self.exact = exact

    def of(
        self, items: Sequence[Item], grads: Sequence[Tensor], fused: Sequence[Entry], bucket: Bucket
    ) -> tuple[list[SquareSum | None], SquareSum | None]:
        """Sum of g*g per block of every item (None without blocks), and over everything (None if not wanted).

        Args:
            items, grads: what is moved item by item; `fused`: parameters that torch's kernel moves.
            bucket: what else is to be summed up over the processes; all is reduced together.
        """
        blocks, totals = self._here(items, grads, fused, self.exact)
        if not self.exact and _overflowed(totals or blocks):
            blocks, totals = self._here(items, grads, fused, True)
        for parts in (blocks, totals):
            for key, share in parts.items():
                parts[key] = bucket.add(share.values, share.shard)
        bucket.reduce()
        return [_joined(blocks, id(item)) for item in items], _total(totals)

    def _here(
        self, items: Sequence[Item], grads: Sequence[Tensor], fused: Sequence[Entry], exact: bool
    ) -> tuple[Parts, Parts]:
        """The sums of what this process holds: per block, by item; over everything, by how tensors are cut."""
        totals: dict[tuple[Any, bool], Total] = {}

        def total_of(shard: Shard, large: bool) -> Total:
            return totals.setdefault((shard.holders, large), Total(shard))

        wanted: list[Wanted] = []
        for item, g in zip(items, grads, strict=True):
            for large, part in _by_size(g):
                own = total_of(item.layout.shard, large) if self.wants_total else None
                if item.layout.rule.has_blocks:
                    wanted.append(Wanted(part, item.layout.dim, own, item, large))
                elif own is not None:
                    wanted += self._everything(part, own, exact)
        for entry in fused if self.wants_total else ():
            grad: Tensor = entry.param.grad  # type: ignore[assignment]
            wanted += self._everything(local(grad), total_of(entry.shard, False), exact)
        blocks: Parts = {}
        for one, squares in zip(wanted, self._squares(wanted, exact), strict=True):
            if one.total is not None:
                one.total.squares.append(squares)
            if one.item is not None:
                layout = one.item.layout
                blocks[id(one.item), one.large] = Partial(layout.gather(squares), layout.shard)
        return blocks, {key: Partial(total.sum(), total.shard) for key, total in totals.items()}

    def _squares(self, wanted: Sequence[Wanted], exact: bool) -> list[Tensor]:
        """Sums of g*g over a dimension of matrices, as vectors."""
        large = [i for i, one in enumerate(wanted) if self.compiler is not None and _is_ours(one.g)]
        loop = self.compiler.squares() if self.compiler is not None and large else None
        found: dict[int, Tensor] = {}
        if loop is not None:
            sums = loop([wanted[i].g for i in large], [wanted[i].dim for i in large], exact)
            found = dict(zip(large, sums, strict=True))
        eager = kernels.row_squares if exact else kernels.quick_row_squares
        return [found[i] if i in found else eager(one.g, one.dim).reshape(-1) for i, one in enumerate(wanted)]

    def _everything(self, g: Tensor, total: Total, exact: bool) -> list[Wanted]:
        """Add a tensor to a total, or say as which matrix it is to be summed up."""
        flat = g.reshape(-1)
        compiles = self.compiler is not None and g.numel() >= kernels.COMPILE_EACH
        if g.device.type != "cpu":
            total.whole.append(flat)
            return []
        if g.dtype == torch.float32 and not exact and not compiles:
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


def _by_size(g: Tensor) -> list[tuple[bool, Tensor]]:
    """A gradient as it is; in fp64 as the sum of its small elements and, in units of UNIT, all others, NaN included."""
    if g.dtype != torch.float64:
        return [(False, g)]
    small = g.abs() < LARGE
    return [(False, torch.where(small, g, 0.0)), (True, torch.where(small, 0.0, g / UNIT))]


def _overflowed(parts: Parts) -> bool:
    """Whether a sum may have; asked on the CPU only."""
    values = [share.values for share in parts.values()]
    return bool(values) and values[0].device.type == "cpu" and not math.isfinite(torch.cat(values).sum())


def _joined(parts: Parts, key: Any) -> SquareSum | None:
    """The sums of all elements, from those of small and of large ones."""
    if (key, False) not in parts:
        return None
    small = parts[key, False].values
    if (key, True) not in parts:
        return SquareSum(small)
    large = parts[key, True].values
    some = large != 0  # NaN too
    values = torch.where(some, large + small / UNIT / UNIT, small)
    return SquareSum(values, torch.where(some, torch.full_like(values, UNIT), 1.0))


def _total(parts: Parts) -> SquareSum | None:
    """The sum over everything."""
    if not parts:
        return None
    by_size: Parts = {}
    for large in {large for _, large in parts}:
        values = torch.cat([share.values for (_, of), share in parts.items() if of == large]).sum()
        by_size[None, large] = Partial(values, next(iter(parts.values())).shard)
    return _joined(by_size, None)
