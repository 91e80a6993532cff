"""Reductions: what rules have to know of whole matrices in a step, completed over the processes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Reduction, Rule, Scalars, State


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
        return asked.local_term(g, {**own, **self.whole, **self.found}, self.hyper, self.view.shard)


class Reductions:
    """The reductions of one step.

    Args:
        group: the processes that hold parts.
        pairs: all views that move in this step, with gradients; those whose rules have no reductions are passed over.
        hyper: the hyperparameters of a view as they are now.
    """

    def __init__(self, group: ReduceGroup, pairs: Iterable[tuple[ParamView, Tensor]], hyper: Any) -> None:
        self.group = group
        self._pending: dict[int, _Pending] = {}
        for view, g in pairs:
            if view.rule.reductions:
                kept = view.state_of("whole")
                whole = {name: tensor.clone() for name, tensor in kept.items()}
                self._pending[id(view)] = _Pending(view, view.rows_of(g), kept, whole, hyper(view))

    def begin(self, bucket: Bucket) -> None:
        """Add the first sums to the bucket of the norm and the sums over blocks: one collective serves them all."""
        for one in self._pending.values():
            first = one.rule.reductions[0]
            if first.op == "sum":
                one.first = bucket.add(one.term(first), one.view.shard)

    def run(self, clip: Any) -> None:
        """Complete all reductions, with one collective per stage and operation."""
        for one in self._pending.values():
            if one.first is not None:
                first = one.rule.reductions[0]
                one.found[first.name] = one.first.values if clip is None else one.first.values * clip**first.degree
        for k in range(max((len(one.rule.reductions) for one in self._pending.values()), default=0)):
            due = [one for one in self._pending.values() if k < len(one.rule.reductions) and not (k == 0 and one.first)]
            for op in ("sum", "max"):
                self._reduce([one for one in due if one.rule.reductions[k].op == op], k, op, clip)

    def _reduce(self, due: Sequence[_Pending], k: int, op: Any, clip: Any) -> None:
        bucket = Bucket(self.group, op)
        partials = [bucket.add(one.term(one.rule.reductions[k], clip), one.view.shard) for one in due]
        bucket.reduce()
        for one, own in zip(due, partials, strict=True):
            one.found[one.rule.reductions[k].name] = own.values

    def localized(self, scalars: StepScalars) -> dict[int, Rule]:
        """Write whole state, and give the rules as the reference calls them, by id of the view."""
        rules = {}
        for one in self._pending.values():
            view, ok = one.view, scalars.ok_of(one.view)
            known = {**one.whole, **one.found}
            known |= one.rule.finish(known, scalars.named(view))
            for name, tensor in one.kept.items():
                tensor.copy_(known[name] if ok is True else torch.where(ok, known[name], tensor))
            rules[id(view)] = cast(Rule, _Localized(one.rule, one.rule.local_slice(known, view.shard)))
        return rules


class _Localized:
    """A rule with what its reductions found, for the part at hand."""

    def __init__(self, rule: Rule, known: State) -> None:
        self.rule, self.known = rule, known
        self.state, self.stage = rule.state, rule.stage

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return self.rule.direction(g, {**state, **self.known}, s)
