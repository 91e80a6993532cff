"""Reductions: what rules have to know of whole matrices in a step, completed over the processes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sharpwise.engine.backends.products import Products
from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Product, Reduction, Scalars, State, ThinRule
from sharpwise.shards import Part

THIN = 1 << 17
"""Numbers of thin matrices that are worked on at a time: a MiB in fp64. Each operation makes as many, and memory for
more goes back to the system and has to come from there again, which takes as long as all else."""
DOWN = 2.0**-20
"""A factor on thin matrices, so that products with gradients that are yet to be clipped do not overflow."""


@dataclass(eq=False)
class _Member:
    """A view in a batch: its gradient, its whole state, and where among the matrices of the batch its own are."""

    view: ParamView
    g: Tensor
    kept: Mapping[str, Tensor]
    span: slice

    @property
    def matrices(self) -> Tensor:
        return as_matrices(self.view, self.g.to(self.view.dtype))


class _Batch:
    """Views with equal rules and hyperparameters whose matrices are of one shape: what is thin is worked out for all at
    once. Rules that are asked for more than products are in batches of one view, and their state has its own shape.

    Attributes:
        known: whole state as it was before the step, a copy, and what has been found so far: [matrices, ...].
        first: the terms of the first reduction, which share a collective with others.
    """

    def __init__(self, pairs: Sequence[tuple[ParamView, Tensor]], scalars: StepScalars, products: Products) -> None:
        self.rule, self.scalars, self.products = pairs[0][0].rule, scalars, products
        self.hyper = scalars.hyper(pairs[0][0])
        self.members: list[_Member] = []
        self.first: list[Partial] = []
        end = 0
        for view, g in pairs:
            start, end = end, end + part_of(view).shape[0]
            self.members.append(_Member(view, view.rows_of(g), view.state_of("whole"), slice(start, end)))
        self.cut, dtype = pairs[0][0].shard.cut, pairs[0][0].dtype
        own = [one.kept for one in self.members]
        if isinstance(self.rule, ThinRule):
            self.known = {name: torch.cat([_three(kept[name]).to(dtype) for kept in own]) for name in own[0]}
        else:
            self.known = {name: tensor.to(dtype, copy=True) for name, tensor in own[0].items()}
        self._thin: tuple[Tensor, Tensor, Any] | None = None

    def terms(self, asked: Reduction | Product, clip: Any = None) -> list[Tensor]:
        """The contributions of the parts at hand."""
        if isinstance(asked, Product):
            factor = asked.factor(self.known)
            factor = (factor if clip is None else factor * DOWN).to(self.members[0].view.dtype)
            terms = [self._product(asked, one, factor[one.span]) for one in self.members]
            return terms if clip is None else [term * (clip / DOWN) for term in terms]
        (one,) = self.members
        view, dtype = one.view, one.view.dtype
        own = {n: held.decode(dtype) for n, held in zip(view.elements, view.stored(), strict=True)}
        g = one.matrices if clip is None else one.matrices * clip
        return [asked.local_term(g, {**own, **self.known}, self.hyper, part_of(view))]

    def _product(self, asked: Product, one: _Member, factor: Tensor) -> Tensor:
        part = part_of(one.view)
        (copies, rows, columns), whole, wide = part.region, part.shape, factor.shape[2]
        if asked.side == "right":
            found = self.products.right(one.matrices, factor[copies, columns])
            return _placed(found, (*whole[:2], wide), (copies, rows))
        found = self.products.left(factor[copies, rows], one.matrices)
        return _placed(found, (whole[0], wide, whole[2]), (copies, slice(None), columns))

    def complete(self, asked: Reduction | Product, values: Sequence[Tensor]) -> None:
        """Take over what a reduction gave, and what follows from it."""
        self.known[asked.name] = values[0] if len(values) == 1 else torch.cat(list(values))
        if asked.then is not None:
            self.known |= asked.then(self.known, self.hyper)

    def thin(self) -> tuple[Tensor, Tensor, Any]:
        """See `ThinRule.thin`: for all matrices, worked out once."""
        if self._thin is None:
            s = self.scalars.named(self.members[0].view)
            self._thin = cast(ThinRule, self.rule).thin(self.known, s)
        return self._thin

    def write(self) -> "dict[int, Informed]":
        """New whole state; and the rules, informed, by id of the view."""
        new = self.rule.finish(self.known, self.scalars.named(self.members[0].view))
        informed = {}
        for one in self.members:
            ok = self.scalars.ok_of(one.view)
            for name, whole in new.items():
                tensor = one.kept[name]
                value = (whole[one.span] if isinstance(self.rule, ThinRule) else whole).reshape(tensor.shape)
                tensor.copy_(value if ok is True else torch.where(ok, value, tensor))
            informed[id(one.view)] = Informed(self, one.view, one.span)
        return informed


class Reductions:
    """The reductions of one step.

    Args:
        group: the processes that hold parts.
        pairs: all views that move in this step, with gradients; those whose rules have no reductions are passed over.
        scalars: of the step.
        products: what works out those with thin matrices; together: whether of several views at once.
    """

    def __init__(
        self,
        group: ReduceGroup,
        pairs: Iterable[tuple[ParamView, Tensor]],
        scalars: StepScalars,
        products: Products,
        together: bool,
    ) -> None:
        self.group, self.scalars = group, scalars
        found: dict[Any, list[tuple[ParamView, Tensor]]] = {}
        for view, g in pairs:
            if view.rule.reductions:
                one = not (together and isinstance(view.rule, ThinRule))
                shape = part_of(view).shape[1:]
                key = id(view) if one else (scalars.class_key(view), shape, view.dtype, view.shard.cut)
                found.setdefault(key, []).append((view, g))
        self._batches = [_Batch(some, scalars, products) for own in found.values() for some in _by_size(own)]

    def begin(self, bucket: Bucket) -> None:
        """Add the first sums to the bucket of the norm and the sums over blocks: one collective serves them all."""
        for batch in self._batches:
            first = batch.rule.reductions[0]
            if first.op == "sum" and batch.cut:
                pairs = zip(batch.terms(first), batch.members, strict=True)
                batch.first = [bucket.add(term, one.view.shard) for term, one in pairs]

    def run(self, clip: Any) -> None:
        """Complete all reductions, with one collective per stage and operation."""
        for batch in self._batches:
            own, first = self._clip_of(batch, clip), batch.rule.reductions[0]
            if batch.first:
                scale = 1.0 if own is None else own**first.degree
                batch.complete(first, [partial.values * scale for partial in batch.first])
        for k in range(max((len(batch.rule.reductions) for batch in self._batches), default=0)):
            due = [own for own in self._batches if k < len(own.rule.reductions) and not (k == 0 and own.first)]
            for op in ("sum", "max"):
                self._reduce([own for own in due if own.rule.reductions[k].op == op], k, op, clip)

    def _reduce(self, due: Sequence[_Batch], k: int, op: Any, clip: Any) -> None:
        bucket, partials = Bucket(self.group, op), []
        for batch in due:
            terms = batch.terms(batch.rule.reductions[k], self._clip_of(batch, clip))
            partials.append([bucket.add(t, one.view.shard) for t, one in zip(terms, batch.members, strict=True)])
        bucket.reduce()
        for batch, own in zip(due, partials, strict=True):
            batch.complete(batch.rule.reductions[k], [partial.values for partial in own])

    def _clip_of(self, batch: _Batch, clip: Any) -> Any:
        return self.scalars.placed("clip", clip, batch.members[0].view.device)

    def written(self) -> "dict[int, Informed]":
        """Write whole state, and give the rules as back ends call them, by id of the view."""
        return {key: rule for batch in self._batches for key, rule in batch.write().items()}


class Informed:
    """The rule of a view with what its reductions found. Its own whole state is as it was before the step."""

    def __init__(self, batch: _Batch, view: ParamView, span: slice) -> None:
        self.batch, self.view, self.rule, self.span = batch, view, view.rule, span
        self.state, self.stage = view.rule.state, view.rule.stage

    def fill(self, x: Tensor, g: Tensor, clip: Any = None) -> Tensor | None:
        """Write what a thin rule has of every element to x, which lies as the view does.

        Args:
            g: of any type; it is to be multiplied by clip (None: 1).

        Returns:
            Sums of x*x over rows or columns of the view, fp64, where they are had without another read.
        """
        if not x.numel():
            return None
        copies, rows, columns = part_of(self.view).region
        a, b, beta = self.batch.thin()
        a, b = a[self.span][copies, rows].to(x.dtype), b[self.span][copies, :, columns].to(x.dtype)
        beta = beta if clip is None else beta * clip
        sums = self.batch.products.fill(as_matrices(self.view, x), a, b, as_matrices(self.view, g), beta)
        return None if sums is None else sums.view(-1)

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        if not isinstance(self.rule, ThinRule):
            return self.rule.direction(g, {**state, **self.batch.known}, s)
        x = torch.empty_like(g)
        self.fill(x, g)
        return self.rule.direction(g, {**state, "x": x}, s)


def _by_size(pairs: Sequence[tuple[ParamView, Tensor]]) -> Iterator[Sequence[tuple[ParamView, Tensor]]]:
    """Views of matrices of one shape, as many at a time as `THIN` allows for."""
    largest = max((tensor.numel() for tensor in pairs[0][0].state_of("whole").values()), default=1)
    most = max(1, THIN // largest)
    return (pairs[i : i + most] for i in range(0, len(pairs), most))


# -- a view as matrices ------------------------------------------------------------------------------------------------


def as_matrices(view: ParamView, rows: Tensor) -> Tensor:
    """A tensor that lies as the view does, as [copies, rows, columns] of what is held here: a view of it."""
    first = view.segments[0]
    if not view.by_row:
        return rows.mT if first.stacked else rows.mT[None]
    of_copies, of_rows, _ = part_of(view).region  # there may be none here
    return rows.view(of_copies.stop - of_copies.start, of_rows.stop - of_rows.start, rows.shape[1])


def part_of(view: ParamView) -> Part:
    """What is held here of the matrices of a view: their rows are all of its own, in the order of the parameter."""
    if "part" not in view.kept:
        first, region = view.segments[0], view.shard.region
        rows = torch.cat([segment.row_index("cpu") for segment in view.segments])
        out = first.rows_in(region)
        begin, end = (int((rows < at).sum()) for at in (out.start, out.stop))
        copies = region[0] if first.stacked else slice(0, 1)
        shape = first.copies, len(rows), view.shard.shape[first.inputs[0]]
        view.kept["part"] = Part(shape, (copies, slice(begin, end), region[first.inputs[0]]))
    found: Part = view.kept["part"]
    return found


def _placed(found: Tensor, shape: tuple[int, ...], where: tuple[slice, ...]) -> Tensor:
    """What a part gives, at its place in the whole."""
    if tuple(found.shape) == shape:
        return found
    whole = found.new_zeros(shape)
    whole[where] = found
    return whole


def _three(tensor: Tensor) -> Tensor:
    """Whole state of a thin rule as [copies, ...]."""
    return tensor if tensor.dim() == 3 else tensor[None]
