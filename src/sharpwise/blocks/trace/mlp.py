"""Roles of MLPs, of heads, and of low-rank factors of any matrix."""

from collections.abc import Sequence

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.graph import Leaf
from sharpwise.blocks.trace.infer import MANY, QKV, Inference, source, width
from sharpwise.blocks.trace.weights import Array

# What the second factors of one low-rank product may make. The first factor has the first of their roles.
_GROUPS = ({*QKV, Role.O_GATE}, {Role.GATE, Role.UP}, {Role.ROUTER}, {Role.HEAD})
# What stands between a head and the output: caps, probabilities.
_AT_THE_END = ("tanh", "softmax", "log_softmax", "sigmoid")


def _makers(found: Inference, matrix: Leaf) -> list[Leaf]:
    """The matrices that alone make the input of this one and are read for nothing else; routers do not count."""
    behind = found.behind(matrix)
    if found.has(behind, "lookup", "attention", "input") or behind.bit_count() > MANY:
        return []
    makers = found.free_of_routers(found.matrices_in(behind))
    inside = 0
    for maker in makers:
        inside |= 1 << maker.index
    alone = not inside & found.final and all(
        _routed(found, found.behind(other) & ~inside) for maker in makers for other in found.readers(maker)
    )
    return makers if alone else []


def _routed(found: Inference, mask: int) -> bool:
    """Whether nothing but routers is in a mask."""
    return not mask & ~found.paths.of_kind["matrix"] and not found.free_of_routers(found.matrices_in(mask)[:MANY])


def down(found: Inference, matrix: Leaf) -> None:
    makers = _makers(found, matrix)
    hidden = all(maker.pointwise and found.roles(maker) <= {Role.UP, Role.GATE} for maker in makers)
    if not makers or not hidden:
        return
    readers = [reader for maker in makers for reader in found.readers(maker)]
    if any(found.roles(reader) & _GROUPS[0] for reader in readers):
        return  # a low-rank factor of an attention
    streams = {found.stream(maker) for maker in makers}
    if len(streams) > 1 or not found.paths.joins(matrix, streams.pop()):
        return
    if not found.paths.by_token(source(matrix)) or not _token_by_token(found, matrix, makers):
        return
    passing = found.graph.through_activations(source(matrix), makers)
    bent, straight = _kinds(passing)
    for sides in found.graph.sides(source(matrix)) if bent and not straight else ():
        # What bends their product, a rounding say, tells nothing of the sides.
        apart = [found.graph.through_activations(side, makers) for side in sides]
        shared = any(a is b and (x & y).any() for a, x, _ in apart[0] for b, y, _ in apart[1])
        if not shared and _kinds([*apart[0], *apart[1]]) == (True, True):
            passing, straight = [*apart[0], *apart[1]], True
            break
    # Without an activation that is known as one: a product of two, or more units than a linear map could use.
    wide = source(matrix).shape[-1] > min(source(maker).shape[-1] for maker in makers)
    if not (bent or wide or found.graph.multiplied(source(matrix), makers, makers)):
        return
    found.give_all(matrix, Role.DOWN, "reads what an activation made of other matrices")
    for maker, units, act in passing:
        if straight and bent:
            found.give(maker, units & act, Role.GATE, "passes an activation, then multiplies")
            found.give(maker, units & ~act, Role.UP, "is multiplied by a gate")
        else:
            found.give(maker, units, Role.UP, "passes an activation")


def _kinds(passing: Sequence[tuple[Leaf, Array, Array]]) -> tuple[bool, bool]:
    """Whether units pass an activation, and whether units pass none."""
    return any(act.any() for _, _, act in passing), any((units & ~act).any() for _, units, act in passing)


def _token_by_token(found: Inference, matrix: Leaf, makers: Sequence[Leaf]) -> bool:
    """Whether one token of the input is made of one token of each maker, as in an MLP: no convolution, no scan."""
    if found.paths.one_by_one(source(matrix)):
        return True
    last = source(matrix).reshape(-1, source(matrix).shape[-1])[-1]
    sizes = zip(makers, found.graph.gradients(last, makers), strict=True)
    return all(size is None or int(maker.over_units(size != 0).any(1).sum()) <= 1 for maker, size in sizes)


def chain(found: Inference, matrix: Leaf) -> bool:
    """A low-rank factor has the role of the other. Whether anything was found."""
    makers = _makers(found, matrix)
    if not makers or not matrix.pointwise:
        return False
    good, _ = found.paths.straight(source(matrix))
    if any(not good >> maker.index & 1 for maker in makers) or len({found.stream(maker) for maker in makers}) > 1:
        return False
    if found.free(matrix):
        if _normed_between(found, matrix, makers):
            return False
        above = set.union(*(found.roles(maker) or {Role.OTHER} for maker in makers))
        low = all(width(maker) < width(matrix) for maker in makers)
        if above in ({Role.O}, {Role.DOWN}, {Role.HEAD}) and low:
            found.give_all(matrix, above.pop(), "continues a low-rank product")
        return not found.free(matrix)
    group = next((g for g in _GROUPS if found.roles(matrix) <= g), None)
    if group is None:
        return False
    below = [m for m in makers if _narrow(found, m) and found.without_role(m).any() and _read_as(found, m, group)]
    any_found = False
    for maker, units, _ in found.graph.through_activations(source(matrix), below) if below else ():
        chosen = units & found.without_role(maker)
        role = min((r for reader in found.readers(maker) for r in found.roles(reader)), key=list(Role).index)
        found.give(maker, chosen, role, "begins a low-rank product")
        orders = [found.attention_of.get(n) for n in (matrix.weight.owners if matrix.weight is not None else ())]
        found.belongs(maker, next(iter(orders), None))
        any_found |= bool(chosen.any())
    return any_found


def _normed_between(found: Inference, matrix: Leaf, makers: Sequence[Leaf]) -> bool:
    good, _ = found.paths.straight(source(matrix), norms=False)
    return any(not good >> maker.index & 1 for maker in makers)


def _narrow(found: Inference, maker: Leaf) -> bool:
    """Whether a product makes fewer numbers than it reads, or queries alone; and not of the model's own input."""
    inner = found.behind(maker) & ~found.paths.of_kind["input"]
    fewer = int(found.without_role(maker).sum()) < source(maker).shape[-1]
    queries = all(found.roles(reader) == {Role.Q} for reader in found.readers(maker))
    return bool(inner) and not maker.kernel and (fewer or queries)


def _read_as(found: Inference, maker: Leaf, roles: set[Role]) -> bool:
    readers = found.readers(maker)
    if not all(found.roles(matrix) and found.roles(matrix) <= roles for matrix in readers):
        return False
    if all(found.roles(matrix) == {Role.Q} for matrix in readers):
        return True
    owners = [m.weight.owners for m in readers if m.weight is not None]
    orders = {found.attention_of.get(n) for numbers in owners for n in numbers} - {None}
    if not roles <= _GROUPS[0]:
        return len(orders) <= 1
    # What several queries look at, or queries of another stream, is a memory.
    queries = [q for order in orders if order is not None for q in found.queries[order]]
    return len(orders) <= 1 and all(found.stream(q) == found.stream(maker) for q in queries)


def factors(found: Inference, matrix: Leaf) -> None:
    """Of a weight that is computed, from a norm and a direction say, all parts have the role if there is one."""
    roles = found.roles(matrix)
    if matrix.weight is not None and matrix.units is not None and len(roles) == 1:
        for number in set(matrix.weight.owners) - set(matrix.units.owners):
            found.ledgers[number].settle(min(roles), "a part of a weight that is computed")


def head(found: Inference, matrix: Leaf) -> None:
    """The model's output is all that it makes, and is made of nothing else."""
    owners = [] if matrix.weight is None else matrix.weight.owners
    data = any(use.how in ("shift", "join") for n in owners for use in found.record.uses_of(n))
    if found.has(found.behind(matrix), "attention") and not found.has(found.behind(matrix), "lookup"):
        return  # an output projection, or what reads an attention without one
    if data or found.readers(matrix) or not found.final >> matrix.index & 1:
        return
    for tensor in found.outputs:
        mask = found.graph.mask(tensor) & found.paths.data
        if not mask >> matrix.index & 1 or mask & ~found.paths.of_kind["matrix"] or mask.bit_count() > 4:
            continue
        good, _ = found.paths.straight(tensor, called=_AT_THE_END)
        made = found.matrices_in(mask)
        alone = len({found.stream(leaf) for leaf in made}) == 1 and all(
            found.roles(leaf) <= {Role.HEAD} for leaf in made
        )
        if alone and (good >> matrix.index & 1 or tensor.numel() == 1):
            found.give_all(matrix, Role.HEAD, "makes the model's output")
            return


def hidden_of_head(found: Inference, matrix: Leaf) -> None:
    """The one hidden layer of a head over the tokens."""
    tables = {leaf.weight.value.shape[0] for leaf in found.leaves if leaf.kind == "lookup" and leaf.weight is not None}
    makers = _makers(found, matrix) if width(matrix) in tables else []
    if len(makers) == 1 and found.free(makers[0]) and not makers[0].kernel and found.readers(makers[0]) == [matrix]:
        behind = found.behind(makers[0])
        if any(found.roles(leaf) & {Role.O, Role.DOWN} for leaf in found.matrices_in(behind)):
            found.give_all(makers[0], Role.HEAD, "the hidden layer of a head")
