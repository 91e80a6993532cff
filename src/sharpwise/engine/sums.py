"""What is read of the gradients before anything moves: block sums, the global norm, whether all is finite.

One pass over the rows serves all three, and one collective carries them, and what rules ask for in their first round.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharpwise.engine import kernels
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


class Sums:
    """Sums of g*g, by the compiled kernel where there is one.

    Args:
        compiler: sums up matrices, if there is one.
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
        wanted: list[tuple[Tensor, int]] = []
        totals: dict[tuple[int, ...], Total] = {}
        of_items: list[int | None] = []
        of_totals: list[tuple[Total, int]] = []
        for item, g in zip(items, grads, strict=True):
            blocks = item.layout.rule.has_blocks
            of_items.append(len(wanted) if blocks else None)
            rows = (g, item.layout.dim) if blocks else None
            if self.wants_total:
                own = _of(totals, item.layout.shard)
                rows = rows or self._everything(g, own)
                of_totals += [(own, len(wanted))] if rows else []
            wanted += [rows] if rows else []
        for entry in fused if self.wants_total else ():
            grad: Tensor = entry.param.grad  # type: ignore[assignment]
            own = _of(totals, entry.shard)
            if rows := self._everything(local(grad), own):
                of_totals.append((own, len(wanted)))
                wanted.append(rows)
        squares = self._rows(wanted)
        for own, i in of_totals:
            own.squares.append(squares[i])
        sums: list[Share | None] = []
        for item, at in zip(items, of_items, strict=True):
            sums.append(None if at is None else bucket.add(item.layout.gather(squares[at]), item.layout.shard))
        shares = [bucket.add(found.sum().view(1), found.shard) for found in totals.values()]
        bucket.reduce()
        total = torch.cat([share.values for share in shares]).sum() if shares else None
        if total is not None and not self.exact and total.device.type == "cpu" and not math.isfinite(total):
            # fp32 squares overflow at 1e19: ask again in fp64.
            return Sums(self.team, None, True, True).of(items, grads, fused, Bucket(self.team))
        return [None if share is None else share.values for share in sums], total

    def _rows(self, wanted: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """Sums of g*g over a dimension of matrices, as vectors.

        All calls of graphs are made ready before the first is made: a kernel leaves nothing in the cache, and what is
        done between two of them takes several times as long.
        """
        calls = [self._call(g, dim) for g, dim in wanted]
        found = [None if call is None else call[0](call[1])[0] for call in calls]
        quick = not self.exact
        return [
            (
                sums
                if sums is not None
                else kernels.quick_row_squares(g, dim)
                if quick and g.dtype == torch.float32
                else kernels.row_squares(g, dim)
            ).reshape(-1)
            for sums, (g, dim) in zip(found, wanted, strict=True)
        ]

    def _call(self, g: Tensor, dim: int) -> kernels.Call | None:
        if self.compiler is None or g.dim() != 2 or g.numel() < kernels.COMPILE_EACH or min(g.shape) == 1:
            return None
        return self.compiler.row_squares_call(g, dim, self.exact)

    def _everything(self, g: Tensor, total: Total) -> tuple[Tensor, int] | None:
        """Add a tensor to a total, or say which matrix is to be summed up over which dimension for it."""
        flat = g.reshape(-1)
        compiles = self.compiler is not None and g.numel() >= kernels.COMPILE_EACH
        if g.dtype == torch.float32 and not self.exact and not compiles:
            if flat.numel() <= SMALL:
                total.small.append(flat)
            else:
                total.norms += kernels.quick_norms(flat)
            return None
        width = math.gcd(flat.numel(), 3 * 4096)
        if width >= 256:
            return flat.view(flat.numel() // width, width), 1
        total.squares += [kernels.row_squares(part.view(1, -1), 1) for part in flat.split(kernels.CHUNK)]
        return None


def _of(totals: dict[tuple[int, ...], Total], shard: Shard) -> Total:
    """The total that a tensor adds to: one for all that are cut alike."""
    found = totals.get(shard.holders)
    if found is None:
        found = totals[shard.holders] = Total(shard)
    return found
