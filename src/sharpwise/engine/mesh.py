"""Collectives over the processes that hold parts of parameters: reductions, and exchanges of whole tensors.

`torch.distributed` is never imported here; it is there already if a DTensor is.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sharpwise.shards import Shard

Op = Literal["sum", "max"]


@dataclass(eq=False)
class Partial:
    """This process's term of a sum or maximum over a whole parameter; after `Bucket.reduce`, the complete one."""

    values: Tensor
    shard: Shard


@dataclass(frozen=True)
class ReduceGroup:
    """All processes that hold parts of some parameters: one collective serves them all.

    Attributes:
        process_group: torch's; None if nothing is cut.
        ranks: of the group, in its order.
    """

    process_group: Any = None
    ranks: tuple[int, ...] = ()

    @staticmethod
    def of(shards: Iterable[Shard]) -> "ReduceGroup":
        """The smallest group that holds them all. Collective over the mesh.

        Raises:
            ValueError: for meshes of which none spans the others.
        """
        cut = [shard for shard in shards if shard.cut]
        if not cut:
            return ReduceGroup()
        if len({shard.holders for shard in cut}) == 1 and len(cut[0].cut) == 1:
            return ReduceGroup._from(cut[0].mesh.get_group(cut[0].cut[0]))
        # Some are cut twice, or along different dimensions of the mesh: the widest mesh has all these processes.
        widest = max((shard.mesh for shard in cut), key=lambda mesh: mesh.size())
        ranks = set(widest.mesh.flatten().tolist())
        if not all(ranks >= set(shard.holders) for shard in cut):
            raise ValueError("parameters lie on meshes of which none spans the others; take slices of one mesh")
        return ReduceGroup.over(widest)

    @staticmethod
    def over(mesh: Any) -> "ReduceGroup":
        """All processes of a mesh. Collective over it, at the first time."""
        if mesh.ndim == 1:
            return ReduceGroup._from(mesh.get_group())
        if mesh.size() == torch.distributed.get_world_size():
            return ReduceGroup._from(torch.distributed.group.WORLD)
        return ReduceGroup._from(mesh._flatten().get_group())

    @staticmethod
    def _from(group: Any) -> "ReduceGroup":
        return ReduceGroup(group, tuple(torch.distributed.get_process_group_ranks(group)))

    def counts(self, shard: Shard) -> bool:
        """Whether the part here enters a sum: of replicas within the group, that of the first process does."""
        return not shard.cut or min(self.ranks) in shard.holders

    def reduce(self, values: Tensor, op: Op) -> Tensor:
        """The sum or the maximum over the processes, in place: one collective, none if nothing is cut."""
        if self.process_group is not None:
            how = torch.distributed.ReduceOp.SUM if op == "sum" else torch.distributed.ReduceOp.MAX
            torch.distributed.all_reduce(values, op=how, group=self.process_group)
        return values

    def exchange(
        self, outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[int]], nothing: Tensor
    ) -> list[list[Tensor]]:
        """Send tensors to every process of the group, receive vectors of these sizes from every one: one collective.

        nothing: of their type, on their device, for a process that sends none.
        """
        flat = torch.cat([nothing, *(t.reshape(-1) for tensors in outgoing for t in tensors)])
        received = list(map(sum, sizes))
        into = flat.new_empty(sum(received))
        sent = [sum(t.numel() for t in own) for own in outgoing]
        torch.distributed.all_to_all_single(into, flat, received, sent, group=self.process_group)
        return [list(piece.split(list(own))) for piece, own in zip(into.split(received), sizes, strict=True)]


class Bucket:
    """Sums or maxima over the processes, reduced in one collective."""

    def __init__(self, group: ReduceGroup, op: Op = "sum") -> None:
        self.group, self.op = group, op
        self._partials: list[Partial] = []

    def add(self, values: Tensor, shard: Shard) -> Partial:
        """Add this process's term, of the same shape in every process."""
        partial = Partial(values, shard)
        if shard.cut:  # else it is complete as it is
            self._partials.append(partial)
        return partial

    def reduce(self) -> None:
        """Complete all of them."""
        if not self._partials:
            return
        counted = [self.op == "max" or self.group.counts(partial.shard) for partial in self._partials]
        values = [p.values if c else torch.zeros_like(p.values) for p, c in zip(self._partials, counted, strict=True)]
        here = values[0].device
        flat = self.group.reduce(torch.cat([v.reshape(-1).to(here, torch.float64) for v in values]), self.op)
        for partial, piece in zip(self._partials, flat.split([v.numel() for v in values]), strict=True):
            partial.values = piece.view(partial.values.shape).to(partial.values)


class OwnerExchange:
    """Whole tensors at one owner each. Owners are assigned by size, so that their loads are alike.

    Where nothing is cut every process holds the whole: it does the work itself.
    """

    def __init__(self, group: ReduceGroup, shards: Sequence[Shard]) -> None:
        self.group, self.shards = group, shards
        self.owners = self._assigned()

    def _assigned(self) -> list[int]:
        """The rank of the owner of each. Replicas on other processes have owners there, at the same place."""
        # By place among the holders: other processes of the mesh, with holders of their own, have to find the same.
        load: dict[int, int] = {}
        owners = [-1] * len(self.shards)
        sizes = [torch.Size(shard.shape).numel() for shard in self.shards]
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            holders = self.shards[i].holders
            if holders:
                place = min(range(len(holders)), key=lambda place: load.get(place, 0))
                owners[i] = holders[place]
                load[place] = load.get(place, 0) + sizes[i]
        return owners

    def reduce(self, parts: Sequence[Tensor], work: Sequence[Any], sizes: Sequence[int]) -> list[Tensor]:
        """`work[i]` of every whole matrix: fp64 [sizes[i]], the same in every process.

        Two collectives for all of them, if any is cut.
        """
        cut = [i for i, shard in enumerate(self.shards) if shard.cut]
        wholes = self._gather(parts, cut) if cut else {}
        bucket, partials = Bucket(self.group), []
        for i, (part, shard) in enumerate(zip(parts, self.shards, strict=True)):
            if not shard.cut:
                values = work[i](part)
            elif i in wholes:
                values = work[i](wholes[i])
            else:
                values = part.new_zeros(sizes[i], dtype=torch.float64)
            partials.append(bucket.add(values, shard))
        bucket.reduce()
        return [partial.values for partial in partials]

    def _gather(self, parts: Sequence[Tensor], cut: Sequence[int]) -> dict[int, Tensor]:
        """The whole tensors owned here."""
        me, ranks = torch.distributed.get_rank(), self.group.ranks
        mine = [i for i in cut if self.owners[i] == me]
        # To every owner the parts of what it owns, in the order of the list; from every holder its parts of mine.
        outgoing = [[parts[i] for i in cut if self.owners[i] == rank] for rank in ranks]
        incoming = [[i for i in mine if rank in self.shards[i].holders] for rank in ranks]
        sizes = [[self._numel(i, rank) for i in own] for rank, own in zip(ranks, incoming, strict=True)]
        received = self.group.exchange(outgoing, sizes, parts[cut[0]].new_empty(0))
        wholes = {i: parts[i].new_empty(self.shards[i].shape) for i in mine}
        for rank, own, vectors in zip(ranks, incoming, received, strict=True):
            for i, vector in zip(own, vectors, strict=True):
                place = wholes[i][self.shards[i].region_at(rank)]
                place.copy_(vector.view(place.shape))
        return wholes

    def _numel(self, i: int, rank: int) -> int:
        return math.prod(part.stop - part.start for part in self.shards[i].region_at(rank))
