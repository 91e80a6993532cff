"""Matrices around the layers: what begins the stream, what scales and shifts it, and convolutions."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.attend import weighs
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.infer import MANY, QKV, Inference, source

STEPS = 8
"""So many products back at the most."""


def settle_around(found: Inference) -> None:
    """Roles of the matrices that are neither attention nor MLP nor head."""
    for matrix in found.matrices:
        if found.free(matrix):
            role, why = _role(found, matrix)
            if role is not None:
                found.give_all(matrix, role, why)


def _role(found: Inference, matrix: Leaf) -> tuple[Role | None, str]:
    if matrix.weight is None:
        return None, ""
    behind = found.behind(matrix)
    record = found.record
    fed = bool(behind) or record.is_marked("input", source(matrix))
    if not behind & ~found.paths.of_kind["input"] and fed and (matrix.pointwise or _side_by_side(matrix)):
        if record.is_marked("one_hot", source(matrix)):
            return Role.TOK_EMB, "looks up one-hot vectors"
        return (Role.PATCH_EMB, "turns inputs into the stream") if begins(found, matrix) else (None, "")
    if matrix.pointwise and behind and not behind & ~found.paths.of_kind["lookup"] and begins(found, matrix):
        own = any(begins(found, leaf) for leaf in found.graph.listed(behind)[:MANY])  # they are a stream already
        return (None, "") if own else (Role.TOK_EMB, "turns embeddings into the stream")
    if matrix.units is not None and len(matrix.units.numbers) == 1 and weighs(found, matrix, Role.DOWN):
        return Role.ROUTER, "weighs what is added to the stream"
    if not matrix.kernel and _modulates(found, matrix):
        return Role.MODULATION, "scales or shifts the stream by what the model is conditioned on"
    return (Role.CONV, "a convolution") if matrix.kernel and matrix.weight.number >= 0 else (None, "")


def begins(found: Inference, leaf: Leaf) -> bool:
    """Whether the stream begins with a leaf: what is computed of it is added to it, or an attention or MLP reads it."""
    proven = False
    for _, name, rest, normed in found.paths.meets(leaf):
        if name == "bent" or (name == "Mul" and not normed):
            return False
        if rest and name in ("Add", "Sub"):
            proven |= bool(ancestors(found, rest) >> leaf.index & 1)
        elif name == "read" and not normed:
            proven |= {*QKV} <= {role for reader in found.readers(leaf)[:MANY] for role in found.roles(reader)}
    return proven


def ancestors(found: Inference, mask: int) -> int:
    """All leaves that these were made of, parameters too, some steps back."""
    everything, frontier = 0, mask
    for _ in range(STEPS):
        below = 0
        for leaf in found.graph.listed(frontier)[:MANY]:
            below |= found.made_of(leaf)
        frontier = below & ~everything
        everything |= below
        if not frontier:
            break
    return everything


def _modulates(found: Inference, matrix: Leaf) -> bool:
    made_of, own, proven = ancestors(found, 1 << matrix.index), 1 << matrix.index, False
    if made_of & found.paths.of_kind["attention"]:
        return False
    for node, name, rest, _ in found.paths.meets(matrix):
        if name not in ("Mul", "Add") or not rest or rest & made_of & ~found.paths.of_kind["weight"]:
            return False
        other = next((n for n in found.paths.inputs(node) if not found.graph.mask_at(n) & own), None)
        proven |= name == "Mul" and other is not None and _normed(found, other)
    return proven


def _normed(found: Inference, node: Any) -> bool:
    """Whether what a node makes has been normalized, and at most scaled, shifted or moved since."""
    return any(type(step).__name__ == "NormedBackward" for step in _line(found, node))


def _line(found: Inference, node: Any) -> Iterator[Any]:
    while node is not None:
        yield node
        below = found.paths.inputs(node)
        node = below[0] if len(below) == 1 else None


def _side_by_side(matrix: Leaf) -> bool:
    """Whether the patches of a convolution do not overlap."""
    assert matrix.weight is not None
    kernel = matrix.weight.value.shape[2:]
    places = zip(kernel, source(matrix).shape[-len(kernel) :], matrix.tensor.shape[-len(kernel) :], strict=True)
    return bool(matrix.axes) and all(k * out <= n for k, n, out in places)


def on_scores(found: Inference, tensor: Tensor) -> bool:
    """Whether a tensor is the scores of an attention, or what has been added to them."""
    queue = [] if tensor.grad_fn is None else [tensor.grad_fn]
    for node in queue:
        if node in found.graph.scores:
            return True
        name = type(node).__name__
        if len(queue) < 32 and name.startswith(("Add", "Sub", "Mul", "Div", "View", "UnsafeView", "Masked", "Where")):
            queue += found.paths.inputs(node)
    return False
