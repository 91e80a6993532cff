"""What is read of the gradients before anything moves: block sums, the global norm, whether all is finite.

One pass over the rows serves all three, and one collective carries them, and what rules ask for in their first round.

Sums of what is finite are finite. fp32 squares overflow at 1.8e19: on the CPU such sums are taken again in fp64; on a
device they are in fp64 from the start, as asking would wait for it. fp64 squares overflow at 1.3e154: large elements of
fp64 gradients are summed up apart, in a unit of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sharpwise.engine.backends.base import Squares
from sharpwise.engine.backends.reference import CHUNK, PIECE, SMALL
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
        """All of them in one number, fp64 [1]."""
        norms = self.norms + (quick_norms(torch.cat(self.small)) if self.small else [])
        squares = self.squares + ([torch.cat(norms).double().square_()] if norms else [])
        return _sum(squares).view(1)


class Wanted(NamedTuple):
    """A matrix whose g*g are summed up over a dimension: for a total, for the blocks of a view, or both.

    `large`: it has the large elements only; `whole`: it is one block.
    """

    g: Tensor
    dim: int
    total: Total | None
    view: ParamView | None
    large: bool = False
    whole: bool = False


QUICK = (torch.float32, torch.bfloat16)
"""Types that kernels sum up."""
Parts = dict[tuple[Any, bool], Partial]
"""Sums by what they are of, and whether of the large elements of fp64 gradients."""


class SquareKernel(Protocol):
    """Sums of squares by a kernel."""

    def row_squares(self, matrices: Sequence[Tensor], dims: Sequence[int], exact: bool) -> list[Tensor | None]:
        """Over a dimension of matrices; None of those that it does not take."""

    def total(self, tensors: Sequence[Tensor], exact: bool) -> float | None:
        """Over everything, of contiguous fp32 and bf16 tensors on the CPU; None if there is no kernel."""


class Sums:
    """Sums of g*g, by kernels of ours where there are some.

    Args:
        kernel: of ours, or None.
        total: whether the sum over everything is wanted too.
        exact: in fp64 throughout; else fp32 squares are added in fp32 before the few sums left in fp64.
    """

    def __init__(self, group: ReduceGroup, kernel: SquareKernel | None, total: bool, exact: bool) -> None:
        self.group, self.kernel = group, kernel
        self.wants_total, self.exact = total, exact
        self._whole: tuple[Any, bool] = (None, False)

    def of(
        self,
        views: Sequence[ParamView],
        grads: Sequence[Tensor],
        by_block: Sequence[bool],
        bucket: Bucket,
        given: Sequence[Squares] = (),
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
        everything = None if any(by_block) or any(own.views for own in given) else self._of_whole(views, grads)
        if everything is not None:
            bucket.reduce()
            return [None] * len(views), SquareSum(torch.tensor(everything, dtype=torch.float64, device="cpu"))
        blocks, totals = self._here(views, grads, by_block, self.exact, given)
        if not self.exact and _overflowed(totals or blocks):
            blocks, totals = self._here(views, grads, by_block, True, given)
        for parts in (blocks, totals):
            for key, partial in parts.items():
                parts[key] = bucket.add(partial.values, partial.shard)
        bucket.reduce()
        return [_joined(blocks, id(view)) for view in views], _total(totals)

    def _of_whole(self, views: Sequence[ParamView], grads: Sequence[Tensor]) -> float | None:
        """The sum over everything where one call of the kernel takes it: it is all here, in types that it knows."""
        if self._whole[0] is not views:
            whole = not any(view.shard.cut or view.part or view.device.type != "cpu" for view in views)
            self._whole = views, whole
        if self.kernel is None or not self._whole[1] or not all(g.dtype in QUICK and g.is_contiguous() for g in grads):
            return None
        return self.kernel.total(grads, self.exact)

    def _here(
        self,
        views: Sequence[ParamView],
        grads: Sequence[Tensor],
        by_block: Sequence[bool],
        exact: bool,
        given: Sequence[Squares],
    ) -> tuple[Parts, Parts]:
        """The sums of what this process holds: per block, by view; over everything, by device and cut."""
        totals: dict[tuple[Any, bool], Total] = {}
        taken = set().union(*(own.views for own in given))
        for shard, values in (pair for own in given for pair in own.totals):
            totals.setdefault(((shard.holders, values.device), False), Total(shard)).squares.append(values)
        wanted: list[Wanted] = []
        blocks: Parts = {}
        plain: dict[tuple[Any, bool], tuple[Shard, list[Tensor]]] = {}
        whole: dict[torch.device, tuple[list[Tensor], list[tuple[Total | None, ParamView | None]]]] = {}
        for view, g, own_blocks in zip(views, grads, by_block, strict=True):
            if not own_blocks and (not self.wants_total or id(view) in taken):
                continue
            if not own_blocks and self.kernel is not None and g.dtype in QUICK and on_cpu(g):
                rows = view.rows_of(g) if view.part else g
                if rows.is_contiguous():
                    key = (view.shard.holders, g.device), False
                    (plain.get(key) or plain.setdefault(key, (view.shard, [])))[1].append(rows)
                    continue
            if not own_blocks and not exact and g.numel() <= SMALL and g.dtype == torch.float32 and on_cpu(g):
                key = (view.shard.holders, g.device), False
                (totals.get(key) or totals.setdefault(key, Total(view.shard))).small.append(
                    (view.rows_of(g) if view.part else g).reshape(-1)
                )
                continue
            rows = view.rows_of(g) if own_blocks or view.part else g
            for large, part in _by_size(rows):
                total = None
                if self.wants_total:
                    total = totals.setdefault(((view.shard.holders, g.device), large), Total(view.shard))
                if own_blocks and self.kernel is not None and _is_one_row(view, g):
                    wanted.append(Wanted(part.reshape(1, -1), 1, total, view, large, whole=True))
                elif not exact and g.dtype != torch.float64 and _as_a_whole(view, g, own_blocks):
                    tensors, uses = whole.setdefault(g.device, ([], []))
                    tensors.append(part.reshape(-1))
                    uses.append((total, view if own_blocks else None))
                elif own_blocks:
                    wanted.append(Wanted(part, view.dim, total, view, large))
                elif total is not None:
                    wanted += self._everything(part, total, exact)
        for key, (shard, tensors) in plain.items():
            (totals.get(key) or totals.setdefault(key, Total(shard))).squares += self._plain(tensors, exact)
        for tensors, uses in whole.values():
            # In one pass over memory, in fp64. Never run on a GPU so far.
            squares = torch.stack(torch._foreach_norm(tensors, 2, torch.float64)).square_()
            for value, (_, owner) in zip(squares.split(1), uses, strict=True):
                if owner is not None:
                    blocks[id(owner), False] = Partial(value, owner.shard)
            for total in {id(total): total for total, _ in uses if total is not None}.values():
                own = [i for i, (other, _) in enumerate(uses) if other is total]
                total.squares.append(squares if len(own) == len(uses) else squares[own])
        for one, squares in zip(wanted, self._squares(wanted, exact), strict=True):
            if one.total is not None:
                one.total.squares.append(squares)
            if one.view is not None:
                values = squares if one.whole else one.view.gather(squares)
                blocks[id(one.view), one.large] = Partial(values, one.view.shard)
        return blocks, {key: Partial(total.sum(), total.shard) for key, total in totals.items()}

    def _plain(self, tensors: Sequence[Tensor], exact: bool) -> list[Tensor]:
        """Sums of g*g that together are those over everything."""
        assert self.kernel is not None
        found = self.kernel.total(tensors, exact)
        if found is not None:
            return [torch.tensor([found], dtype=torch.float64, device="cpu")]
        return [row_squares(part.view(1, -1), 1) for g in tensors for part in g.reshape(-1).split(CHUNK)]

    def _squares(self, wanted: Sequence[Wanted], exact: bool) -> list[Tensor]:
        """Sums of g*g over a dimension of matrices, as vectors."""
        own: list[Tensor | None] = [None] * len(wanted)
        if self.kernel is not None and wanted:
            own = self.kernel.row_squares([one.g for one in wanted], [one.dim for one in wanted], exact)
        eager = row_squares if exact else quick_row_squares
        return [
            eager(one.g, one.dim).reshape(-1) if found is None else found
            for one, found in zip(wanted, own, strict=True)
        ]

    def _everything(self, g: Tensor, total: Total, exact: bool) -> list[Wanted]:
        """Add a tensor to a total, or say as which matrix it is to be summed up."""
        flat = g.reshape(-1)
        if g.dtype == torch.float32 and not exact:
            if flat.numel() <= SMALL:
                total.small.append(flat)
            else:
                total.norms += quick_norms(flat)
            return []
        width = math.gcd(flat.numel(), 3 * 4096)
        if width >= 256:
            return [Wanted(flat.view(flat.numel() // width, width), 1, total, None)]
        total.squares += [row_squares(part.view(1, -1), 1) for part in flat.split(CHUNK)]
        return []


def _is_one_row(view: ParamView, g: Tensor) -> bool:
    """Whether a kernel sums it up as one block, in the order of a step in one pass."""
    return view.n_blocks == 1 and view.numel <= SMALL and on_cpu(g) and g.dtype in QUICK and not view.part


def _as_a_whole(view: ParamView, g: Tensor, by_block: bool) -> bool:
    """Whether its squares are summed up in one number, with those of others like it."""
    small = view.param.numel() <= SMALL
    return view.n_blocks == 1 and (small or not on_cpu(g)) if by_block else not on_cpu(g)


def on_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU, where asking is free."""
    return tensor.device.type == "cpu"


def _by_size(g: Tensor) -> list[tuple[bool, Tensor]]:
    """A gradient as it is; in fp64 as the sum of its small elements and, in units of UNIT, all others, NaN included."""
    if g.dtype != torch.float64:
        return [(False, g)]
    small = g.abs() < LARGE
    return [(False, torch.where(small, g, 0.0)), (True, torch.where(small, 0.0, g / UNIT))]


def _overflowed(parts: Parts) -> bool:
    """Whether a sum may have; asked on the CPU only."""
    values = [partial.values for partial in parts.values() if partial.values.device.type == "cpu"]
    return bool(values) and not math.isfinite(torch.cat(values).sum())


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of all their numbers, 0-d."""
    vector = vectors[0] if len(vectors) == 1 else torch.cat(list(vectors))
    return vector.view(()) if vector.numel() == 1 else vector.sum()


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
        own = [partial.values for (_, of), partial in parts.items() if of == large]
        # Not on the CPU, if there is a device: copies from there are waited for.
        device = max((value.device for value in own), key=lambda device: device.type != "cpu")
        values = _sum([value.to(device, non_blocking=True) for value in own])
        by_size[None, large] = Partial(values, next(iter(parts.values())).shard)
    return _joined(by_size, None)


# -- sums of squares in torch operations -------------------------------------------------------------------------------

RUN = 1 << 10
"""Elements whose squares are added in fp32."""


def row_squares(g: Tensor, dim: int) -> Tensor:
    """Sum of g*g over `dim`, in fp64; in pieces, so that the fp64 copy stays small."""
    return row_sums(g, dim, lambda part: part.double() ** 2)


def row_sums(x: Tensor, dim: int, of: Callable[[Tensor], Tensor] = Tensor.double) -> Tensor:
    """As `row_squares`, of what `of` makes of the elements."""
    if x.numel() <= CHUNK:
        return of(x).sum(dim)
    parts = [of(part).sum(dim) for part in x.split(max(1, CHUNK * x.shape[0] // x.numel()))]
    return torch.stack(parts).sum(0) if dim == 0 else torch.cat(parts)


def quick_norms(flat: Tensor) -> list[Tensor]:
    """Norms of runs that together are `flat`, fp32: over more than a run they would lose digits."""
    n = flat.numel()
    whole = n - n % RUN
    parts = [flat[:whole].view(-1, RUN)] if whole else []
    parts += [flat[whole:].view(1, -1)] if whole < n or not n else []
    return [torch.linalg.vector_norm(part, dim=1) for part in parts]


def quick_row_squares(g: Tensor, dim: int) -> Tensor:
    """As `row_squares`, of fp32 sums over runs where that is quicker: fp32 on the CPU. Beyond 1.8e19 they overflow."""
    run = g.shape[-1] if g.shape[-1] <= RUN else math.gcd(g.shape[-1], RUN)
    if g.device.type != "cpu" or g.dtype != torch.float32 or g.dim() != 2 or run < 32:
        return row_squares(g, dim)
    if dim == 1:
        norms = torch.linalg.vector_norm(g.unflatten(1, (g.shape[1] // run, run)), dim=2).double()
        return norms.square_().sum(1)
    parts = [torch.sum(part * part, 0) for part in g.split(max(1, PIECE // g.shape[1]))]
    return torch.stack(parts).sum(0, dtype=torch.float64)
