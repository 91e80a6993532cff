"""Views under a control as *cells*: what has a step and a factor of decay of its own.

A cell is a unit, or a block of one whose blocks have steps; where sums and factors come from elsewhere, a row. Three
kernels follow each other: `aim` sums up parts of units, `bound` makes factors of the sums and puts them to their cells,
`tiles` moves.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from sharpwise.engine.backends.base import Spec
from sharpwise.engine.backends.triton_jobs import BLOCK, SPAN, Jobs, Piece, Place, tiling
from sharpwise.engine.layout import Layouts, Rectangle, on_host, rectangles
from sharpwise.engine.view import HELD, ParamView
from sharpwise.rules.base import ThinRule

TILE = (8, 64)
"""Rows and columns of what is summed up at a time."""
WIDEST = 1 << 12
"""Columns of a row that one program sums up."""
UNITS = (4, 32)
"""Units that one program bounds, and how many of their parts it reads at a time."""


class Run(NamedTuple):
    """A rectangle of cells: the first of these is its `first`.

    Attributes:
        unit, block: of the first cell; by_block: whether the next cell is of the next block.
    """

    own: Rectangle
    unit: int
    block: int
    by_block: bool


class Cells(NamedTuple):
    """The cells of a view.

    Attributes:
        runs: in the order of their units; number: of cells.
        given: whether what they move by comes from elsewhere; by_row: whether a cell is a row.
        elements: of a unit of each segment; units: of all.
    """

    runs: list[Run]
    number: int
    given: bool
    by_row: bool
    elements: tuple[int, ...]
    units: int


def is_bounded(spec: Spec) -> bool:
    """Whether text and tables of a view are those of a control."""
    control, rule = spec.options.control, spec.view.rule
    return control is not None and rule.stage != "input" and not (control.scales_only and rule.has_blocks)


def cells_of(view: ParamView, layouts: Layouts) -> Cells:
    """A view as cells."""
    given = view.unit is not None and bool(view.shard.cut or isinstance(view.origin.rule, ThinRule))
    has_blocks, own, by_row = view.rule.has_blocks, view.layout, given or view.unit == "row"
    every = np.arange(view.numel // max(view.shape[view.dim], 1))
    segment, block = on_host(own.segment_of_row, 0 * every), on_host(own.block_of_row, every)
    matrix = on_host(view.by_unit("matrix", layouts).block_of_row, every)
    if given:
        cell, within = every, segment
    elif by_row:  # what is moved by one job has one block, or one each
        cell = on_host(view.by_unit("row", layouts).block_of_row, every)
        each = np.array([not has_blocks or cut == "row" for cut in view.cuts])[segment]
        within = np.where(each, -1 - segment, block)
    else:
        cell, within = block if has_blocks else matrix, matrix
    number = int(cell.max(initial=-1)) + 1
    first_row = np.zeros(number, np.int64)
    first_row[cell[::-1]] = every[::-1]
    layout = replace(own, segment_of_row=torch.from_numpy(within), block_of_row=torch.from_numpy(cell))
    held = rectangles(layout, view.whole_shape, view.by_row, True, bool(view.shard.cut)) if view.numel else []
    runs = []
    for one in held:
        row = first_row[one.first]
        i = int(segment[row])
        unit = one.first if by_row else int(matrix[row])
        runs.append(Run(one._replace(segment=i), unit, int(block[row]), not by_row or view.cuts[i] == "row"))
    units = [view.units_of(s) or s.copies for s in view.segments]
    sizes = tuple(s.numel // count for s, count in zip(view.segments, units, strict=True))
    return Cells(sorted(runs, key=lambda run: run.unit), number, given, by_row, sizes, sum(units))


class BoundJobs:
    """What moves a view under a control, and the jobs that bound it.

    Args:
        overs: what units may be.

    Attributes:
        parts: how many sums of parts of units there are.
    """

    def __init__(self, jobs: Jobs, overs: Sequence[str]) -> None:
        self.jobs, self.overs, self.parts = jobs, overs, 0

    def pieces(self, view: ParamView, place: Place) -> Iterator[Piece]:
        """What is summed up, and what is moved; adds jobs that bound."""
        cells: Cells = view.kept["cells"]
        by_unit: dict[Any, list[Run]] = {}
        for run in cells.runs:
            yield self._moved(run.own, place)
            if not cells.given:
                by_unit.setdefault((run.unit, run.own.start) if cells.by_row else run.unit, []).append(run)
        for runs in by_unit.values():
            begin = self.parts
            for run in runs if view.unit is not None else ():
                yield from self._summed(view, run, cells.by_row, place)
            self._bound(view, cells, runs, place, begin)

    def _moved(self, one: Rectangle, place: Place) -> Piece:
        """Short rows that lie together are one, with a cell every few columns."""
        n = one.rows * one.columns
        if not one.size and one.rows > 1 and one.columns < BLOCK and one.pitch == one.columns and n < 1 << 31:
            one = one._replace(rows=1, columns=n, pitch=n, size=one.columns)
        fields = {"first": place.cells + one.first, "by_row": not one.size, "by_column": one.size > 0}
        return Piece(("tiles", True), one, tiling(one), fields)

    def _summed(self, view: ParamView, run: Run, by_row: bool, place: Place) -> Iterator[Piece]:
        """The parts of a rectangle whose sums are taken."""
        kind = 2 if not by_row else 1 if run.own.size else 0
        for one, block, by_block in [(run.own, run.block, run.by_block)] if by_row else _tall(run):
            span = TILE[1] if kind == 1 else min(one.columns, WIDEST)
            cut = {"per": max(SPAN // span // TILE[0], 1) * TILE[0], "span": span}
            down, across = -(-one.rows // cut["per"]), -(-one.columns // span)
            fields = {"kind": kind, "sums": self.parts, "first": place.rates + block}
            if by_block:
                fields |= {"by_row": not one.size, "by_column": one.size > 0}
            yield Piece(("aim", view.rule.has_blocks), one, cut, fields)
            self.parts += (one.rows * across, down * one.columns, down * across)[kind]

    def _bound(self, view: ParamView, cells: Cells, runs: list[Run], place: Place, begin: int) -> None:
        """Add what bounds the units of these runs: several, or one in parts; its sums begin at `begin`."""
        run = runs[0]
        units = run.own.blocks if cells.by_row else 1
        parts = self.parts - begin
        first = min(run.own.first for run in runs)
        fields = {"rows": units, "columns": 1, "pitch": parts // units, "per": parts // units, "span": 1}
        if not cells.by_row:
            fields["columns"] = max(run.own.first + run.own.blocks for run in runs) - first
        elif run.own.size:
            fields |= {"per": 1, "span": units}
        held = view.origin.own[HELD].data_ptr() + 4 * run.unit if view.holds and view.unit else 0
        self.jobs.add(
            ("bound", view.rule.has_blocks),
            -(-units // UNITS[0]),
            [],
            **fields,
            size=cells.elements[run.own.segment],
            kind=2 if view.unit is None else self.overs.index(view.unit),
            sums=begin,
            counts=held,
            slot=place.slots[run.own.segment],
            view=place.units + run.unit,
            cell=place.cells + first,
            first=place.rates + (run.block if cells.by_row else first),
            by_row=cells.by_row and run.by_block,
            by_column=not cells.by_row,
        )


def _tall(run: Run) -> Iterator[tuple[Rectangle, int, bool]]:
    """Parts of a rectangle of one unit, their first blocks, and whether they have several. Long rows are cut, so that
    they fill a tile."""
    one, width = run.own, TILE[1]
    if one.rows >= TILE[0] or (one.size and one.blocks > 1):
        yield one, run.block, True
        return
    for r in range(one.rows):
        start, n, block = one.start + r * one.pitch, one.columns // width, run.block + (0 if one.size else r)
        own = one.own + r * one.pitch
        if n:
            yield one._replace(start=start, own=own, rows=n, columns=width, pitch=width, size=0), block, False
        if rest := one.columns % width:
            moved = one._replace(start=start + n * width, own=own + n * width, rows=1, columns=rest, pitch=rest, size=0)
            yield moved, block, False
