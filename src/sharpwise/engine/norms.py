"""What is read of the gradients before anything moves: block sums, the global norm, whether all is finite.

One pass over the rows serves all three, and one collective carries them, and what rules ask for in their first round.

Sums of what is finite are finite. fp32 squares overflow at 1.8e19: torch operations square in fp64, and kernels where
fp32 was not enough. fp64 squares overflow at 1.3e154: large elements of fp64 gradients are summed up apart, in a unit
of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.backends import Backends
from sharpwise.engine.backends.base import Prepared
from sharpwise.engine.backends.loops import Squares as Kernel
from sharpwise.engine.backends.reference import CHUNK
from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.scalars import on_device
from sharpwise.engine.view import ParamView
from sharpwise.shards import Shard

LARGE = 2.0**480
"""From here on fp64 elements are squared in units of UNIT: what is smaller has finite sums of up to 2**60 squares."""
UNIT = 2.0**600


class SquareSum(NamedTuple):
    """Sums of squares, fp64: `values` times the square of `unit`, which is 1.0, or a tensor of powers of two."""

    values: Tensor
    unit: Any = 1.0

    def times(self, factor: Any) -> "SquareSum":
        """The sums of what is multiplied by a factor (None: 1)."""
        if factor is None:
            return self
        return SquareSum(self.values, self.unit * on_device(factor, self.values.device))

    def on_host(self) -> "SquareSum":
        """The sums on the CPU."""
        return SquareSum(self.values.cpu(), self.unit.cpu() if isinstance(self.unit, Tensor) else self.unit)

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


class Sums:
    """Sums of g*g: by kernels where there are some, else in torch operations.

    Args:
        backends: whose kernels are taken; None for torch operations alone.
        total: whether the sum over everything is wanted too.
        exact: in fp64 throughout; else kernels add up a few squares in fp32 before these go into a sum in fp64.
    """

    def __init__(self, group: ReduceGroup, backends: Backends | None, total: bool, exact: bool) -> None:
        self.group, self.backends = group, backends
        self.wants_total, self.exact = total, exact
        self._arranged: tuple[Any, ...] = ()
        self._places: list[tuple[Shard, list[int]]] = []

    def of(
        self,
        views: Sequence[ParamView],
        grads: Sequence[Tensor],
        by_block: Sequence[bool],
        bucket: Bucket,
        given: Sequence[Prepared] = (),
    ) -> tuple[list[SquareSum | None], SquareSum | None]:
        """Sums of g*g per block of the views that are asked for, and over everything (None if not wanted).

        Args:
            by_block: of which views sums per block are wanted.
            bucket: what else is to be summed up over the processes; all is reduced together.
            given: what back ends have summed up by themselves.
        """
        if not self.wants_total and not any(by_block):
            bucket.reduce()
            return [None] * len(views), None
        # By the processes that hold what was added up, the device of the sum, and whether it is of large elements.
        totals: dict[Any, tuple[Shard, list[Tensor]]] = {}

        def add(shard: Shard, sums: Sequence[Tensor], large: bool = False) -> None:
            if self.wants_total:
                totals.setdefault((shard.holders, sums[0].device, large), (shard, []))[1].extend(sums)

        for shard, sums in (pair for own in given for pair in own.totals):
            add(shard, [sums])
        for shard, places in self._without_blocks(views, by_block, set().union(*(own.summed for own in given))):
            own = [views[i].rows_of(grads[i]) if views[i].part else grads[i] for i in places]
            for large, tensors in _by_size(own).items():
                add(shard, self._everything(tensors), large)
        blocks: dict[int, dict[bool, Partial]] = {}
        pairs = [pair for *pair, asked in zip(views, grads, by_block, strict=True) if asked]
        for view, large, sums in self._by_block(pairs):
            add(view.shard, [sums], large)
            blocks.setdefault(id(view), {})[large] = bucket.add(sums, view.shard)
        partials = {key: bucket.add(_sum(sums).view(1), shard) for key, (shard, sums) in totals.items()}
        bucket.reduce()
        found = [_joined(blocks[id(view)]) if id(view) in blocks else None for view in views]
        return found, _total(partials) if partials else None

    def _without_blocks(
        self, views: Sequence[ParamView], by_block: Sequence[bool], taken: set[int]
    ) -> list[tuple[Shard, list[int]]]:
        """Places of views that enter the sum over everything alone, by what they share; those of the last step, if the
        views are the same."""
        if not self._arranged or self._arranged[0] is not views or self._arranged[1:] != (by_block, taken):
            places: dict[Any, tuple[Shard, list[int]]] = {}
            for i, view in enumerate(views):
                if self.wants_total and not by_block[i] and id(view) not in taken:
                    places.setdefault((view.shard.holders, view.device), (view.shard, []))[1].append(i)
            self._arranged, self._places = (views, by_block, taken), list(places.values())
        return self._places

    def _by_block(self, pairs: Sequence[Sequence[Any]]) -> list[tuple[ParamView, bool, Tensor]]:
        """Sums over the blocks of views, and whether they are those of large elements."""
        matrices, found, shared = [], [], {}
        for view, g in pairs:
            if view.part and not view.by_row and len(view.whole_shape) == 2 and Kernel.takes(g) and self._kernel():
                # Columns of a matrix that is read once for all of its views.
                if id(view.param) not in shared:
                    (shared[id(view.param)],) = self._rows([g.view(view.whole_shape)], [view.dim])
                found.append((view, False, view.gather(shared[id(view.param)][view.layout.rows])))
                continue
            for large, (part,) in _by_size([view.rows_of(g)]).items():
                if view.n_blocks == 1 and view.by_row:  # added up in the order of a step in one pass
                    found.append((view, large, _sum(self._everything([part])).view(1)))
                else:
                    matrices.append((view, large, part))
        sums = self._rows([part for *_, part in matrices], [view.dim for view, *_ in matrices])
        return found + [(v, large, v.gather(own)) for (v, large, _), own in zip(matrices, sums, strict=True)]

    def _rows(self, matrices: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
        """Sums of g*g over a dimension of each, as vectors."""
        return squares_of(matrices, dims, self._kernel(), self.exact)

    def _everything(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Vectors that add up to the sum of all g*g."""
        own = [g for g in tensors if Kernel.takes(g)]
        kernel = self._kernel() if own else None
        sums = []
        if kernel is not None:
            sums.append(torch.tensor([kernel.total(own, self.exact)], dtype=torch.float64, device="cpu"))
            tensors = [g for g in tensors if not Kernel.takes(g)] if len(own) < len(tensors) else []
        pieces = (piece for g in tensors for piece in g.reshape(-1).split(CHUNK))
        return sums + [row_squares(piece, 0).view(1) for piece in pieces]

    def _kernel(self) -> Kernel | None:
        return None if self.backends is None else self.backends.cpp.of_squares


def squares_of(
    matrices: Sequence[Tensor], dims: Sequence[int], kernel: Kernel | None, exact: bool = False
) -> list[Tensor]:
    """Sums of x*x over a dimension of each, as fp64 vectors, by the kernel where it takes them."""
    own = [i for i, x in enumerate(matrices) if kernel is not None and x.dim() == 2 and Kernel.takes(x)]
    by_kernel: dict[int, Tensor] = {}
    if kernel is not None and own:
        sums = kernel([matrices[i] for i in own], [dims[i] for i in own], exact)
        by_kernel = dict(zip(own, sums, strict=True))
    pairs = enumerate(zip(matrices, dims, strict=True))
    return [by_kernel[i] if i in by_kernel else row_squares(*pair).reshape(-1) for i, pair in pairs]


def _by_size(tensors: Sequence[Tensor]) -> dict[bool, Sequence[Tensor]]:
    """Tensors as they are; of fp64 ones the small elements and, in units of UNIT (True), all others, NaN included."""
    if not any(g.dtype == torch.float64 for g in tensors):
        return {False: tensors}
    small = [g.abs() < LARGE for g in tensors]
    return {
        False: [torch.where(own, g, 0.0) for own, g in zip(small, tensors, strict=True)],
        True: [torch.where(own, 0.0, g.double() / UNIT) for own, g in zip(small, tensors, strict=True)],
    }


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of all their numbers, 0-d."""
    vector = vectors[0] if len(vectors) == 1 else torch.cat(list(vectors))
    return vector.view(()) if vector.numel() == 1 else vector.sum()


def _joined(by_size: Mapping[bool, Partial]) -> SquareSum:
    """The sums of all elements, from those of small and of large ones."""
    small = by_size[False].values
    if True not in by_size:
        return SquareSum(small)
    large = by_size[True].values
    some = large != 0  # NaN too
    values = torch.where(some, large + small / UNIT / UNIT, small)
    return SquareSum(values, torch.where(some, torch.full_like(values, UNIT), 1.0))


def _total(partials: Mapping[Any, Partial]) -> SquareSum:
    """The sum over everything."""
    by_size = {}
    for large in {large for *_, large in partials}:
        own = [partial.values for (*_, of), partial in partials.items() if of == large]
        # Not on the CPU, if there is a device: copies from there are waited for.
        device = max((value.device for value in own), key=lambda device: device.type != "cpu")
        values = _sum([value.to(device, non_blocking=True) for value in own])
        by_size[large] = Partial(values, next(iter(partials.values())).shard)
    return _joined(by_size)


# -- sums in torch operations ------------------------------------------------------------------------------------------


def row_squares(g: Tensor, dim: int) -> Tensor:
    """Sum of g*g over `dim`, in fp64; in pieces, so that the fp64 copy stays small."""
    return row_sums(g, dim, lambda part: part.double() ** 2)


def row_sums(x: Tensor, dim: int, of: Callable[[Tensor], Tensor] = Tensor.double) -> Tensor:
    """As `row_squares`, of what `of` makes of the elements."""
    if x.numel() <= CHUNK:
        return of(x).sum(dim)
    parts = [of(part).sum(dim) for part in x.split(max(1, CHUNK * x.shape[0] // x.numel()))]
    return torch.stack(parts).sum(0) if dim == 0 else torch.cat(parts)
