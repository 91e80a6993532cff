"""What one process of several holds of a model, without the others: as FSDP2 and tensor parallelism cut parameters."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from sharpwise.blocks import BlockMap, Segment, canonical_name
from sharpwise.shards import Shard, region_of

How = Literal["replicate", "fsdp", "tp"]
SHARDS: tuple[How, ...] = get_args(How)
"""Replicas with the same parameters (DDP), FSDP2, tensor parallelism."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of a parameter that one process holds.

    Attributes:
        held: on the meta device; segments: of the whole parameter.
    """

    name: str
    held: Tensor
    shard: Shard
    segments: tuple[Segment, ...]

    @cached_property
    def kind(self) -> Hashable:
        """Pieces of one kind, moved by one rule and cut alike, have state of one size: the layers of a model."""
        plain = tuple(replace(s, name="", layer=None, source="", tied=()) for s in self.segments)
        tied = any(s.tied for s in self.segments)
        return plain, tied, tuple(self.held.shape), self.held.dtype, self.shard.offset

    @property
    def bytes(self) -> int:
        """Of what is held."""
        return self.held.numel() * self.held.element_size()


class _Mesh(NamedTuple):
    """What a shard asks of a mesh of one dimension."""

    shape: tuple[int]

    def size(self, dim: int) -> int:
        return self.shape[dim]


class _Cut(NamedTuple):
    """A placement: cut along a dimension of the tensor, or (None) replicated."""

    dim: int | None

    def is_replicate(self) -> bool:
        return self.dim is None


def cut_dimensions(model: nn.Module, processes: int, how: How) -> dict[str, int]:
    """Along which dimension parameters are cut, by name; those that are not are whole in every process.

    Raises:
        ValueError: for a model without a plan for tensor parallelism, or one that so many processes do not divide.
    """
    if processes == 1 or how == "replicate":
        return {}
    if how == "fsdp":
        return {canonical_name(name): 0 for name, _ in model.named_parameters()}
    from sharpwise.train.parallel import tensor_parallel_cuts

    return tensor_parallel_cuts(model, processes)


def pieces_of(
    model: nn.Module, blocks: BlockMap, processes: int, cut: Mapping[str, int], rank: int, dtype: torch.dtype | None
) -> list[Piece]:
    """The parameters of a model as one of so many processes holds them.

    Args:
        dtype: of the parameters; None for the one that they have.
    """
    mesh: Any = _Mesh((processes,))
    found = []
    for name, parameter in model.named_parameters():
        name, shape = canonical_name(name), tuple(parameter.shape)
        placements: tuple[Any, ...] = (_Cut(cut.get(name) if shape else None),)
        region = region_of(shape, mesh.shape, placements, (rank,))
        sizes = [part.stop - part.start for part in region]
        held = torch.empty(sizes, dtype=dtype or parameter.dtype, device="meta", requires_grad=parameter.requires_grad)
        found.append(Piece(name, held, Shard(shape, region, mesh, placements), blocks[name]))
    return found
