"""Whole matrices, for rules that need them.

    elements -> momentum, once -> matrices (segment, copy, head) in batches of one shape -> owners -> u -> p

Where parameters are cut, or repeated, the parts of a batch travel to the owners of its matrices in one exchange, and
their updates back in another. Then they move as those of every rule do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from sharpwise.engine.backends.base import Backend, Found, Spec
from sharpwise.engine.backends.reference import Noise, noise_of, store, update
from sharpwise.engine.mesh import ReduceGroup
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.stored import Stored
from sharpwise.engine.view import ParamView
from sharpwise.rules import SGD
from sharpwise.rules.base import MatrixRule, add
from sharpwise.shards import local, region_of
from sharpwise.storage import Dense, Format

BATCH = 1 << 26
"""Bytes that one process holds of a batch of matrices at the most, unless one matrix is larger. The work on them takes
four times that."""
_GIVEN = SGD()
"""The rule that moves by what it is given as gradient."""

Index = slice | Tensor


@dataclass(frozen=True)
class Part:
    """What one process holds of a matrix.

    Attributes:
        rows, columns: of the matrix; own_rows: the same rows in the local tensor.
        copy: in the local tensor, if stacked; shape: of the part.
    """

    rows: Index
    columns: slice
    own_rows: Index
    copy: int
    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def take(self, tensor: Tensor, view: ParamView) -> Tensor:
        """This part of a local tensor of the parameter's shape: a view, unless its rows are scattered."""
        if not self.numel:
            return tensor.new_empty(self.shape)
        return self._matrix(tensor, view)[self.own_rows]

    def put(self, tensor: Tensor, view: ParamView, value: Tensor) -> None:
        """Write back what `take` gave, where that was a copy."""
        if isinstance(self.own_rows, Tensor):
            self._matrix(tensor, view)[self.own_rows] = value

    def _matrix(self, tensor: Tensor, view: ParamView) -> Tensor:
        first = view.segments[0]
        one = tensor[self.copy] if first.stacked else tensor
        return one if first.dim == first.stacked else one.mT


@dataclass(eq=False)
class Matrix:
    """One matrix of a parameter: rows of one role, of one stacked copy, of one head if it is cut so.

    Attributes:
        segment: its number in the view; shape: rows are outputs; places: where its numbers per row lie in whole state.
        parts: by rank, in a group; `mine` is that of this process. replica: by rank, which one it is part of.
        owner: a rank of the group, -1 where there is none.
    """

    view: ParamView
    segment: int
    shape: tuple[int, int]
    places: slice
    mine: Part
    parts: Mapping[int, Part] = field(default_factory=dict)
    replica: Mapping[int, int] = field(default_factory=dict)
    owner: int = -1

    @property
    def cost(self) -> int:
        """Of orthogonalizing it, in products."""
        return self.shape[0] * self.shape[1] * min(self.shape)

    @property
    def shared(self) -> bool:
        """Whether another process than the owner holds a part, or its numbers per row."""
        told = "whole" in self.view.rule.state.values()
        return any(told or part.numel for rank, part in self.parts.items() if rank != self.owner)

    @cached_property
    def sources(self) -> list[int]:
        """The ranks that the owner takes parts from: of replicas, those of its own."""
        return [rank for rank in self.parts if self.replica[rank] == self.replica[self.owner]]


@dataclass(eq=False)
class Batch:
    """Matrices of one shape and one rule that are worked on together; group: the processes that share them, if any."""

    matrices: list[Matrix]
    group: ReduceGroup

    @property
    def first(self) -> ParamView:
        return self.matrices[0].view

    @cached_property
    def cut(self) -> bool:
        """Whether parts have to come together."""
        return any(one.parts[rank].numel for one in self.matrices for rank in one.sources if rank != one.owner)


class Matrices(Backend):
    """Moves parameters whose rule takes whole matrices.

    Args:
        batched: matrices are worked on in batches; else one by one, so that a result does not depend on its neighbours.
        replicas: a group of processes that hold the same plain parameters, and share the work.

    Attributes:
        worked: how many matrices were worked on here, over all steps.
    """

    name: ClassVar[str] = "matrices"

    def __init__(self, batched: bool, replicas: Any) -> None:
        self.batched, self.replicas, self.worked = batched, replicas, 0
        self._planned: tuple[Any, list[Batch]] = (None, [])

    def refuses(self, spec: Spec) -> str:
        return "" if isinstance(spec.view.rule, MatrixRule) else "for rules of whole matrices"

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        of_view = {id(view): g for view, g in zip(views, grads, strict=True)}
        for batch in self.batches(views, scalars):
            self._step_batch(batch, of_view, scalars)  # which keeps nothing of it while the next is worked on

    # -- plan ------------------------------------------------------------------------------------------------------

    def batches(self, views: Sequence[ParamView], scalars: StepScalars) -> list[Batch]:
        """The matrices of these views, the same list as long as they are the same, in the same order everywhere."""
        classes = [scalars.class_key(view) for view in views]
        if self._planned[0] != (list(map(id, views)), classes):
            kinds: dict[Any, int] = {}
            numbers = [kinds.setdefault(key, len(kinds)) for key in classes]
            found = []
            for group, pairs in _together(zip(views, numbers, strict=True), self.replicas):
                matrices = [(one, number) for view, number in pairs for one in matrices_of(view, group)]
                _assign_owners([one for one, _ in matrices], group)
                shared = [pair for pair in matrices if pair[0].shared]
                alone = [pair for pair in matrices if not pair[0].shared and pair[0].mine.numel]
                for own, some in ((group, shared), (ReduceGroup(), alone)):
                    some.sort(key=lambda pair: (pair[1], pair[0].shape))
                    for _, same in groupby(some, key=lambda pair: (pair[1], pair[0].shape)):
                        found += _batches([one for one, _ in same], own)
            self._planned = (list(map(id, views)), classes), found
        return self.planned

    @property
    def planned(self) -> list[Batch]:
        """The batches of the last step."""
        return self._planned[1]

    # -- one batch -------------------------------------------------------------------------------------------------

    def _step_batch(self, batch: Batch, grads: Mapping[int, Tensor], scalars: StepScalars) -> None:
        s = self._scalars(batch.first, scalars)
        parts = [self._input(one, grads[id(one.view)], s, scalars) for one in batch.matrices]
        for one, u in zip(batch.matrices, self._worked(batch, parts, s), strict=True):
            self._move(one, u, s, scalars)

    def _scalars(self, view: ParamView, scalars: StepScalars) -> dict[str, Any]:
        """Those of the rule, and of the step what is the same for all segments."""
        return {k: v for k, v in scalars.named(view).items() if k not in ("step", "decay", "weight_decay")}

    def _input(self, one: Matrix, grad: Tensor, s: Mapping[str, Any], scalars: StepScalars) -> Tensor:
        """The part of the matrix that is held here, [rows, columns]; writes element state."""
        view, part = one.view, one.mine
        rule, row = cast(MatrixRule, view.rule), scalars.rows(view)[one.segment]
        g = part.take(grad, view).to(view.dtype)
        if "clip" in s:
            g = g * s["clip"]
        if row.weight_decay is not None and not scalars.decoupled:
            g = add(g, part.take(local(view.param), view).to(view.dtype), row.weight_decay)
        held = {name: local(tensor) for name, tensor in view.elements.items()}
        rows = {n: Stored(_format(view, n), part.take(tensor, view)) for n, tensor in held.items()}
        old = {n: t.decode(view.dtype) for n, t in rows.items()}
        new, m = rule.input(g, old, s)
        for slot, (name, target) in enumerate(rows.items(), start=1):
            store(target, new[name], s, _noise(one, scalars), slot)
            part.put(held[name], view, target.codes)
        return m

    def _worked(self, batch: Batch, parts: list[Tensor], s: Mapping[str, Any]) -> list[Tensor]:
        """The updates of the parts that are held here; writes whole state."""
        if batch.group.process_group is None:
            whole = torch.stack(parts)
            parts.clear()
            u, small = self._owner(batch, batch.matrices, whole, s)
            found, smalls = list(u.unbind()), [{n: t[i] for n, t in small.items()} for i in range(len(u))]
        else:
            found, smalls = self._shared(batch, parts, s)
        for one, values in zip(batch.matrices, smalls, strict=True):
            for name, value in values.items():
                store(Stored.dense(one.view.own[name][one.places]), value, s, None, 0)
        return found

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

    def _shared(
        self, batch: Batch, parts: list[Tensor], s: Mapping[str, Any]
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The same, where processes share the work: parts to the owners, updates and numbers per row to everybody."""
        me, group, view = torch.distributed.get_rank(), batch.group, batch.first
        rule = cast(MatrixRule, view.rule)
        names = list(view.state_of("whole"))
        wire, (rows, columns) = rule.wire or view.dtype, batch.matrices[0].shape
        mine = [one for one in batch.matrices if one.owner == me]
        nothing = torch.empty(0, dtype=wire, device=view.device)
        whole = torch.empty(len(mine), rows, columns, dtype=view.dtype, device=view.device)
        if batch.cut:
            given = {id(one): part.to(wire) for one, part in zip(batch.matrices, parts, strict=True)}
            outgoing = [[given[id(o)] for o in batch.matrices if o.owner == r and me in o.sources] for r in group.ranks]
            senders = [[(i, o.parts[r]) for i, o in enumerate(mine) if r in o.sources] for r in group.ranks]
            sizes = [[part.numel for _, part in own] for own in senders]
            for own, vectors in zip(senders, group.exchange(outgoing, sizes, nothing), strict=True):
                for (i, part), vector in zip(own, vectors, strict=True):
                    whole[i][part.rows, part.columns] = vector.view(part.shape).to(view.dtype)
        else:
            held = {id(one): part for one, part in zip(batch.matrices, parts, strict=True)}
            for i, one in enumerate(mine):
                whole[i] = held[id(one)]
        parts.clear()
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
        found, smalls = [], []
        for one in batch.matrices:
            of_owner = received[one.owner]
            found.append(next(of_owner).view(one.mine.shape).to(view.dtype))
            smalls.append({name: next(of_owner).clone().view(view.dtype) for name in names})
        return found, smalls

    def _move(self, one: Matrix, u: Tensor, s: Mapping[str, Any], scalars: StepScalars) -> None:
        """p <- decay p - rate u, for the part that is held here."""
        view, row = one.view, scalars.rows(one.view)[one.segment]
        own = {"step": row.rate, **({"ok": s["ok"]} if "ok" in s else {})}
        if row.weight_decay is not None and scalars.decoupled:
            own["decay"] = row.decay
        p = one.mine.take(local(view.param), view)
        update(_GIVEN, own, p, u, [], noise=_noise(one, scalars), cautious=scalars.cautious)
        one.mine.put(local(view.param), view, p)


def _format(view: ParamView, name: str) -> Format:
    return view.formats[name] if not isinstance(view.formats[name], Dense) else Dense.of(view.own[name].dtype)


def _noise(one: Matrix, scalars: StepScalars) -> Noise | None:
    """What stochastic rounding needs of the part that is held here."""
    if not scalars.stochastic:
        return None
    row, column, key = noise_of(one.view, scalars.t(one.view))
    index = (row + column).view(local(one.view.param).shape)
    own = one.mine.take(index, one.view)
    return Noise(own, own.new_zeros(1), key)


# -- where matrices lie ------------------------------------------------------------------------------------------------


def _together(
    pairs: Iterable[tuple[ParamView, int]], replicas: Any
) -> list[tuple[ReduceGroup, list[tuple[ParamView, int]]]]:
    """Views by the processes that share their matrices."""
    found: dict[Any, list[tuple[ParamView, int]]] = {}
    for view, number in pairs:
        mesh = view.shard.mesh
        found.setdefault(mesh if mesh is not None and mesh.size() > 1 else None, []).append((view, number))
    alone = ReduceGroup() if replicas is None else ReduceGroup._from(replicas)
    return [(alone if mesh is None else ReduceGroup.over(mesh), own) for mesh, own in found.items()]


def matrices_of(view: ParamView, group: ReduceGroup) -> list[Matrix]:
    """The matrices of a view, with the parts of them that the processes of a group hold."""
    regions = _regions(view, group)
    me = torch.distributed.get_rank() if regions else -1
    found, begin = [], 0
    for number, (segment, cut) in enumerate(zip(view.segments, view.cuts, strict=True)):
        per_copy = segment.blocks(cut) // segment.copies
        rows, columns = segment.rows // per_copy, segment.shape[segment.inputs[0]]
        index = segment.row_index("cpu")
        for copy in range(segment.copies):
            for k in range(per_copy):
                own = index[k * rows : (k + 1) * rows]
                parts = {rank: _part(view, own, copy, columns, region) for rank, (region, _) in regions.items()}
                here = parts[me] if regions else _part(view, own, copy, columns, view.shard.region)
                replica = {rank: of for rank, (_, of) in regions.items()}
                matrix = Matrix(view, number, (rows, columns), slice(begin, begin + rows), here, parts, replica)
                found.append(matrix)
                begin += rows
    return found


def _regions(view: ParamView, group: ReduceGroup) -> dict[int, tuple[tuple[slice, ...], int]]:
    """By rank of a group, what it holds of a parameter, and the number of the replica that this is a part of."""
    shard = view.shard
    if shard.mesh is None or shard.mesh.size() == 1:
        return {rank: (shard.region, rank) for rank in group.ranks}
    found: dict[int, tuple[tuple[slice, ...], int]] = {}
    replicas: dict[tuple[int, ...], int] = {}
    for place in np.ndindex(*shard.mesh.shape):
        region = region_of(shard.shape, shard.mesh.shape, shard.placements, place)
        replica = tuple(c for d, c in enumerate(place) if d not in shard.cut)
        found[int(shard.mesh.mesh[place])] = region, replicas.setdefault(replica, len(replicas))
    return found


def _part(view: ParamView, rows: Tensor, copy: int, columns: int, region: Sequence[slice]) -> Part:
    """What lies in a region of the parameter of a matrix with these of its output rows."""
    first = view.segments[0]
    out, inputs = region[first.dim], region[first.inputs[0]]
    start, stop = (region[0].start, region[0].stop) if first.stacked else (0, 1)
    held = (rows >= out.start) & (rows < out.stop) & (start <= copy < stop)
    own = rows[held] - out.start
    shape = len(own), inputs.stop - inputs.start
    device = view.device
    places = _as_index(torch.nonzero(held).view(-1), device), _as_index(own, device)
    return Part(places[0], inputs, places[1], copy - start if start <= copy < stop else 0, shape)


def _as_index(numbers: Tensor, device: torch.device) -> Index:
    """A range where they are adjacent, so that what it takes is a view."""
    if not len(numbers):
        return slice(0, 0)
    first, last = int(numbers[0]), int(numbers[-1])
    return slice(first, last + 1) if last - first + 1 == len(numbers) else numbers.to(device)


def _assign_owners(matrices: Sequence[Matrix], group: ReduceGroup) -> None:
    """To each the process with the least to do so far; where one holds all of it, of those that do."""
    load = dict.fromkeys(group.ranks, 0)
    if not load:
        return
    for one in sorted(matrices, key=lambda one: -one.cost):
        whole = [rank for rank in group.ranks if one.parts[rank].shape == one.shape]
        one.owner = min(whole or group.ranks, key=lambda rank: load[rank])
        load[one.owner] += one.cost


def _batches(matrices: Sequence[Matrix], group: ReduceGroup) -> list[Batch]:
    """Matrices of one shape in batches that memory can hold, and in which every process has something to do."""
    size = matrices[0].shape[0] * matrices[0].shape[1] * matrices[0].view.dtype.itemsize
    n, processes = max(1, BATCH // max(size, 1)), max(1, len(group.ranks))
    n = n * processes if matrices[0].view.shard.cut else max(n, processes)  # replicas hold all of each
    return [Batch(list(matrices[i : i + n]), group) for i in range(0, len(matrices), n)]
