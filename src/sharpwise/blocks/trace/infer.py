"""What is known of the matrices of a forward, and what lies behind and before them."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sharpwise.blocks.roles import Role
from sharpwise.blocks.trace.calls import Use
from sharpwise.blocks.trace.graph import Graph, Leaf
from sharpwise.blocks.trace.paths import Paths, Reach
from sharpwise.blocks.trace.recorder import Recorder
from sharpwise.blocks.trace.rows import Ledger
from sharpwise.blocks.trace.weights import Array, Units, tensors_in

QKV = (Role.Q, Role.K, Role.V)
STEPS = 6
"""So many products back at the most."""
MANY = 64
"""More leaves than this are the stream."""


class Inference:
    """Roles of the matrices.

    Attributes:
        ledgers: what is known, by number of the parameter.
        attention_of: number of a parameter -> which attention it feeds or reads, by order of execution.
        paths: what leads where.
        queries: order of an attention -> the matrices that make its queries.
        routers, final: leaves of routers, and what the model's output is made of, as masks.
        unsure: parameters on the way from something unknown to an attention.
    """

    def __init__(self, record: Recorder, output: Any) -> None:
        self.record = record
        self.graph: Graph = record.graph
        self.ledgers = {n: Ledger(tuple(p.shape)) for n, p in enumerate(record.parameters)}
        self.attention_of: dict[int, int] = {}
        self.leaves = self.graph.order
        self.matrices = [leaf for leaf in self.leaves if leaf.kind == "matrix"]
        attentions = [leaf for leaf in self.leaves if leaf.kind == "attention"]
        self._attentions = {leaf.index: attended for leaf, attended in zip(attentions, record.attentions, strict=True)}
        self._begun = [leaf.time for leaf in attentions]
        self._stand_ins = {
            leaf.weight.number: leaf for leaf in self.leaves if leaf.kind == "weight" and leaf.weight is not None
        }
        self.outputs = [t for t in tensors_in(output) if t.grad_fn is not None]
        attended = [t for a in record.attentions for t in (a.q, a.k, a.v, a.bias, a.weights) if t is not None]
        self.paths = Paths(self.graph, self.matrices, self.outputs, attended)
        self._behind = {leaf.index: self.graph.mask(source(leaf)) & self.paths.data for leaf in self.matrices}
        self._reach = Reach([self.graph.mask(source(m)) for m in self.matrices], len(self.leaves))
        self.unsure: set[int] = set()
        self.queries: dict[int, list[Leaf]] = {}
        self._readers: dict[int, list[Leaf]] = {}
        self._streams: dict[int, int] = {}
        self.routers = 0
        self.final = 0
        for tensor in self.outputs:
            self.final |= self.graph.mask(tensor)
        self._roles: dict[int, set[Role]] = {}  # index of a leaf -> the roles of its units

    # -- who has what ------------------------------------------------------------------------------------------------

    def assign(
        self, units: Units | None, chosen: Array, role: Role, why: str, heads: Sequence[Array] = (), bias: bool = False
    ) -> None:
        """These units have this role; `heads`: those of each head; `bias`: of what is added to a product."""
        for number in () if units is None else units.owners:
            assert units is not None
            ledger = self.ledgers[number]
            by_row = bias and len(ledger.shape) == 2  # [heads, size]: a row for each head
            for which, one in ((chosen, False), *((head, True) for head in heads)):
                coords = units.of(number, which)
                if coords is None:
                    continue
                coords = coords[:1] if by_row and coords[0] is not None else coords
                if one:
                    ledger.add_head(coords, role)
                else:
                    ledger.stacked |= units.stacked
                    ledger.assign(coords, role, why)

    def give(self, leaf: Leaf, chosen: Array, role: Role, why: str, heads: Sequence[Array] = ()) -> None:
        """These units of a matrix have this role."""
        if chosen.any():
            self._roles.setdefault(leaf.index, set()).add(role)
            self.assign(leaf.units, chosen, role, why, heads)

    def give_all(self, leaf: Leaf, role: Role, why: str) -> None:
        """All units of a matrix have this role."""
        self._roles.setdefault(leaf.index, set()).add(role)
        if leaf.units is not None:
            self.assign(leaf.units, np.ones(len(leaf.units.numbers), dtype=bool), role, why)

    def roles(self, leaf: Leaf) -> set[Role]:
        """The roles of a matrix's units, as far as they are known."""
        return self._roles.get(leaf.index, set())

    def free(self, leaf: Leaf) -> bool:
        """Whether no unit of a matrix has a role yet."""
        return not self.roles(leaf)

    def codes(self, leaf: Leaf) -> Array:
        """The role of each unit of a matrix by its place in ROLES, -1 where it has none yet."""
        if leaf.units is None:
            return np.zeros(0, dtype=np.int8)
        found = np.full(len(leaf.units.numbers), -1, dtype=np.int8)
        for number in leaf.units.owners:
            here = leaf.units.numbers == number
            found[here] = self.ledgers[number].codes_at(leaf.units.of(number, here))
        return found

    def without_role(self, leaf: Leaf) -> Array:
        """Which units of a matrix have no role yet."""
        without: Array = self.codes(leaf) < 0
        return without

    # -- what lies behind and before -----------------------------------------------------------------------------------

    def readers(self, leaf: Leaf) -> list[Leaf]:
        """The matrices whose input a leaf reaches."""
        if leaf.index not in self._readers:
            self._readers[leaf.index] = [self.matrices[i] for i in self._reach.readers(leaf.index)]
        return self._readers[leaf.index]

    def behind(self, matrix: Leaf) -> int:
        """What the input of a matrix is made of, as a mask."""
        return self._behind[matrix.index]

    def made_of(self, leaf: Leaf) -> int:
        """What a product, or an attention, is made of, parameters too."""
        if leaf.kind == "matrix":
            return self.graph.mask(source(leaf))
        if leaf.kind != "attention":
            return 0
        attention = self._attentions[leaf.index]
        return self.graph.mask(attention.q) | self.graph.mask(attention.k) | self.graph.mask(attention.v)

    def stream(self, matrix: Leaf) -> int:
        """The same, what is read by matrices of this input alone left aside: low-rank factors, an inner attention."""
        if matrix.index not in self._streams:
            mask = self.behind(matrix) & ~self.routers
            for _ in range(STEPS):
                leaves = self.graph.listed(mask) if mask.bit_count() <= 4 else []
                if not leaves or any(leaf.kind in ("lookup", "input") for leaf in leaves):
                    break
                readers = (r for leaf in leaves for r in self.readers(leaf))
                if any(self.behind(reader) & ~self.routers != mask for reader in readers):
                    break
                below = 0
                for leaf in leaves:
                    below |= self.made_of(leaf) & self.paths.data & ~self.routers
                if not below:
                    break
                mask = below
            self._streams[matrix.index] = mask
        return self._streams[matrix.index]

    def matrices_in(self, mask: int) -> list[Leaf]:
        """The products with weights in a mask."""
        return self.graph.listed(mask & self.paths.of_kind["matrix"])

    def belongs(self, leaf: Leaf, order: int | None) -> None:
        """A matrix is of this attention."""
        if leaf.weight is not None and order is not None:
            for number in leaf.weight.owners:
                self.attention_of.setdefault(number, order)

    def attentions_before(self, matrix: Leaf) -> int:
        """How many attentions came before a product."""
        return bisect_left(self._begun, matrix.time)

    def stand_in(self, number: int) -> Leaf | None:
        """The leaf in the place of a parameter that no product read."""
        return self._stand_ins.get(number)

    def free_of_routers(self, leaves: Iterable[Leaf]) -> list[Leaf]:
        """Those that are no routers."""
        return [leaf for leaf in leaves if self.roles(leaf) != {Role.ROUTER}]

    def note_routers(self) -> None:
        """From now on routers do not count among what lies behind a matrix."""
        for matrix in self.matrices:
            if self.roles(matrix) == {Role.ROUTER}:
                self.routers |= 1 << matrix.index
        self._streams.clear()

    def has(self, mask: int, *kinds: str) -> bool:
        """Whether one of these kinds is in a mask."""
        return any(mask & self.paths.of_kind[kind] for kind in kinds)


def source(matrix: Leaf) -> Tensor:
    """The data that a product read."""
    assert matrix.source is not None
    return matrix.source


def beside(use: Use) -> Tensor:
    """The data beside a use."""
    assert use.beside is not None
    return use.beside


def width(matrix: Leaf) -> int:
    """How many numbers a product makes per token."""
    return 0 if matrix.units is None else len(matrix.units.numbers)
