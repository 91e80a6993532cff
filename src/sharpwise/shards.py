"""Shards: what part of a tensor this process holds. The ground that everything else stands on.

Knows DTensors on meshes where each dimension cuts or replicates: FSDP2, HSDP, tensor parallelism and their
combinations. `torch.distributed` is never imported here; it is there already if a DTensor is.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.nn import Parameter


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


def like(tensor: Tensor, plain: Tensor, lead: int | None = None) -> Tensor:
    """`plain` as a DTensor placed as `tensor` is, or as it stands.

    Args:
        lead: how many of its first dimensions are those of `tensor`; the rest is whole in every process.
    """
    if not is_dtensor(tensor):
        return plain
    dtensor: Any = tensor
    shape, stride, placements = dtensor.shape, dtensor.stride(), dtensor.placements
    if lead is not None:
        from torch.distributed.tensor import Replicate

        placements = [p if p.is_replicate() or p.dim < lead else Replicate() for p in placements]
        shape = (*shape[:lead], *plain.shape[lead:])
        stride = Tensor.new_empty(plain, shape, device="meta").stride()
    result: Tensor = type(dtensor).from_local(
        plain, dtensor.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return result


def place_gradient(param: Tensor) -> None:
    """Lay the gradient out as its parameter is, which completes partial sums; tensor parallelism may leave others."""
    grad: Any = param.grad
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        param.grad = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Part:
    """Which part of a parameter of shape `shape` is at hand: a range per dimension."""

    shape: tuple[int, ...]
    region: tuple[slice, ...]


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
