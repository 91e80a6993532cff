"""Roles in and around attentions: queries, keys, values, their norms and biases, outputs, gates, and choices."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.calls import Attention
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.infer import MANY, QKV, Inference, beside, source
from sharpwise.blocks.trace.weights import Array

_NAMES = {Role.Q: "queries", Role.K: "keys", Role.V: "values"}


class _Part(NamedTuple):
    """Queries, keys or values of an attention, the products that are proven to make them, and all leaves behind."""

    order: int
    role: Role
    tensor: Tensor
    proven: dict[Leaf, Array]
    leaves: list[Leaf]


def attentions(found: Inference) -> None:
    """What makes queries, keys and values."""
    parts = [part for order, attended in enumerate(found.record.attentions) for part in _parts(found, order, attended)]
    by_head = found.graph.per_head([(part.tensor, part.leaves) for part in parts])
    for (order, role, _, proven, leaves), heads_of in zip(parts, by_head, strict=True):
        why = f"{_NAMES[role]} of attention {order}"
        for leaf, heads in zip(leaves, heads_of, strict=True):
            if leaf.kind == "weight":
                for units in heads:
                    _beside(found, leaf, units, role, why)
            elif heads:
                own = [units & ~proven[leaf] for units in heads] if proven[leaf].any() else heads
                chosen = np.logical_or.reduce(own)
                found.give(leaf, chosen, role, f"makes {why}", own)
                for biases in leaf.biases:
                    found.assign(biases, chosen, role, f"added to {why}", own, bias=True)


def _parts(found: Inference, order: int, attention: Attention) -> Iterator[_Part]:
    found.queries[order] = found.matrices_in(found.paths.straight(attention.q)[0])[:MANY]
    for role, tensor in zip(QKV, (attention.q, attention.k, attention.v), strict=True):
        proven = _proven(found, tensor, order)
        leaves = [leaf for leaf in found.graph.behind(tensor) if leaf.kind == "weight" or leaf in proven]
        if leaves and tensor.requires_grad:
            found.unsure |= {leaf.weight.number for leaf in leaves if leaf.kind == "weight" and leaf.weight is not None}
            for leaf in leaves:
                found.belongs(leaf, order)
            yield _Part(order, role, tensor, proven, leaves)


def _proven(found: Inference, tensor: Tensor, order: int) -> dict[Leaf, Array]:
    """The products whose numbers arrive as they are, each with its units that something else reads."""
    good, sums = found.paths.straight(tensor, channels=True)
    good &= found.paths.of_kind["matrix"]
    if good.bit_count() > MANY:
        return {}
    for sides in sums:
        if sides[0] == sides[1]:  # a rotation
            continue
        known = [[m for m in found.matrices_in(side) if not _of_another(found, m, order)] for side in sides]
        if all(known) and len({found.stream(m) for side in known for m in side}) > 1:
            good &= ~(sides[0] | sides[1])
    units = {}
    for leaf in found.matrices_in(good):
        if leaf.pointwise and not _over_tokens(found, leaf):
            units[leaf] = _read_elsewhere(found, leaf)
    return units


def _over_tokens(found: Inference, leaf: Leaf) -> bool:
    """Whether a product sums over tokens, as Linformer's do: the same units make all that it sums up."""
    data = source(leaf)
    if leaf.summed == (data.ndim - 1,) and data.stride(-1) == 1:
        return False  # features lie there
    behind = found.matrices_in(found.graph.mask(data))[:MANY]
    if not leaf.summed or not behind:
        return False
    rest = [axis for axis in range(data.ndim) if axis not in leaf.summed]
    summands = data.permute(*leaf.summed, *rest).flatten(0, len(leaf.summed) - 1)
    first, last = (found.graph.gradients(summands[i], behind) for i in (0, -1))
    made = [(m, a, b) for m, a, b in zip(behind, first, last, strict=True) if a is not None and b is not None]
    units = found.graph.units
    return bool(made) and all(np.array_equal(units(m, a != 0), units(m, b != 0)) for m, a, b in made)


def _of_another(found: Inference, leaf: Leaf, order: int) -> bool:
    """Whether a product was made for an attention before this one."""
    owners = () if leaf.weight is None else leaf.weight.owners
    return any(found.attention_of.get(number, order) < order for number in owners)


def _read_elsewhere(found: Inference, leaf: Leaf) -> Array:
    """The units that another matrix reads among other things, as a stream is read."""
    own = 1 << leaf.index
    hit: Array = np.zeros(int(np.prod([leaf.tensor.shape[a] for a in leaf.axes], dtype=np.int64)), dtype=bool)
    for reader in found.readers(leaf)[:4]:
        if found.behind(reader) == own or not found.paths.straight(source(reader), products=True)[0] & own:
            continue
        (size,) = found.graph.gradients(source(reader), [leaf])
        if size is not None:
            hit |= found.graph.units(leaf, size != 0)
    return hit


def _beside(found: Inference, leaf: Leaf, chosen: Array, role: Role, why: str) -> None:
    """A parameter between the matrices and the attention: a bias, or a norm of q or k."""
    assert leaf.weight is not None
    ledger = found.ledgers[leaf.weight.number]
    uses = [use for use in found.record.uses_of(leaf.weight.number) if use.beside is not None]
    uses = [use for use in uses if role in _roles_behind(found, beside(use))]
    if any(use.how != "other" and found.graph.normed(beside(use), use.how) for use in uses):
        ledger.settle(Role.NORM if role is Role.V else Role.QK_NORM, f"scales or shifts normalized {why}")
    elif any(use.how in ("shift", "join") for use in uses):
        coords = np.unravel_index(np.flatnonzero(chosen), ledger.shape)[:1]
        ledger.assign(coords, role, f"added to {why}")
        ledger.add_head(coords, role)
        ledger.bias = True


def _roles_behind(found: Inference, tensor: Tensor) -> set[Role]:
    mask = found.graph.mask(tensor) & found.paths.data
    if mask & ~found.paths.of_kind["matrix"] or mask.bit_count() > MANY:
        return set()
    return {role for leaf in found.matrices_in(mask) for role in found.roles(leaf)}


def choice(found: Inference, x: Tensor, how: str) -> None:
    """What is chosen by: a router's output, or the scores of a small attention that chooses for a larger one."""
    mask = found.graph.mask(x)
    matrices = found.matrices_in(mask)
    if found.has(mask, "lookup", "attention", "input") or not all(map(found.free, matrices)):
        return
    scores = found.graph.nearest(x, found.graph.scores)
    if scores is None and len(matrices) == 1:
        if not weighs(found, matrices[0]):
            return
        found.give_all(matrices[0], Role.ROUTER, "its output chooses experts")
        for leaf in found.graph.behind(x):
            if leaf.kind == "weight" and leaf.weight is not None:
                ledger = found.ledgers[leaf.weight.number]
                ledger.settle(Role.ROUTER, "shifts the choice of experts")
                ledger.bias = True
    elif scores is not None and how == "topk":
        sides = [found.matrices_in(found.graph.mask(side)) for side in (scores.left, scores.right)]
        if any(not side or any(map(found.readers, side)) for side in sides):
            return  # a stream
        for role, side in zip(QKV[:2], sides, strict=True):
            for matrix in side:
                found.give_all(matrix, role, f"makes {_NAMES[role]} of scores that choose what is attended to")
        for matrix in filter(found.free, matrices):
            found.give_all(matrix, Role.ROUTER, "weighs scores that choose what is attended to")


def weighs(found: Inference, leaf: Leaf, role: Role | None = None) -> bool:
    """Whether what a product makes multiplies something else, of matrices of this role, before anything reads it."""
    for _, name, rest, _ in found.paths.meets(leaf, straight=False):
        if rest and name in ("Mul", "Bmm", "Mm"):
            others = found.free_of_routers(found.matrices_in(rest)[:MANY])
            if role is None or (others and all(found.roles(other) == {role} for other in others)):
                return True
    return False


def output(found: Inference, matrix: Leaf) -> None:
    behind = found.behind(matrix)
    attended = behind & found.paths.of_kind["attention"]
    if not attended or found.has(behind, "lookup", "input") or behind.bit_count() > MANY:
        return
    matrices = found.matrices_in(behind)
    if any(found.roles(leaf) & {Role.O, Role.DOWN} for leaf in matrices):
        return  # the stream, to which an attention without such a matrix was added
    good, sums = found.paths.straight(source(matrix), products=True)
    gates = [leaf for leaf in matrices if found.free(leaf) or _partly(found, leaf)]
    free = 0
    for leaf in gates:
        free |= 1 << leaf.index
    if attended & ~good or any((a & attended and b & free) or (b & attended and a & free) for a, b in sums):
        return
    reached, _ = found.paths.straight(source(matrix), called=None, products=True)
    queries = 0
    for leaf in found.graph.listed(attended):
        for maker in found.matrices_in(found.made_of(leaf)):
            queries |= found.made_of(maker)
    learned = queries & found.graph.mask(source(matrix)) & found.paths.of_kind["weight"]  # a stream begins with them
    if not all(leaf.pointwise for leaf in gates) or free & ~reached or learned:
        return
    found.give_all(matrix, Role.O, "reads an attention's output")
    found.belongs(matrix, found.attentions_before(matrix) - 1)
    attentions = found.graph.listed(attended)
    for gate, units, act in found.graph.through_activations(source(matrix), gates) if gates else ():
        rest = units & found.without_role(gate)
        if found.graph.multiplied(source(matrix), [gate], attentions):
            found.give(gate, rest, Role.O_GATE, "multiplies an attention's output")
            continue
        two = bool((rest & act).any() and (rest & ~act).any())
        found.give(gate, rest & act, Role.GATE if two else Role.UP, "stands beside an attention's output")
        found.give(gate, rest & ~act, Role.UP, "stands beside an attention's output")


def _partly(found: Inference, leaf: Leaf) -> bool:
    return bool(found.without_role(leaf).any())
