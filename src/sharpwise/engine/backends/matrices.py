"""Whole matrices, for rules that need them.

    gradients -> momentum, x -> matrices (segment, copy, head) in batches of one shape -> owners -> u -> parameters

What goes element by element, at both ends, is moved by the back ends of elements, as views of their own: first those of
a scratch `x` in place of parameters, then the parameters, by updates that lie in the same scratch. Where parameters are
cut, or repeated, the parts of a batch travel to the owners of its matrices in one exchange, and their updates back in
another.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from sharpwise.engine.backends import owners
from sharpwise.engine.backends.base import Backend, Choice, Found, Prepared, Spec, Work
from sharpwise.engine.backends.owners import Batch, Matrix
from sharpwise.engine.mesh import ReduceGroup
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Kind, MatrixRule, Rule, Scalars, Stage, State
from sharpwise.shards import Shard, local

ALIGNED = 16
"""Elements at a multiple of which every parameter begins in the scratch."""
NOTHING = Found({}, {})


@dataclass(frozen=True)
class Intake(Stage):
    """What matrices are made of: moves the element state of a rule."""

    rule: MatrixRule

    name: ClassVar[str] = "intake"
    stage = "input"

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return *self.rule.input(g, state, s), None


@dataclass(frozen=True)
class Given(Rule):
    """Moves by what is given in place of a gradient."""

    name: ClassVar[str] = "given"
    hyperparameters: ClassVar[tuple[str, ...]] = ()
    stage = "move"

    @property
    def state(self) -> dict[str, Kind]:
        return {}

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return {}, g, None


@dataclass(eq=False)
class Chunk:
    """Views whose matrices are in the scratch at one time.

    Attributes:
        x: where, by view; intake, moves: who moves what before the owners, and after them.
    """

    views: list[ParamView]
    x: list[Tensor]
    intake: list[Work]
    moves: list[Work]
    batches: list[Batch]


class Matrices(Backend):
    """Moves parameters whose rule takes whole matrices.

    Args:
        elements: of a device, the back ends of what goes element by element.
        batched: matrices are worked on in batches; else one by one, so that a result does not depend on its neighbours.
        replicas: a group of processes that hold the same plain parameters, and share the work.

    Attributes:
        worked: how many matrices were worked on here, over all steps.
    """

    name: ClassVar[str] = "matrices"

    def __init__(self, elements: Callable[[torch.device], Sequence[Backend]], batched: bool, replicas: Any) -> None:
        self.elements, self.batched, self.replicas, self.worked = elements, batched, replicas, 0
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._planned: tuple[Any, list[Chunk]] = (None, [])

    def refuses(self, spec: Spec) -> str:
        if not isinstance(spec.view.rule, MatrixRule):
            return "for rules of whole matrices"
        view = spec.view
        x = self._room(view, view.numel)[: view.numel].view(local(view.param).shape)
        stages = [Choice.of(self.elements(view.device), own) for own in _stages(spec, x)]
        view.kept["matrices", spec.grad] = spec, dict.fromkeys(pair for own in stages for pair in own.refusals)
        return ""

    def slower(self, spec: Spec) -> Sequence[tuple[str, str]]:
        return tuple(spec.view.kept["matrices", spec.grad][1])

    def prepare(
        self, views: Sequence[ParamView], grads: Sequence[Tensor], total: Sequence[bool], scalars: StepScalars
    ) -> Prepared:
        places = {id(view): i for i, view in enumerate(views)}
        totals: list[tuple[Shard, Tensor]] = []
        summed: set[int] = set()
        for work in (work for chunk in self._chunks(views, grads, scalars) for work in chunk.intake):
            own = [places[id(view.origin)] for view in work.views]
            prepared = work.backend.prepare(work.views, [grads[i] for i in own], [total[i] for i in own], scalars)
            totals += prepared.totals
            summed |= {id(view.origin) for view in work.views if id(view) in prepared.summed}
        return Prepared(totals, summed)

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        of_view = {id(view): g for view, g in zip(views, grads, strict=True)}
        for chunk in self._chunks(views, grads, scalars):
            if not scalars.decoupled:  # decay is a part of the gradient
                torch._foreach_copy_(chunk.x, [local(view.param) for view in chunk.views])
            for work in chunk.intake:
                work.backend.step(work.views, [of_view[id(view.origin)] for view in work.views], scalars, NOTHING)
            for batch in chunk.batches:
                self._step_batch(batch, scalars.named(batch.first))
            moved = [view for work in chunk.moves for view in work.views]
            updates = [chunk.x[i] for work in chunk.moves for i in work.places]
            bounded = found._replace(rates={}, rules={}, lines=found.bound(moved, updates))
            for work in chunk.moves:
                updates = [chunk.x[i] for i in work.places]
                work.backend.prepare(work.views, updates, [False] * len(updates), scalars)
                work.backend.step(work.views, updates, scalars, bounded)

    # -- plan ------------------------------------------------------------------------------------------------------

    def _chunks(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars) -> list[Chunk]:
        """All that is done in a step, the same list as long as the views are, in the same order everywhere."""
        kinds: dict[Any, int] = {}
        numbers = [kinds.setdefault((scalars.class_key(view), view.dtype), len(kinds)) for view in views]
        types = [g.dtype for g in grads]
        key = list(map(id, views)), numbers, types
        if self._planned[0] != key:
            number_of = {id(view): n for view, n in zip(views, numbers, strict=True)}
            specs = {id(view): view.kept["matrices", t][0] for view, t in zip(views, types, strict=True)}
            self._planned = key, self._plan(views, number_of, specs)
        return self._planned[1]

    def _plan(self, views: Sequence[ParamView], number_of: Mapping[int, int], specs: Mapping[int, Spec]) -> list[Chunk]:
        found = []
        for group, own in owners.together(views, self.replicas):
            matrices = {id(view): owners.matrices_of(view, group) for view in own}
            owners.assign_owners([one for some in matrices.values() for one in some], group)
            own.sort(key=lambda view: (number_of[id(view)], [one.shape for one in matrices[id(view)]]))
            found += [(group, *pair) for pair in owners.chunks(own, [matrices[id(view)] for view in own], group)]
        for _, some, _ in found:  # before any of it is given away
            self._room(some[0], sum(map(_room_of, some)))
        return [self._chunk(group, some, ones, number_of, specs) for group, some, ones in found]

    def _chunk(
        self,
        group: ReduceGroup,
        views: list[ParamView],
        matrices: list[Matrix],
        number_of: Mapping[int, int],
        specs: Mapping[int, Spec],
    ) -> Chunk:
        room = self._room(views[0], 0)
        x = {}
        for view in views:
            x[id(view)] = room[: view.numel].view(local(view.param).shape)
            room = room[_room_of(view) :]
        for one in matrices:
            one.x = x[id(one.view)]
        shared = [one for one in matrices if one.shared]
        alone = [one for one in matrices if not one.shared and one.mine.numel]
        batches = []
        for own, some in ((group, shared), (ReduceGroup(), alone)):
            some.sort(key=lambda one: (number_of[id(one.view)], one.shape))
            for _, same in groupby(some, key=lambda one: (number_of[id(one.view)], one.shape)):
                batches += owners.batches(list(same), own)
        # Also of those of which nothing is here: what back ends complete over processes takes all of these.
        stages = [_stages(specs[id(view)], x[id(view)]) for view in views]
        intake, moves = ([own[i] for own in stages] for i in range(2))
        return Chunk(views, [x[id(view)] for view in views], self._work(intake), self._work(moves), batches)

    def _work(self, specs: Sequence[Spec]) -> list[Work]:
        backends = [Choice.of(self.elements(spec.view.device), spec).backend for spec in specs]
        return Work.of([spec.view for spec in specs], backends)

    @property
    def planned(self) -> list[Batch]:
        """The batches of the last step."""
        return [batch for chunk in self._planned[1] for batch in chunk.batches]

    def _room(self, view: ParamView, size: int) -> Tensor:
        """The scratch for such views, of so many elements at least."""
        key = view.device, view.dtype
        if key not in self._scratch or len(self._scratch[key]) < size:
            with torch.inference_mode(False):
                self._scratch[key] = torch.empty(size, dtype=view.dtype, device=view.device)
        return self._scratch[key]

    # -- one batch -------------------------------------------------------------------------------------------------

    def _step_batch(self, batch: Batch, s: Mapping[str, Any]) -> None:
        """From the parts of matrices that are held here to their updates, in the same place; writes whole state."""
        if batch.group.process_group is not None:
            updates, small = self._shared(batch, s)
            batch.put(updates)
        elif (whole := batch.in_place()) is not None:
            u, small = self._owner(batch, batch.matrices, whole, s)
            if u is not whole:
                whole.copy_(u)
        else:
            u, small = self._owner(batch, batch.matrices, torch.stack([one.take() for one in batch.matrices]), s)
            batch.put(u.unbind())
        for name, value in small.items():
            held = [one.view.own[name][one.places] for one in batch.matrices]
            if "ok" in s:
                value = torch.where(s["ok"] != 0, value, torch.stack(held))
            torch._foreach_copy_(held, list(value.unbind()))

    def _owner(
        self, batch: Batch, own: Sequence[Matrix], whole: Tensor, s: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the rule makes of whole matrices [n, rows, columns]."""
        rule = cast(MatrixRule, batch.first.rule)
        names = list(batch.first.state_of("whole"))
        small = {name: torch.stack([one.view.own[name][one.places] for one in own]) for name in names}
        self.worked += len(own)
        if self.batched or len(own) == 1:
            return rule.owner(whole, small, s)
        each = [rule.owner(whole[i : i + 1], {n: t[i : i + 1] for n, t in small.items()}, s) for i in range(len(own))]
        return torch.cat([u for u, _ in each]), {n: torch.cat([new[n] for _, new in each]) for n in names}

    def _shared(self, batch: Batch, s: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The same, where processes share the work: parts to the owners, updates and numbers per row to everybody."""
        me, group, view = torch.distributed.get_rank(), batch.group, batch.first
        rule = cast(MatrixRule, view.rule)
        names = list(view.state_of("whole"))
        wire, (rows, columns) = rule.wire or view.dtype, batch.matrices[0].shape
        mine = [one for one in batch.matrices if one.owner == me]
        nothing = torch.empty(0, dtype=wire, device=view.device)
        whole = torch.empty(len(mine), rows, columns, dtype=view.dtype, device=view.device)
        if batch.cut:
            given = {id(one): one.take().to(wire) for one in batch.matrices}
            outgoing = [[given[id(o)] for o in batch.matrices if o.owner == r and me in o.sources] for r in group.ranks]
            senders = [[(i, o.parts[r]) for i, o in enumerate(mine) if r in o.sources] for r in group.ranks]
            sizes = [[part.numel for _, part in own] for own in senders]
            for own, vectors in zip(senders, group.exchange(outgoing, sizes, nothing), strict=True):
                for (i, part), vector in zip(own, vectors, strict=True):
                    whole[i][part.rows, part.columns] = vector.view(part.shape).to(view.dtype)
        else:
            for i, one in enumerate(mine):
                whole[i] = one.take()
        u, small = self._owner(batch, mine, whole, s) if mine else (whole, {})
        # Numbers per row keep all their bits, whatever the wire.
        extra = {n: t.to(view.dtype).contiguous().view(wire) for n, t in small.items()}
        back: list[list[Tensor]] = [[] for _ in group.ranks]
        for i, one in enumerate(mine):
            for place, rank in enumerate(group.ranks):
                part = one.parts[rank]
                back[place] += [u[i][part.rows, part.columns].to(wire), *(extra[n][i] for n in names)]
        length = rows * view.dtype.itemsize // wire.itemsize
        sizes = [
            [n for o in batch.matrices if o.owner == rank for n in (o.mine.numel, *[length] * len(names))]
            for rank in group.ranks
        ]
        received = {
            rank: iter(own) for rank, own in zip(group.ranks, group.exchange(back, sizes, nothing), strict=True)
        }
        updates: list[Tensor] = []
        smalls: dict[str, list[Tensor]] = {name: [] for name in names}
        for one in batch.matrices:
            of_owner = received[one.owner]
            updates.append(next(of_owner).view(one.mine.shape))
            for name in names:
                smalls[name].append(next(of_owner).clone().view(view.dtype))
        return updates, {name: torch.stack(own) for name, own in smalls.items()}


def _stages(spec: Spec, x: Tensor) -> tuple[Spec, Spec]:
    """What is moved before the owners work, and after that; x: like the local tensor of the parameter."""
    view = spec.view
    intake = view.stage(param=x, rule=Intake(cast(MatrixRule, view.rule)))
    return spec._replace(view=intake), spec._replace(view=view.stage(rule=Given(), formats={}), grad=x.dtype)


def _room_of(view: ParamView) -> int:
    """Elements of the scratch that a view takes."""
    return -(-view.numel // ALIGNED) * ALIGNED
