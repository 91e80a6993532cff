"""Reductions: what rules have to know of whole matrices in a step, completed over the processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Reduction, Rule, Scalars, State, ThinRule
from sharpwise.shards import Part


@dataclass(eq=False)
class _Pending:
    """A view whose rule has reductions: its gradient, its hyperparameters, and what has been found so far.

    `kept` is its whole state, `whole` a copy of what that was before the step.
    """

    view: ParamView
    g: Tensor
    kept: dict[str, Tensor]
    whole: dict[str, Tensor]
    hyper: Mapping[str, Any]
    found: dict[str, Tensor] = field(default_factory=dict)
    first: Partial | None = None

    @property
    def rule(self) -> Rule:
        return self.view.rule

    def term(self, asked: Reduction, clip: Any = None) -> Tensor:
        """The contribution of the part at hand."""
        dtype = self.view.dtype
        own = {n: held.decode(dtype) for n, held in zip(self.view.elements, self.view.stored(), strict=True)}
        g = self.g.to(dtype) if clip is None else self.g.to(dtype) * clip
        known = {**own, **self.whole, **self.found}
        return asked.local_term(as_matrices(self.view, g), known, self.hyper, part_of(self.view))

    def complete(self, asked: Reduction, value: Tensor) -> None:
        """Take over what a reduction gave, and what follows from it."""
        self.found[asked.name] = value
        if asked.then is not None:
            self.found |= asked.then({**self.whole, **self.found}, self.hyper)


class Reductions:
    """The reductions of one step.

    Args:
        group: the processes that hold parts.
        pairs: all views that move in this step, with gradients; those whose rules have no reductions are passed over.
        scalars: of the step.
    """

    def __init__(self, group: ReduceGroup, pairs: Iterable[tuple[ParamView, Tensor]], scalars: StepScalars) -> None:
        self.group, self.scalars = group, scalars
        self._pending: list[_Pending] = []
        for view, g in pairs:
            if view.rule.reductions:
                kept = view.state_of("whole")
                whole = {name: tensor.to(view.dtype, copy=True) for name, tensor in kept.items()}
                self._pending.append(_Pending(view, view.rows_of(g), kept, whole, scalars.hyper(view)))

    def begin(self, bucket: Bucket) -> None:
        """Add the first sums to the bucket of the norm and the sums over blocks: one collective serves them all."""
        for one in self._pending:
            first = one.rule.reductions[0]
            if first.op == "sum" and one.view.shard.cut:
                one.first = bucket.add(one.term(first), one.view.shard)

    def run(self, clip: Any) -> None:
        """Complete all reductions, with one collective per stage and operation."""
        for one in self._pending:
            own = self.scalars.placed("clip", clip, one.g.device)
            if one.first is not None:
                first = one.rule.reductions[0]
                one.complete(first, one.first.values if own is None else one.first.values * own**first.degree)
            elif not one.view.shard.cut:  # one after the other, while the gradient is in the cache
                for asked in one.rule.reductions:
                    one.complete(asked, one.term(asked, own))
        pending = [one for one in self._pending if one.view.shard.cut]
        for k in range(max((len(one.rule.reductions) for one in pending), default=0)):
            due = [one for one in pending if k < len(one.rule.reductions) and not (k == 0 and one.first)]
            for op in ("sum", "max"):
                self._reduce([one for one in due if one.rule.reductions[k].op == op], k, op, clip)

    def _reduce(self, due: Sequence[_Pending], k: int, op: Any, clip: Any) -> None:
        bucket = Bucket(self.group, op)
        own = [self.scalars.placed("clip", clip, one.g.device) for one in due]
        terms = [one.term(one.rule.reductions[k], factor) for one, factor in zip(due, own, strict=True)]
        partials = [bucket.add(term, one.view.shard) for one, term in zip(due, terms, strict=True)]
        bucket.reduce()
        for one, partial in zip(due, partials, strict=True):
            one.complete(one.rule.reductions[k], partial.values)

    def written(self) -> "dict[int, Informed]":
        """Write whole state, and give the rules as back ends call them, by id of the view."""
        rules, scalars = {}, self.scalars
        for one in self._pending:
            view, ok = one.view, scalars.ok_of(one.view)
            known = {**one.whole, **one.found}
            for name, value in one.rule.finish(known, scalars.named(view)).items():
                tensor = one.kept[name]
                value = value.reshape(tensor.shape)
                tensor.copy_(value if ok is True else torch.where(ok, value, tensor))
            rules[id(view)] = Informed(view, known)
        return rules


class Informed:
    """The rule of a view with what its reductions found. Its own whole state is as it was before the step."""

    def __init__(self, view: ParamView, known: State) -> None:
        self.view, self.rule, self.known = view, view.rule, known
        self.state, self.stage = view.rule.state, view.rule.stage

    def fill(self, x: Tensor, g: Tensor, s: Scalars, scale: Any = None) -> Tensor:
        """Write what a thin rule has of every element to x, which lies as the view does."""
        if x.numel():
            into, given = as_matrices(self.view, x), as_matrices(self.view, g)
            cast(ThinRule, self.rule).fill(into, given, self.known, part_of(self.view), s, scale)
        return x

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        x = {"x": self.fill(torch.empty_like(g), g, s)} if isinstance(self.rule, ThinRule) else {}
        return self.rule.direction(g, {**state, **self.known, **x}, s)


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
