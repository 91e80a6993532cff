"""From what a forward did to what its parameters are.

The order matters; who is found first stays:

1. what reaches the queries, keys and values of an attention, per head;
2. what a choice is made of: routers;
3. the matrix that reads an attention's output: o, and what multiplies it before: o_gate;
4. a matrix whose input is made by other matrices alone, token by token, through an activation or a product: down, and
   what made it: up, and gate where one factor passes an activation and the other does not;
5. matrices joined without anything in between (low-rank factors) share a role;
6. what only the model's output sees: head.

What is left is neither attention nor MLP. `vectors` goes on with the parameters that are no matrices.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.calls import Attention
from sharpwise.blocks.trace.graph import Graph, Leaf
from sharpwise.blocks.trace.recorder import Recorder
from sharpwise.blocks.trace.rows import Ledger
from sharpwise.blocks.trace.weights import Array, Units, tensors_in

QKV = (Role.Q, Role.K, Role.V)
# What the second factors of one low-rank product may make. The first factor has the first of their roles.
_GROUPS = ({*QKV, Role.O_GATE}, {Role.GATE, Role.UP}, {Role.ROUTER}, {Role.HEAD})
_NAMES = {Role.Q: "queries", Role.K: "keys", Role.V: "values"}


class Inference:
    """Roles of the matrices.

    Attributes:
        ledgers: what is known, by number of the parameter.
        attention_of: number of a parameter -> which attention it feeds or reads, by order of execution.
    """

    def __init__(self, record: Recorder, output: Any) -> None:
        self.record = record
        self.graph: Graph = record.graph
        self.ledgers = {n: Ledger(tuple(p.shape)) for n, p in enumerate(record.parameters)}
        self.attention_of: dict[int, int] = {}
        self.leaves = sorted(self.graph.leaves.values(), key=lambda leaf: leaf.time)
        self.matrices = [leaf for leaf in self.leaves if leaf.kind == "matrix"]
        self.readers: dict[int, list[Leaf]] = {id(leaf): [] for leaf in self.leaves}  # matrices whose input it reaches
        for matrix in self.matrices:
            for leaf in self.graph.behind(source(matrix)):
                self.readers[id(leaf)].append(matrix)
        self.outputs = [t for t in tensors_in(output) if t.grad_fn is not None]
        self.final = {id(leaf) for t in self.outputs for leaf in self.graph.behind(t)}
        self._roles: dict[int, set[Role]] = {}  # id of a matrix leaf -> the roles of its units

    def run(self) -> None:
        """Take the steps."""
        for order, attention in enumerate(self.record.attentions):
            self._attention(order, attention)
        for x, how in self.record.choices:
            self._choice(x, how)
        for step in (self._output, self._down):
            for matrix in self.matrices:
                step(matrix)
        for matrix in self.matrices:
            if self.free(matrix) and self._only_output(matrix):
                self.give_all(matrix, Role.HEAD, "makes the model's output")
        while sum(self._chain(matrix) for matrix in self.matrices):
            pass
        for matrix in self.matrices:
            self._into_stream(matrix)
        for matrix in self.matrices:
            self._factors(matrix)

    # -- who has what ------------------------------------------------------------------------------------------------

    def assign(self, units: Units | None, chosen: Array, role: Role, why: str, head: bool = False) -> None:
        """These units have this role; `head`: they are one head."""
        for number in () if units is None else units.owners:
            coords = None if units is None else units.of(number, chosen)
            if coords is not None and units is not None:
                ledger = self.ledgers[number]
                ledger.assign(coords, role, why)
                ledger.stacked |= units.stacked
                if head:
                    ledger.add_head(coords, role)

    def give(self, leaf: Leaf, chosen: Array, role: Role, why: str, head: bool = False) -> None:
        """These units of a matrix have this role."""
        if chosen.any():
            self._roles.setdefault(id(leaf), set()).add(role)
            self.assign(leaf.units, chosen, role, why, head)

    def give_all(self, leaf: Leaf, role: Role, why: str) -> None:
        """All units of a matrix have this role."""
        self._roles.setdefault(id(leaf), set()).add(role)
        if leaf.units is not None:
            self.assign(leaf.units, np.ones(len(leaf.units.numbers), dtype=bool), role, why)

    def roles(self, leaf: Leaf) -> set[Role]:
        """The roles of a matrix's units, as far as they are known."""
        return self._roles.get(id(leaf), set())

    def free(self, leaf: Leaf) -> bool:
        """Whether no unit of a matrix has a role yet."""
        return not self.roles(leaf)

    def role_of_unit(self, leaf: Leaf) -> list[Role | None]:
        """The role of each unit of a matrix, None where it has none yet."""
        found: list[Role | None] = [None] * (0 if leaf.units is None else len(leaf.units.numbers))
        for number in () if leaf.units is None else leaf.units.owners:
            assert leaf.units is not None
            here = leaf.units.numbers == number
            coords = leaf.units.of(number, here)
            roles = self.ledgers[number].roles_at(coords, int(here.sum()))
            for i, role in zip(np.flatnonzero(here), roles, strict=True):
                found[i] = role
        return found

    def without_role(self, leaf: Leaf) -> Array:
        """Which units of a matrix have no role yet."""
        return np.array([role is None for role in self.role_of_unit(leaf)], dtype=bool)

    # -- attention -----------------------------------------------------------------------------------------------

    def _attention(self, order: int, attention: Attention) -> None:
        for role, tensor in zip(QKV, (attention.q, attention.k, attention.v), strict=True):
            leaves = [leaf for leaf in self.graph.behind(tensor) if leaf.kind in ("matrix", "weight")]
            if not leaves or not tensor.requires_grad:
                continue
            why = f"{_NAMES[role]} of attention {order}"
            for leaf, heads in zip(leaves, self.graph.per_head(tensor, leaves), strict=True):
                for units in heads:
                    self._reached(leaf, units, role, order, why)

    def _reached(self, leaf: Leaf, chosen: Array, role: Role, order: int, why: str) -> None:
        assert leaf.weight is not None
        if leaf.kind == "weight":
            self._beside(leaf, chosen, role, why)
        else:
            self.give(leaf, chosen, role, f"makes {why}", head=True)
            for units in leaf.biases:
                self.assign(units, chosen, role, f"added to {why}", head=True)
        self._belongs(leaf, order)

    def _belongs(self, leaf: Leaf, order: int | None) -> None:
        if leaf.weight is not None and order is not None:
            for number in leaf.weight.owners:
                self.attention_of.setdefault(number, order)

    def _beside(self, leaf: Leaf, chosen: Array, role: Role, why: str) -> None:
        """A parameter between the matrices and the attention: a bias, or a norm of q or k."""
        assert leaf.weight is not None
        ledger = self.ledgers[leaf.weight.number]
        uses = [use for use in self.record.uses if leaf.weight.number in use.weight.owners]
        if any(
            use.beside is not None and use.how != "other" and self.graph.normed(use.beside, use.how) for use in uses
        ):
            ledger.settle(Role.NORM if role is Role.V else Role.QK_NORM, f"scales or shifts normalized {why}")
        elif any(use.how in ("shift", "join") for use in uses):
            coords = np.unravel_index(np.flatnonzero(chosen), ledger.shape)[:1]
            ledger.assign(coords, role, f"added to {why}")
            ledger.add_head(coords, role)
            ledger.bias = True

    def _choice(self, x: Tensor, how: str) -> None:
        """What is chosen by: a router's output, or the scores of a small attention that chooses for a larger one."""
        leaves = self.graph.behind(x)
        matrices = self.graph.matrices_behind(x)
        if any(leaf.kind in ("lookup", "attention") for leaf in leaves) or not all(map(self.free, matrices)):
            return
        scores = self.graph.nearest(x, self.graph.scores)
        if scores is None and len(matrices) == 1:
            self.give_all(matrices[0], Role.ROUTER, "its output chooses experts")
            for leaf in leaves:
                if leaf.kind == "weight" and leaf.weight is not None:
                    ledger = self.ledgers[leaf.weight.number]
                    ledger.settle(Role.ROUTER, "shifts the choice of experts")
                    ledger.bias = True
        elif scores is not None and how == "topk":
            for role, side in ((Role.Q, scores.left), (Role.K, scores.right)):
                for matrix in self.graph.matrices_behind(side):
                    self.give_all(matrix, role, f"makes {_NAMES[role]} of scores that choose what is attended to")
            for matrix in filter(self.free, matrices):
                self.give_all(matrix, Role.ROUTER, "weighs scores that choose what is attended to")

    def _output(self, matrix: Leaf) -> None:
        behind = self.graph.behind(source(matrix))
        attended = [leaf for leaf in behind if leaf.kind == "attention"]
        if not self.free(matrix) or not attended:
            return
        if any(leaf.kind == "lookup" or self.roles(leaf) & {Role.O, Role.DOWN} for leaf in behind):
            return  # the stream, to which an attention without such a matrix was added
        self.give_all(matrix, Role.O, "reads an attention's output")
        self._belongs(matrix, [leaf.kind for leaf in self.leaves if leaf.time < matrix.time].count("attention") - 1)
        gates = [leaf for leaf in behind if leaf.kind == "matrix" and self.without_role(leaf).any()]
        for gate, units, _ in self.graph.through_activations(source(matrix), gates) if gates else ():
            if self.graph.multiplied(source(matrix), [gate], attended):
                role, why = Role.O_GATE, "multiplies an attention's output"
            else:
                role, why = Role.UP, "stands beside an attention's output"
            self.give(gate, units & self.without_role(gate), role, why)

    # -- MLP and low rank ------------------------------------------------------------------------------------------

    def _makers(self, matrix: Leaf) -> list[Leaf]:
        """The matrices that alone make the input of this one and are read for nothing else; routers do not count."""
        if any(leaf.kind in ("lookup", "attention") for leaf in self.graph.behind(source(matrix))):
            return []
        makers = self._no_routers(self.graph.matrices_behind(source(matrix)))
        alone = all(
            id(maker) not in self.final
            and all(
                set(self._no_routers(self.graph.matrices_behind(source(other)))) <= set(makers)
                for other in self.readers[id(maker)]
            )
            for maker in makers
        )
        return makers if alone else []

    def _no_routers(self, leaves: Iterable[Leaf]) -> list[Leaf]:
        return [leaf for leaf in leaves if self.roles(leaf) != {Role.ROUTER}]

    def _down(self, matrix: Leaf) -> None:
        makers = self._makers(matrix)
        hidden = all(self.roles(maker) <= {Role.UP, Role.GATE} for maker in makers)
        if not makers or not hidden or not self.free(matrix):
            return
        readers = [reader for maker in makers for reader in self.readers[id(maker)]]
        if any(self._only_output(reader) or self.roles(reader) & _GROUPS[0] for reader in readers):
            return  # the hidden layer of a head, a low-rank factor of an attention
        if not self._token_by_token(matrix, makers):
            return
        passing = self.graph.through_activations(source(matrix), makers)
        bent = any(act.any() for _, _, act in passing)
        straight = any((units & ~act).any() for _, units, act in passing)
        # Without an activation that is known as one: a product of two, or more units than a linear map could use.
        wide = source(matrix).shape[-1] > min(source(maker).shape[-1] for maker in makers)
        if not (bent or wide or self.graph.multiplied(source(matrix), makers, makers)):
            return
        self.give_all(matrix, Role.DOWN, "reads what an activation made of other matrices")
        for maker, units, act in passing:
            if straight and bent:
                self.give(maker, units & act, Role.GATE, "passes an activation, then multiplies")
                self.give(maker, units & ~act, Role.UP, "is multiplied by a gate")
            else:
                self.give(maker, units, Role.UP, "passes an activation")

    def _token_by_token(self, matrix: Leaf, makers: Sequence[Leaf]) -> bool:
        """Whether one token of the input is made of one token of each maker, as in an MLP: no convolution, no scan."""
        last = source(matrix).reshape(-1, source(matrix).shape[-1])[-1]
        sizes = zip(makers, self.graph.gradients(last, makers), strict=True)
        return all(size is None or int(maker.over_units(size != 0).any(1).sum()) <= 1 for maker, size in sizes)

    def _chain(self, matrix: Leaf) -> bool:
        """A low-rank factor has the role of the other. Whether anything was found."""
        makers = self._makers(matrix)
        if not makers:
            return False
        if self.free(matrix):
            above = set.union(*(self.roles(maker) or {Role.OTHER} for maker in makers))
            low = all(_width(maker) < _width(matrix) for maker in makers)
            if above in ({Role.O}, {Role.DOWN}, {Role.HEAD}) and low:
                self.give_all(matrix, above.pop(), "continues a low-rank product")
            return not self.free(matrix)
        group = next((g for g in _GROUPS if self.roles(matrix) <= g), None)
        if group is None:
            return False
        inner = [m for m in makers if self.graph.behind(source(m))]  # not what reads the model's own input
        below = [m for m in inner if self.without_role(m).any() and self._read_as(m, group)]
        found = False
        for maker, units, _ in self.graph.through_activations(source(matrix), below) if below else ():
            chosen = units & self.without_role(maker)
            role = min((r for reader in self.readers[id(maker)] for r in self.roles(reader)), key=list(Role).index)
            self.give(maker, chosen, role, "begins a low-rank product")
            orders = [self.attention_of.get(n) for n in (matrix.weight.owners if matrix.weight is not None else ())]
            self._belongs(maker, next(iter(orders), None))
            found |= bool(chosen.any())
        return found

    def _read_as(self, maker: Leaf, roles: set[Role]) -> bool:
        return all(self.roles(matrix) and self.roles(matrix) <= roles for matrix in self.readers[id(maker)])

    def _factors(self, matrix: Leaf) -> None:
        """Of a weight that is computed, from a norm and a direction say, all parts have the role if there is one."""
        roles = self.roles(matrix)
        if matrix.weight is not None and matrix.units is not None and len(roles) == 1:
            for number in set(matrix.weight.owners) - set(matrix.units.owners):
                self.ledgers[number].settle(min(roles), "a part of a weight that is computed")

    # -- the ends of the stream --------------------------------------------------------------------------------------

    def _only_output(self, matrix: Leaf) -> bool:
        """Whether the model's output is all that this matrix makes, and makes all of one."""
        if self.readers[id(matrix)] or id(matrix) not in self.final:
            return False
        behind = [self.graph.behind(t) for t in self.outputs]
        return any(
            matrix in leaves
            and all(leaf.kind == "weight" or (leaf.kind == "matrix" and not self.readers[id(leaf)]) for leaf in leaves)
            for leaves in behind
        )

    def _into_stream(self, matrix: Leaf) -> None:
        """What turns inputs, or narrow embeddings, into the stream; one number per token weighs what is added to it."""
        if not self.free(matrix) or matrix.weight is None:
            return
        kinds = {leaf.kind for leaf in self.graph.behind(source(matrix))} - {"weight"}
        patches = matrix.weight.value.ndim <= 2 or _side_by_side(matrix)
        fed = source(matrix).requires_grad or self.record.is_marked("input", source(matrix))
        if (not kinds and patches and fed) or (kinds == {"lookup"} and self._feeds_first_attention(matrix)):
            self.give_all(matrix, Role.TOK_EMB, "turns inputs into the stream")
        elif matrix.units is not None and len(matrix.units.numbers) == 1:
            self.give_all(matrix, Role.ROUTER, "weighs what is added to the stream")

    def _feeds_first_attention(self, matrix: Leaf) -> bool:
        first = next((m for m in self.matrices if self.roles(m) & set(QKV)), None)
        return first is not None and first in self.readers[id(matrix)]


def source(matrix: Leaf) -> Tensor:
    """The data that a product read."""
    assert matrix.source is not None
    return matrix.source


def _width(matrix: Leaf) -> int:
    """How many numbers a product makes per token."""
    return 0 if matrix.units is None else len(matrix.units.numbers)


def _side_by_side(matrix: Leaf) -> bool:
    """Whether the patches of a convolution do not overlap."""
    assert matrix.weight is not None
    kernel = matrix.weight.value.shape[2:]
    places = zip(kernel, source(matrix).shape[-len(kernel) :], matrix.tensor.shape[-len(kernel) :], strict=True)
    return all(k * out <= n for k, n, out in places)
