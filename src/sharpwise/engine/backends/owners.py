"""Where whole matrices lie in parameters, who works on which, and in which batches."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpwise.engine.mesh import ReduceGroup
from sharpwise.engine.view import ParamView
from sharpwise.shards import region_of

BATCH = 1 << 26
"""Bytes that one process holds of a batch of matrices at the most, unless one matrix is larger. The work on them takes
three times that, besides their own."""

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

    def of(self, tensor: Tensor, view: ParamView) -> Tensor:
        """All rows of the matrix's copy in a local tensor of the parameter's shape, outputs first."""
        first = view.segments[0]
        if first.merged:
            return tensor.view(-1, tensor.shape[-1])
        one = tensor[self.copy] if first.stacked else tensor
        return one if first.dim == first.stacked else one.mT


@dataclass(eq=False)
class Matrix:
    """One matrix of a parameter: rows of one role, of one stacked copy, of one head if it is cut so.

    Attributes:
        segment: its number in the view; shape: rows are outputs; places: where its numbers per row lie in whole state.
        parts: by rank, in a group; `mine` is that of this process. replica: by rank, which one it is part of.
        owner: a rank of the group, -1 where there is none.
        x: a tensor like the local one of the parameter, from which the matrix is taken, and where its update is put.
    """

    view: ParamView
    segment: int
    shape: tuple[int, int]
    places: slice
    mine: Part
    parts: Mapping[int, Part] = field(default_factory=dict)
    replica: Mapping[int, int] = field(default_factory=dict)
    owner: int = -1
    x: Tensor = field(init=False)

    @property
    def cost(self) -> int:
        """Of orthogonalizing it, in products."""
        return self.shape[0] * self.shape[1] * min(self.shape)

    @property
    def shared(self) -> bool:
        """Whether another process than the owner holds a part, or its numbers per row."""
        told = "whole" in self.view.rule.state.values()
        return any(told or part.numel for rank, part in self.parts.items() if rank != self.owner)

    def take(self) -> Tensor:
        """The part that is here: a view, unless its rows are scattered."""
        part = self.mine
        return part.of(self.x, self.view)[part.own_rows] if part.numel else self.x.new_empty(part.shape)

    @property
    def scattered(self) -> bool:
        """Whether what is taken is a copy."""
        return isinstance(self.mine.own_rows, Tensor)

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

    def in_place(self) -> Tensor | None:
        """All of them as one view [n, rows, columns], where they are contiguous and equally spaced in the scratch."""
        if any(one.scattered for one in self.matrices):
            return None
        parts = [one.take() for one in self.matrices]
        begin = parts[0].storage_offset()
        step = parts[1].storage_offset() - begin if len(parts) > 1 else 0
        if not all(own.is_contiguous() and own.storage_offset() == begin + i * step for i, own in enumerate(parts)):
            return None
        return parts[0].as_strided((len(parts), *parts[0].shape), (step, *parts[0].stride()), begin)

    def put(self, updates: Sequence[Tensor]) -> None:
        """Write the parts that are here."""
        pairs = [(one, u) for one, u in zip(self.matrices, updates, strict=True) if one.mine.numel]
        for one, u in pairs:
            if one.scattered:
                one.mine.of(one.x, one.view)[one.mine.own_rows] = u
        near = [(one.take(), u) for one, u in pairs if not one.scattered]
        if near:
            torch._foreach_copy_([target for target, _ in near], [u for _, u in near])


# -- where matrices lie ------------------------------------------------------------------------------------------------


def together(views: Iterable[ParamView], replicas: Any) -> list[tuple[ReduceGroup, list[ParamView]]]:
    """Views by the processes that share their matrices."""
    found: dict[Any, list[ParamView]] = {}
    for view in views:
        mesh = view.shard.mesh
        found.setdefault(mesh if mesh is not None and mesh.size() > 1 else None, []).append(view)
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
    out, inputs = first.rows_in(region), region[first.inputs[0]]
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


def assign_owners(matrices: Sequence[Matrix], group: ReduceGroup) -> None:
    """To each the process with the least to do so far; where one holds all of it, of those that do."""
    load = dict.fromkeys(group.ranks, 0)
    if not load:
        return
    for one in sorted(matrices, key=lambda one: -one.cost):
        whole = [rank for rank in group.ranks if one.parts[rank].shape == one.shape]
        one.owner = min(whole or group.ranks, key=lambda rank: load[rank])
        load[one.owner] += one.cost


def batches(matrices: Sequence[Matrix], group: ReduceGroup) -> list[Batch]:
    """Matrices of one shape in batches that memory can hold, and in which every process has something to do."""
    size = matrices[0].shape[0] * matrices[0].shape[1] * matrices[0].view.dtype.itemsize
    n, processes = max(1, BATCH // max(size, 1)), max(1, len(group.ranks))
    n = n * processes if matrices[0].view.shard.cut else max(n, processes)  # replicas hold all of each
    return [Batch(list(matrices[i : i + n]), group) for i in range(0, len(matrices), n)]


def chunks(
    views: Sequence[ParamView], matrices: Sequence[Sequence[Matrix]], group: ReduceGroup
) -> list[tuple[list[ParamView], list[Matrix]]]:
    """Views of one group with their matrices, as many at a time as memory can hold; the same in every process."""
    found: list[tuple[list[ParamView], list[Matrix]]] = []
    processes = max(1, len(group.ranks))
    held = 0
    for view, own in zip(views, matrices, strict=True):
        size = math.prod(view.shard.shape) * view.dtype.itemsize // (processes if view.shard.cut else 1)
        last = found[-1] if found else ([], [])
        full = held + size > BATCH and (bool(view.shard.cut) or len(last[1]) >= processes)
        if not last[0] or full or (last[0][0].device, last[0][0].dtype) != (view.device, view.dtype):
            last, held = ([], []), 0
            found.append(last)
        last[0].append(view)
        last[1].extend(own)
        held += size
    return found
