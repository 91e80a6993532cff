"""Shards: what part of a parameter this process holds, and what is worked out together with those that hold the rest.

Knows DTensors on meshes where each dimension cuts or replicates: FSDP2, HSDP, tensor parallelism and their
combinations. `torch.distributed` is never imported here; it is there already if a DTensor is.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from sharpwise.rules.base import Part

Op = Literal["sum", "max"]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing `torch.distributed.tensor`."""
    if type(tensor) in (Tensor, Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The plain tensor that this process holds; state and gradients themselves, parameters detached."""
    inner: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return inner.detach() if inner.requires_grad else inner


def like(tensor: Tensor, plain: Tensor) -> Tensor:
    """`plain` as a DTensor placed as `tensor` is, or as it stands."""
    if not is_dtensor(tensor):
        return plain
    dtensor: Any = tensor
    result: Tensor = type(dtensor).from_local(
        plain, dtensor.device_mesh, dtensor.placements, run_check=False, shape=dtensor.shape, stride=dtensor.stride()
    )
    return result


def place_gradient(param: Tensor) -> None:
    """Lay the gradient out as its parameter is, which completes partial sums; tensor parallelism may leave others."""
    grad: Any = param.grad
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        param.grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Shard(Part):
    """The part of a tensor that this process holds, and where the others are.

    Attributes:
        mesh, placements: of the DTensor, None and () for a plain tensor.
    """

    mesh: Any = None
    placements: tuple[Any, ...] = ()

    @staticmethod
    def of(tensor: Tensor) -> "Shard":
        """The shard of this process; plain tensors are whole.

        Raises:
            ValueError: for a parameter placed in a way that no one knows here.
        """
        shape = tuple(tensor.shape)
        if not is_dtensor(tensor):
            return Shard(shape, tuple(slice(0, n) for n in shape))
        dtensor: Any = tensor
        mesh, placements = dtensor.device_mesh, tuple(dtensor.placements)
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"a parameter is placed as {placements}: partial sums are no parameter; place it as Shard or "
                f"Replicate, as fully_shard(model) does"
            )
        here = mesh.get_coordinate()
        if here is None:
            raise ValueError(
                f"a parameter lies on a mesh, {mesh}, that this process is no part of; build the optimizer in the "
                f"processes of the mesh alone"
            )
        region = region_of(shape, mesh.shape, placements, here)
        held = tuple(dtensor._local_tensor.shape)
        if held != tuple(part.stop - part.start for part in region):
            raise ValueError(
                f"a parameter of shape {shape}, placed as {placements} on a mesh of {tuple(mesh.shape)}, holds "
                f"{held} at {here}, where {region} was expected: such placements are not supported, those of "
                f"fully_shard(model) are"
            )
        return Shard(shape, region, mesh, placements)

    @property
    def offset(self) -> tuple[int, ...]:
        """Of the local tensor in the whole one, per dimension."""
        return tuple(part.start for part in self.region)

    @cached_property
    def cut(self) -> tuple[int, ...]:
        """Dimensions of the mesh along which the tensor is cut, () if this process holds all of it."""
        # `_StridedShard.is_shard()` is False: ask for what is not replicated.
        placed = enumerate(self.placements)
        return tuple(d for d, placement in placed if not placement.is_replicate() and self.mesh.size(d) > 1)

    @cached_property
    def holders(self) -> tuple[int, ...]:
        """Ranks that together hold the tensor once, this process among them, as the mesh has them; () if not cut."""
        if not self.cut:
            return ()
        here = self.mesh.get_coordinate()
        mine = self.mesh.mesh[tuple(slice(None) if d in self.cut else here[d] for d in range(self.mesh.ndim))]
        return tuple(mine.flatten().tolist())

    def region_at(self, rank: int) -> tuple[slice, ...]:
        """Where the local tensor of one of the holders lies."""
        coordinate = (self.mesh.mesh == rank).nonzero()[0].tolist()
        return region_of(self.shape, self.mesh.shape, self.placements, coordinate)


def region_of(
    shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Any], coordinate: Sequence[int]
) -> tuple[slice, ...]:
    """Where the part of one place in a mesh lies. Chunks are as those of `torch.chunk`: the last ones may be empty.

    FSDP2 over tensor parallelism cuts again what that has cut, although its dimension of the mesh comes first: it says
    so by `_StridedShard`, which therefore comes last here.
    """
    region = [[0, n] for n in shape]
    later = [d for d, placement in enumerate(placements) if type(placement).__name__ == "_StridedShard"]
    first = [d for d, placement in enumerate(placements) if d not in later and not placement.is_replicate()]
    for d in (*first, *reversed(later)):
        start, stop = region[placements[d].dim]
        size = -(-(stop - start) // mesh[d])
        begin = min(start + coordinate[d] * size, stop)
        region[placements[d].dim] = [begin, min(begin + size, stop)]
    return tuple(slice(*part) for part in region)


@dataclass(eq=False)
class Share:
    """What this process has to say about a whole parameter; after `Bucket.reduce`, what all of them say together."""

    values: Tensor
    shard: Shard


@dataclass(frozen=True)
class Team:
    """All processes that hold parts of some parameters: what they work out together takes one collective.

    Attributes:
        group: None if nothing is cut.
        ranks: of the group, in its order.
    """

    group: Any = None
    ranks: tuple[int, ...] = ()

    @staticmethod
    def of(shards: Iterable[Shard]) -> "Team":
        """The smallest group that holds them all. Every process of the mesh has to ask at the same time.

        Raises:
            ValueError: for meshes of which none spans the others.
        """
        cut = [shard for shard in shards if shard.cut]
        if not cut:
            return Team()
        if len({shard.holders for shard in cut}) == 1 and len(cut[0].cut) == 1:
            return Team._from(cut[0].mesh.get_group(cut[0].cut[0]))
        # Some are cut twice, or along different dimensions of the mesh: the widest mesh has all these processes.
        widest = max((shard.mesh for shard in cut), key=lambda mesh: mesh.size())
        ranks = set(widest.mesh.flatten().tolist())
        if not all(ranks >= set(shard.holders) for shard in cut):
            raise ValueError("parameters lie on meshes of which none spans the others; take slices of one mesh")
        if len(ranks) == torch.distributed.get_world_size():
            return Team._from(torch.distributed.group.WORLD)
        return Team._from(widest._flatten().get_group())

    @staticmethod
    def _from(group: Any) -> "Team":
        return Team(group, tuple(torch.distributed.get_process_group_ranks(group)))

    def counts(self, shard: Shard) -> bool:
        """Whether what this process holds is counted. Of copies within the team one is: that of the first process."""
        return not shard.cut or min(self.ranks) in shard.holders

    def reduce(self, values: Tensor, op: Op) -> Tensor:
        """The sum or the maximum over the processes, in place: one collective, none if nothing is cut."""
        if self.group is not None:
            how = torch.distributed.ReduceOp.SUM if op == "sum" else torch.distributed.ReduceOp.MAX
            torch.distributed.all_reduce(values, op=how, group=self.group)
        return values


class Bucket:
    """Shares that are summed up, or of which the maximum is taken, over the processes: one collective for all."""

    def __init__(self, team: Team, op: Op = "sum") -> None:
        self.team, self.op = team, op
        self._shares: list[Share] = []

    def add(self, values: Tensor, shard: Shard) -> Share:
        """Put in what this process has to say; of the same shape in every process."""
        share = Share(values, shard)
        if shard.cut:  # else it is complete as it is
            self._shares.append(share)
        return share

    def reduce(self) -> None:
        """Complete all shares."""
        if not self._shares:
            return
        counted = [self.op == "max" or self.team.counts(share.shard) for share in self._shares]
        values = [s.values if c else torch.zeros_like(s.values) for s, c in zip(self._shares, counted, strict=True)]
        flat = self.team.reduce(torch.cat([v.reshape(-1).double() for v in values]), self.op)
        for share, piece in zip(self._shares, flat.split([v.numel() for v in values]), strict=True):
            share.values = piece.view(share.values.shape).to(share.values.dtype)


class Exchange:
    """Whole matrices at one owner each, and back. Owners are dealt out by size, so that none has much more than others.

    Where nothing is cut every process holds the whole: it does the work itself.
    """

    def __init__(self, team: Team, shards: Sequence[Shard]) -> None:
        self.team, self.shards = team, shards
        self.owners = self._deal()

    def _deal(self) -> list[int]:
        """The rank of the owner of each. Copies in other processes have owners there, at the same place."""
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

    def run(self, parts: Sequence[Tensor], work: Sequence[Any]) -> list[Tensor]:
        """`work[i]` of every whole matrix, of which `parts[i]` is the local part; the local parts of the results.

        Two collectives for all of them, if any is cut.
        """
        cut = [i for i, shard in enumerate(self.shards) if shard.cut]
        results = [part if self.shards[i].cut else work[i](part) for i, part in enumerate(parts)]
        if not cut:
            return results
        wholes, incoming, outgoing = self._bring(parts, cut)
        done = {i: work[i](whole) for i, whole in wholes.items()}
        back = [[done[i][self.shards[i].region_at(rank)] for i in own] for rank, own in self._by_rank(incoming)]
        returned = self._trade(back, [[tuple(t.shape) for t in tensors] for tensors in outgoing])
        for rank, tensors in zip(self.team.ranks, returned, strict=True):
            for i, tensor in zip([i for i in cut if self.owners[i] == rank], tensors, strict=True):
                results[i] = tensor
        return results

    def ask(self, parts: Sequence[Tensor], work: Sequence[Any], sizes: Sequence[int]) -> list[Tensor]:
        """`work[i]` of every whole matrix: fp64 [sizes[i]], the same in every process.

        Two collectives for all of them, if any is cut.
        """
        cut = [i for i, shard in enumerate(self.shards) if shard.cut]
        wholes = self._bring(parts, cut)[0] if cut else {}
        bucket, shares = Bucket(self.team), []
        for i, (part, shard) in enumerate(zip(parts, self.shards, strict=True)):
            if not shard.cut:
                values = work[i](part)
            elif i in wholes:
                values = work[i](wholes[i])
            else:
                values = part.new_zeros(sizes[i], dtype=torch.float64)
            shares.append(bucket.add(values, shard))
        bucket.reduce()
        return [share.values for share in shares]

    def _bring(
        self, parts: Sequence[Tensor], cut: Sequence[int]
    ) -> tuple[dict[int, Tensor], list[list[int]], list[list[Tensor]]]:
        """The whole matrices that this process owns; which parts came from every process, and what went there."""
        me = torch.distributed.get_rank()
        self._nothing = parts[cut[0]].new_empty(0)
        mine = [i for i in cut if self.owners[i] == me]
        # To every owner the parts of what it owns, in the order of the list; from every holder its parts of mine.
        outgoing = [[parts[i] for i in cut if self.owners[i] == rank] for rank in self.team.ranks]
        incoming = [[i for i in mine if rank in self.shards[i].holders] for rank in self.team.ranks]
        received = self._trade(outgoing, [[self._shape(i, rank) for i in own] for rank, own in self._by_rank(incoming)])
        wholes = {i: parts[i].new_empty(self.shards[i].shape) for i in mine}
        for (rank, own), tensors in zip(self._by_rank(incoming), received, strict=True):
            for i, tensor in zip(own, tensors, strict=True):
                wholes[i][self.shards[i].region_at(rank)] = tensor
        return wholes, incoming, outgoing

    def _by_rank(self, lists: Sequence[list[int]]) -> list[tuple[int, list[int]]]:
        return list(zip(self.team.ranks, lists, strict=True))

    def _shape(self, i: int, rank: int) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.shards[i].region_at(rank))

    def _trade(
        self, outgoing: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Tensors to every process of the team, and those of these shapes from every one: one collective."""
        sent = [[t.reshape(-1) for t in tensors] for tensors in outgoing]
        sizes = [[torch.Size(shape).numel() for shape in own] for own in shapes]
        flat = torch.cat([self._nothing, *(t for tensors in sent for t in tensors)])
        into = flat.new_empty(sum(map(sum, sizes)))
        torch.distributed.all_to_all_single(
            into, flat, list(map(sum, sizes)), [sum(len(t) for t in own) for own in sent], group=self.team.group
        )
        found = []
        for piece, own, named in zip(into.split(list(map(sum, sizes))), sizes, shapes, strict=True):
            found.append([t.view(shape) for t, shape in zip(piece.split(own), named, strict=True)])
        return found
