"""Shards: what part of a parameter this process holds, and the sums over all of them.

Only what the element-wise and the block rules need today: DTensors on meshes where each dimension shards or
replicates. `torch.distributed` is never imported here; it is there already if a DTensor is.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
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


def like(tensor: Tensor, plain: Tensor) -> Tensor:
    """`plain` as a DTensor placed as `tensor` is, or as it stands."""
    if not is_dtensor(tensor):
        return plain
    dtensor: Any = tensor
    result: Tensor = type(dtensor).from_local(
        plain, dtensor.device_mesh, dtensor.placements, run_check=False, shape=dtensor.shape, stride=dtensor.stride()
    )
    return result


@dataclass(frozen=True)
class Shard:
    """Place of a local tensor in the global one: offset per dimension, and the groups that hold the other parts."""

    offset: tuple[int, ...]
    groups: tuple[Any, ...] = ()

    @staticmethod
    def of(tensor: Tensor) -> "Shard":
        """The shard of this process; plain tensors are whole."""
        if not is_dtensor(tensor):
            return Shard((0,) * tensor.ndim)
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        dtensor: Any = tensor
        mesh, placements = dtensor.device_mesh, dtensor.placements
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"a parameter is placed as {placements}: partial sums are no parameter")
        _, offset = compute_local_shape_and_global_offset(dtensor.shape, mesh, placements)
        # `_StridedShard.is_shard()` is False: ask for what is not replicated.
        cut = [d for d, placement in enumerate(placements) if not placement.is_replicate()]
        return Shard(tuple(offset), tuple(mesh.get_group(d) for d in cut if mesh.size(d) > 1))


def reduces_late(tensor: Tensor) -> bool:
    """Whether a DTensor still holds partial sums."""
    return is_dtensor(tensor) and any(placement.is_partial() for placement in tensor.placements)  # type: ignore[attr-defined]


def all_reduce(values: Tensor, groups: Sequence[Any]) -> None:
    """Sum over every group in turn, in place: one collective per sharded mesh dimension."""
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
