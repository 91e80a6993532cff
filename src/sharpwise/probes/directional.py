"""Curvature along a direction, per block: how far a rule may go the way it goes.

    S(b) = u_b^T G u_b / |u_b|^2        u_b: the direction, 0 outside of block b

The mean of the diagonal says what a random step of block b costs; this says what the step costs that is taken, whose
elements do not come independently. One product with the Gauss-Newton matrix G per block.

Reference: Schraudolph, Fast curvature matrix-vector products, 2002 (the products).
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharpwise.block_lr.blockwise import argument_of
from sharpwise.blocks import BlockMap, canonical_name
from sharpwise.probes.estimate import Cost, Estimate, Measurement
from sharpwise.probes.fisher import sharpness_by_name
from sharpwise.probes.hessian import norm_11
from sharpwise.probes.parts import Group, by_name, groups, trained_now
from sharpwise.probes.products import Curvature, Operator
from sharpwise.probes.subject import Tied

_WHO = "directional"
_FEWEST = 20
"""Cauchy vectors: the least that `norm_11` takes."""


def directional(
    matrix: Operator, direction: Mapping[str, Tensor], *, by: Literal["model", "type", "role", "segment"] = "type"
) -> Measurement:
    """u^T A u / |u|^2 of every block, u being the direction where the block is, and 0 elsewhere.

    Args:
        matrix: a `Curvature`, of which only the diagonal blocks matter.
        direction: tensors of the parameters' shapes, by name; those that are not there are 0.
        by: what a block is.

    Returns:
        Quantity "directional curvature", in the Hessian's units; NaN of a block in which nothing moves.

    Raises:
        ValueError: a tensor of another shape than its parameter, or one of another model.
        FloatingPointError: for a product that is not finite.

    Example:
        >>> from torch import nn
        >>> from sharpwise.probes import Curvature
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> matrix = Curvature(model, torch.tensor([[0, 1, 2, 3, 4]]), "gauss-newton")
        >>> found = directional(matrix, {"1.weight": torch.randn(5, 4)}, by="segment")
        >>> [e.of for e in found if e.value > 0]
        ['1.weight']
    """
    started, before = time.perf_counter(), matrix.gradients
    found = _along(matrix, direction, groups(matrix.selection.segments, (by,)))
    cost = Cost(time.perf_counter() - started, matrix.gradients - before)
    return Measurement(_WHO, found, settings={**matrix.settings(), "by": by}, cost=cost, warnings=matrix.warnings)


def _along(matrix: Operator, direction: Mapping[str, Tensor], blocks: Sequence[Group]) -> list[Estimate]:
    u, sizes = _flat(matrix, direction), matrix.selection.sizes
    found = []
    with matrix.kept():
        for block in blocks:
            members = {*block.members}
            pieces = [part if i in members else torch.zeros_like(part) for i, part in enumerate(u.split(sizes))]
            v = torch.cat(pieces)
            square = float(v.double().square().sum())
            value = float((v.double() * (matrix @ v).double()).sum()) / square if square else math.nan
            about = (block.layer, 1, block.elements)
            found.append(Estimate("directional curvature", block.by, block.of, value, 0.0, "exact", *about))
    return found


def _flat(matrix: Operator, direction: Mapping[str, Tensor]) -> Tensor:
    """The direction as a vector of the matrix."""
    given = {canonical_name(name): tensor for name, tensor in direction.items()}
    selection, whole = matrix.selection, {}
    for segment, name in zip(selection.segments, selection.names, strict=True):
        own = given.get(segment.name, torch.zeros((), device="cpu"))
        if own.dim() and tuple(own.shape) != segment.shape:
            raise ValueError(
                f"{_WHO}: the direction of {segment.name} has shape {tuple(own.shape)}, the parameter {segment.shape}"
            )
        whole[name] = own.to(matrix.device, matrix.dtype).expand(segment.shape)
    return selection.gather(whole)


def probed(
    model: nn.Module,
    batches: Any,
    blocks: BlockMap,
    *,
    seed: int = 0,
    statistic: Literal["sharpness", "directional", "norm_11"] = "sharpness",
    by: Literal["type", "module"] = "type",
    tied: Tied = "both",
    updates: Mapping[str, Tensor] | None = None,
) -> dict[str, list[float]]:
    """A statistic of what is trained now, as a block_lr asks for it: by name of the parameter, one value per segment.

    Args:
        statistic: "sharpness", "directional" along the `updates`, one value for all segments of a type (or each its
            own, by="module"), or "norm_11" of the Gauss-Newton matrix.

    Raises:
        ValueError: as the probes.
    """
    if statistic == "sharpness":
        return sharpness_by_name(model, batches, blocks, seed=seed, tied=tied)
    trained = trained_now(model, blocks)
    matrix = Curvature(model, batches, "gauss-newton", blocks=trained, tied=tied)
    if statistic == "norm_11":
        return by_name(norm_11(matrix, samples=_FEWEST, seed=seed), trained)
    assert updates is not None
    if by == "module":
        return by_name(directional(matrix, updates, by="segment"), trained)
    kinds = [argument_of(s) for s in matrix.selection.segments]  # positions are a type of their own
    members = {kind: tuple(i for i, own in enumerate(kinds) if own == kind) for kind in kinds}
    found = _along(matrix, updates, [Group("type", kind, None, own, 0) for kind, own in members.items()])
    values = {estimate.of: estimate.value for estimate in found}
    return {name: [values[argument_of(s)] for s in trained[name]] for name in trained.names()}


__all__ = ["directional", "probed"]
