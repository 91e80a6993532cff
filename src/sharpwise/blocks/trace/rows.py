"""Rows that were seen to have roles -> the segments of a parameter."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sharpwise.blocks.roles import Role
from sharpwise.blocks.segment import Segment
from sharpwise.blocks.trace.weights import Array

ROLES = tuple(Role)
Coords = Sequence[Array | None]


class Ledger:
    """The roles of the output rows of one parameter, as they are found; who comes first stays.

    Rows are known by their index along the dimensions that run along a product's output. One such dimension is the
    usual case; one more before it counts stacked copies.

    Attributes:
        shape: of the parameter; layer, bias, stacked: as in a Segment.
        why: the first finding in words.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.layer: int | None = None
        self.bias = False
        self.stacked = False
        self.why = ""
        self.whole: Role | None = None  # of a parameter that is not cut by rows
        self._dims: list[int] = []
        self._roles = np.zeros(0, dtype=np.int8)  # along _dims; -1: none
        self._heads: dict[Role, dict[bytes, Array]] = {}

    @property
    def known(self) -> bool:
        """Whether anything is known."""
        return self.whole is not None or bool(self._dims)

    @property
    def roles(self) -> set[Role]:
        """All roles in it."""
        return {self.whole} if self.whole is not None else {ROLES[code] for code in np.unique(self._roles) if code >= 0}

    def settle(self, role: Role, why: str, first: bool = False) -> None:
        """The whole parameter has this role, unless it is known already (`first`: even then)."""
        if first or not self.known:
            self.whole, self.why = role, why

    def assign(self, coords: Coords, role: Role, why: str) -> None:
        """Rows without a role get this one."""
        at = self._grid(coords)
        if at is not None:
            self._roles[at] = np.where(self._roles[at] < 0, ROLES.index(role), self._roles[at])
            self.why = self.why or why

    def add_head(self, coords: Coords, role: Role) -> None:
        """These rows are one head; the same head met again does not count."""
        at = self._grid(coords)
        if at is not None:
            rows = np.unique(np.ravel_multi_index(at, self._roles.shape))
            self._heads.setdefault(role, {}).setdefault(rows.tobytes(), rows)

    def codes_at(self, coords: Coords | None) -> Array | int:
        """The roles of rows so far, by their place in ROLES, -1 where there is none; one number if it is of all."""
        if self.whole is not None:
            return ROLES.index(self.whole)
        at = None if coords is None or not self._dims else self._grid(coords)
        return -1 if at is None else self._roles[at]

    def _grid(self, coords: Coords) -> tuple[Array, ...] | None:
        """Index arrays into `_roles`; the first call settles the dimensions. None where these are others."""
        if not self._dims:
            given = [d for d in range(min(len(coords), len(self.shape))) if coords[d] is not None]
            # Of one output alone: a row of all, or a column; of stacked copies each has one.
            self._dims = [d for d in given if self.shape[d] > 1] or (
                [0] if given[:1] == [0] and not self.stacked else given[-1:]
            )
            self._roles = np.full([self.shape[d] for d in self._dims], -1, dtype=np.int8)
        index = [c for d in self._dims if d < len(coords) and (c := coords[d]) is not None]
        return tuple(index) if index and len(index) == len(self._dims) else None

    # -- segments ----------------------------------------------------------------------------------------------------

    def segments(self, name: str) -> list[Segment]:
        """The segments; rows without a role are `other`."""
        base: dict[str, Any] = {
            "name": name, "shape": self.shape, "layer": self.layer, "bias": self.bias, "source": "trace",
        }  # fmt: skip
        if self.whole is not None or not self._dims:
            return [Segment(role=self.whole or Role.OTHER, **base)]
        roles, dim, stacked, merged = self._roles, self._dims[0], self.stacked, False
        heads = {role: self._separate_heads(role) for role in self._heads}
        if len(self._dims) > 1:
            copies = roles.reshape(len(roles), -1)
            seen = copies[(copies >= 0).any(1)]  # a copy that was never visited says nothing
            if len(self._dims) == 2 and dim == 0 and (seen == seen[0]).all():
                dim, stacked, roles = self._dims[1], True, seen[0]
                heads = {role: _of_first_copy(found, self.shape[dim]) for role, found in heads.items()}
            elif self._dims == [*range(len(self._dims))] and len(np.unique(roles)) > 1:
                # Matrices of several roles in one parameter, one after the other.
                dim, merged, roles = self._dims[-1], True, roles.reshape(-1)
            else:
                heads = {role: _along_first(found, copies.shape[1]) for role, found in heads.items()}
                roles = np.where((copies == copies[:, :1]).all(1), copies[:, 0], -1)
        codes = np.where(roles < 0, ROLES.index(Role.OTHER), roles)
        return [
            Segment(role=ROLES[code], dim=dim, stacked=stacked, merged=merged, heads=count, **base, **ranges)
            for code in dict.fromkeys(codes[np.flatnonzero(np.diff(codes, prepend=-1))].tolist())
            for ranges, count in _ranges(np.flatnonzero(codes == code), heads.get(ROLES[code], []))
        ]

    def _separate_heads(self, role: Role) -> list[Array]:
        """The heads in the order of their rows, if they share none and hold rows of this role only; else none."""
        found = sorted(self._heads[role].values(), key=lambda head: int(head[0]))
        rows = np.concatenate(found)
        alone = len(np.unique(rows)) == len(rows) and bool((self._roles.reshape(-1)[rows] == ROLES.index(role)).all())
        return found if alone else []


def roles_of(codes: Array) -> set[Role | None]:
    """The roles that stand in ROLES at these places; None for -1."""
    return {None if code < 0 else ROLES[code] for code in np.unique(codes).tolist()}


def _of_first_copy(heads: list[Array], width: int) -> list[Array]:
    """Heads within one copy each; those of the first copy stand for all."""
    if not heads or any(len(np.unique(head // width)) > 1 for head in heads):
        return []
    return [head % width for head in heads if head[0] // width == heads[0][0] // width]


def _along_first(heads: list[Array], size: int) -> list[Array]:
    """Heads that are whole slices of the first of several output dimensions."""
    return [np.unique(head // size) for head in heads] if all(len(head) % size == 0 for head in heads) else []


def _ranges(rows: Array, heads: list[Array]) -> list[tuple[dict[str, Any], int | None]]:
    """Equally spaced ranges that cover the rows, and how many heads each holds.

    One set of ranges if the heads are equal parts of it, in order; else one per head; else one per run of rows.
    """
    heads = heads if sum(map(len, heads)) == len(rows) else []
    in_order = bool(heads) and len({len(h) for h in heads}) == 1 and np.array_equal(np.concatenate(heads), rows)
    spaced = _spaced(rows)
    if spaced is not None and (in_order or not heads):
        return [(spaced, len(heads) or None)]
    each = [_spaced(head) for head in heads]
    if heads and None not in each:
        return [(ranges, 1) for ranges in each if ranges is not None]
    breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return [({"start": int(rows[a]), "length": b - a}, None) for a, b in pairwise(breaks)]


def _spaced(rows: Array) -> dict[str, Any] | None:
    """The rows as one set of equally spaced ranges of equal length, None if they are not."""
    start = int(rows[0])
    if rows[-1] - start + 1 == len(rows):
        return {"start": start, "length": len(rows)}
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
    length = len(runs[0])
    stride = int(runs[1][0]) - start
    even = all(len(run) == length and int(run[0]) == start + i * stride for i, run in enumerate(runs))
    return {"start": start, "length": length, "stride": stride, "count": len(runs)} if even else None
