"""Rounds: what rules have to know of whole matrices in a step, completed over the processes that hold parts of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from sharpwise.engine.items import Item
from sharpwise.engine.mesh import Bucket, Exchange, Share, Team
from sharpwise.rules.base import Round, Rule, Scalars, State


@dataclass(eq=False)
class _Asking:
    """An item whose rule has rounds: its gradient, its hyperparameters, and what has been found so far.

    `kept` is its whole state, `whole` a copy of what that was before the step.
    """

    item: Item
    g: Tensor
    kept: dict[str, Tensor]
    whole: dict[str, Tensor]
    hyper: Mapping[str, Any]
    found: dict[str, Tensor] = field(default_factory=dict)
    first: Share | None = None

    @property
    def rule(self) -> Rule:
        return self.item.layout.rule

    def says(self, asked: Round, clip: Any = None) -> Tensor:
        """What the part at hand has to say."""
        dtype = self.item.layout.dtype
        names = [name for name, kind in self.rule.state.items() if kind == "element"]
        own = {name: tensor.to(dtype) for name, tensor in zip(names, self.item.stored, strict=True)}
        g = self.g.to(dtype) if clip is None else self.g.to(dtype) * clip
        return asked.of_part(g, {**own, **self.whole, **self.found}, self.hyper, self.item.layout.shard)


class Rounds:
    """The rounds of one step.

    Args:
        team: the processes that hold parts.
        items, grads: all that move in this step; those whose rules have no rounds are passed over.
        state: of the optimizer.
        hyper: the hyperparameters of an entry as they are now.
    """

    def __init__(self, team: Team, items: Sequence[Item], grads: Sequence[Tensor], state: Any, hyper: Any) -> None:
        self.team = team
        self._asking: dict[int, _Asking] = {}
        for item, g in zip(items, grads, strict=True):
            if item.layout.rule.rounds:
                own, kinds = state[item.parts[0].param], item.layout.rule.state
                kept = {name: own[name] for name, kind in kinds.items() if kind == "whole"}
                whole = {name: tensor.clone() for name, tensor in kept.items()}
                self._asking[id(item)] = _Asking(item, g, kept, whole, hyper(item.parts[0]))

    def begin(self, bucket: Bucket) -> None:
        """Put first sums where the norm and the sums over blocks are: one collective serves them all."""
        for one in self._asking.values():
            first = one.rule.rounds[0]
            if first.op == "sum":
                one.first = bucket.add(one.says(first), one.item.layout.shard)

    def finish(self, clip: Any) -> None:
        """Go through all rounds, a collective for each kind of question in each."""
        for one in self._asking.values():
            if one.first is not None:
                first = one.rule.rounds[0]
                one.found[first.name] = one.first.values if clip is None else one.first.values * clip**first.degree
        for k in range(max((len(one.rule.rounds) for one in self._asking.values()), default=0)):
            due = [one for one in self._asking.values() if k < len(one.rule.rounds) and not (k == 0 and one.first)]
            for op in ("sum", "max"):
                self._reduce([one for one in due if one.rule.rounds[k].op == op], k, op, clip)
            self._gather([one for one in due if one.rule.rounds[k].op == "whole"], k, clip)

    def _reduce(self, due: Sequence[_Asking], k: int, op: Any, clip: Any) -> None:
        bucket = Bucket(self.team, op)
        shares = [bucket.add(one.says(one.rule.rounds[k], clip), one.item.layout.shard) for one in due]
        bucket.reduce()
        for one, share in zip(due, shares, strict=True):
            one.found[one.rule.rounds[k].name] = share.values

    def _gather(self, due: Sequence[_Asking], k: int, clip: Any) -> None:
        exchange = Exchange(self.team, [one.item.layout.shard for one in due])
        parts = [one.says(one.rule.rounds[k], clip) for one in due]
        for one, part in zip(due, exchange.run(parts, [one.rule.rounds[k].work for one in due]), strict=True):
            one.found[one.rule.rounds[k].name] = part

    def settle(self, item: Item, s: Scalars, ok: Any) -> Rule | None:
        """Write the whole state of an item, and give its rule as the kernel calls it; None if it has no rounds."""
        one = self._asking.get(id(item))
        if one is None:
            return None
        known = {**one.whole, **one.found}
        known |= one.rule.settle(known, s)
        for name, tensor in one.kept.items():
            tensor.copy_(known[name] if ok is True else torch.where(ok, known[name], tensor))
        return cast(Rule, _Located(one.rule, one.rule.locate(known, item.layout.shard)))


class _Located:
    """A rule with what its rounds found, for the part at hand."""

    def __init__(self, rule: Rule, known: State) -> None:
        self.rule, self.known = rule, known
        self.state = rule.state

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return self.rule.direction(g, {**state, **self.known}, s)
