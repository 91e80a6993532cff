"""Argument tables of the C++ kernels: what a step tells them of every tensor, kept from one step to the next.

Only addresses of gradients, the scalars of the step and what sums over blocks gave are written anew.
"""

import math
from array import array
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.backends.base import Found
from sharpwise.engine.backends.cpp_print import BOUNDS, NUMBERS, TABLES
from sharpwise.engine.backends.loops import SHARED, Kernel, threads_for
from sharpwise.engine.layout import Rectangle
from sharpwise.engine.program import overs_of
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.shards import local
from sharpwise.storage.dense import step_key


class LaunchTable:
    """Arguments of one kernel for some views.

    Args:
        views: with numbers by which their gradients are found.
        runs: of those whose blocks the kernel sums up.
        found: what sums gave: here, of which views rates are found per block, or rates and decays per row.
        sums: whether the views are summed up for a control, in place of moving.

    Attributes:
        sums: uu, pu and pp of the rows of the views, fp64 [3, rows] by id of the view: those of the last launch.
    """

    def __init__(
        self,
        kernel: Kernel,
        views: Sequence[tuple[int, ParamView]],
        runs: Mapping[int, Sequence[Rectangle]],
        found: Found,
        scalars: StepScalars,
        sums: bool = False,
    ) -> None:
        self.kernel, self._only_sums = kernel, sums
        self.sums: dict[int, Tensor] = {}
        self._of_name = {name: i for i, name in enumerate((*kernel.tensors, *NUMBERS, *TABLES, *BOUNDS))}
        self._rows: list[list[int]] = []
        self._classes: list[ParamView] = []  # one view of each that share their scalars
        self._class: dict[Any, int] = {}
        self._places: list[tuple[int, int, int]] = []  # of their scalars, rates and decays among the values of a step
        self._kept: list[Tensor] = []
        self._found: list[tuple[int, str, ParamView, int]] = []  # rows, and from where on which numbers of a view
        self._told: list[tuple[ParamView, list[tuple[int, int, int]]]] = []  # bounded as they move: segment, first unit
        self._of_class: list[int] = []
        self._size = self.total = self.elements = self.widest = 0
        self._begun = 0  # rows of the view at hand whose sums have a place
        for number, view in views:
            own = self._class_of(view, scalars)
            given, bounded = _given(view, found), not sums and self._bounds(view, found)
            if bounded and view.unit == "matrix":
                rows = [self._unit(view, unit) for unit in units_of(view)]
            else:
                rows = self._matrices(view, runs.get(id(view), ()), given, scalars.stochastic, bounded, sums or bounded)
            if bounded:
                self._told.append((view, []))
            for row in rows:
                segment, first_unit = row.pop("segment", 0), row.pop("first unit", 0)
                if sums:
                    row |= self._summed(view)
                elif bounded:
                    self._told[-1][1].append((len(self._rows), segment, first_unit))
                    row |= self._by_unit(view, found, first_unit)
                scalars_at, rates_at, decays_at = self._places[own]
                row |= {"scalars_at": scalars_at, "rates_at": rates_at + segment, "decays_at": decays_at + segment}
                for what in given:
                    self._found.append((len(self._rows), what, view, row[what]))
                    row[f"{what}_at"] = -1
                row["owner"] = number
                self._rows.append([row.get(name, 0) for name in self._of_name])
                self._of_class.append(own)
        self._finish(views)

    # -- built once ------------------------------------------------------------------------------------------------

    def _class_of(self, view: ParamView, scalars: StepScalars) -> int:
        key = scalars.key(view)
        if key not in self._class:
            self._class[key] = len(self._classes)
            self._classes.append(view)
            of_rule, segments = len(self.kernel.scalars), len(view.segments)
            self._places.append((self._size, self._size + of_rule, self._size + of_rule + segments))
            self._size += of_rule + 2 * segments
        return self._class[key]

    def _matrices(
        self,
        view: ParamView,
        runs: Sequence[Rectangle],
        given: Collection[str],
        stochastic: bool,
        bounded: bool,
        lines: bool,
    ) -> list[dict[str, int]]:
        """A view as matrices, in the words of the kernel.

        Args:
            given: see `_given`; bounded: whether a control bounds them as they move; lines: whether rows or columns are
                told apart where all are alike.
        """
        layout, by_row = view.layout, view.by_row
        first, stride = first_index(view)
        shape, segments = (view.shape[-2], view.shape[-1]), layout.segment_of_row
        if runs and by_row:
            found = []
            for run in runs:
                row = self._row(view, run.own, (run.rows, run.columns), True)
                row |= {"first": first + run.own, "stride": run.columns, "blocks": run.rows, "segment": run.segment}
                row |= {f"state.{name}": self._address(t, run.first) for name, t in view.blocks.items()}
                found.append(row | {"counts": self._address(layout.counts, run.first)})
            return found
        if runs:
            row = self._row(view, 0, shape, False, together=view.numel >= SHARED)
            row |= {"first": first, "stride": stride, "blocks": view.n_blocks}
            row |= {f"state.{name}": self._address(t) for name, t in view.blocks.items()}
            row |= {"counts": self._address(layout.counts), "block_of": self._address(layout.block_of_row)}
            return [row | self._by_line(view, segments)]
        blocked = any(held.format.block for held in view.stored())  # whose lines are taken one by one
        flat = view.uniform and view.contiguous and not (stochastic and scattered(view))
        if flat and not given and not blocked and not lines:
            return [self._row(view, 0, (1, view.numel), True) | {"first": first}]
        if by_row and shape[1] == 1:
            shape, by_row = (1, shape[0]), False  # numbers with rates of their own
        found = []
        for copy in range(view.numel // (shape[0] * shape[1])):
            together = bounded and not by_row and view.numel >= SHARED
            row = self._row(view, copy * shape[0] * shape[1], shape, by_row, together)
            row |= {"first": first + copy * shape[0] * stride, "stride": stride}
            start = copy * shape[1]
            row |= {**self._by_line(view, segments, start), "first unit": start}
            if "decays" in given:
                row |= {"rate_of": 0, "rate_stride": 1, "rates": start}
                row |= {"decay_of": 0, "decay_stride": 1, "decays": start}
            elif given:
                owner = self._address(layout.block_of_row, start)
                row |= {"rate_of": owner, "rate_stride": 1, "rates": 0 if owner else start}
            found.append(row)
        return found

    def _bounds(self, view: ParamView, found: Found) -> bool:
        """Whether a control bounds a view as it moves: it has not given its `lines`."""
        told = view.unit is not None and found.told is not None
        return told and self.kernel.control is not None and id(view) not in found.lines

    def _by_unit(self, view: ParamView, found: Found, first: int) -> dict[str, int]:
        """What a control is told of units from one on: `BOUNDS` that are the same at every step."""
        assert found.told is not None and self.kernel.control is not None
        told, over = found.told(view), overs_of(self.kernel.control).index(view.unit)
        if view.unit == "matrix":
            return {"over": over, "held": self._address(told.held, first)}
        lines = {name: self._address(getattr(told, name), first) for name in ("setting_of", "unit_of")}
        return {"over": over, **lines, "held": self._address(told.held, 0 if lines["unit_of"] else first)}

    def _summed(self, view: ParamView) -> dict[str, int]:
        """Where the sums of the next matrix of a view are."""
        lines = view.numel // view.shape[view.dim]
        if id(view) not in self.sums:
            self.sums[id(view)] = torch.zeros(3, lines, dtype=torch.float64, device="cpu")
            self._begun = 0
        start, self._begun = self._begun, self._begun + lines // (view.numel // (view.shape[-2] * view.shape[-1]))
        return {"sums": self._address(self.sums[id(view)], start), "apart": lines}

    def _unit(self, view: ParamView, own: "Unit") -> dict[str, int]:
        """A unit that is bounded as a whole, by all threads if it is large."""
        row = self._row(view, own.start, (own.rows, own.columns), False, together=view.numel >= SHARED)
        first, stride = first_index(view)
        row |= {"first": first + own.start, "stride": own.pitch or stride}
        row |= {name: own.pitch for name in row if name.startswith("pitch")} if own.pitch else {}
        return row | {"unit": 1, "segment": own.segment, "first unit": own.number}

    def _by_line(self, view: ParamView, segments: Tensor | None, start: int = 0) -> dict[str, int]:
        """Rates and decays of rows or columns by their segments."""
        of = 0 if view.uniform else self._address(segments, start)
        return {"rate_of": of, "decay_of": of}

    def _row(
        self, view: ParamView, start: int, shape: tuple[int, int], by_row: bool, together: bool = False
    ) -> dict[str, int]:
        rows, size = view.layout.rows, shape[0] * shape[1]
        before = -1 if together else self.total
        if not by_row:
            self.widest = max(self.widest, shape[1], view.n_blocks)
        self.total += 0 if together else size
        self.elements += size
        tensors, absmax = {"p": view.parameter()}, {"line": view.shape[-1]}
        for name, held in zip(view.elements, view.stored(), strict=True):
            tensors[f"state.{name}"] = held.codes
            if held.absmax is not None:
                at = start // view.shape[-1] * held.absmax.shape[-1]
                absmax[f"absmax.state.{name}"] = self._address(held.absmax, at)
        skipped = rows.start * (view.shape[1] if view.by_row else 1) if isinstance(rows, slice) else 0
        numbers = {"rows": shape[0], "columns": shape[1], "by_row": by_row, "before": before}
        columns, pairs = is_columns(view), zip(view.elements, view.stored(), strict=True)
        apart = {f"pitch.state.{name}": held.codes.stride(0) if columns else shape[1] for name, held in pairs}
        numbers |= {"pitch": view.whole_shape[-1] if columns else shape[1], **apart}
        addresses = {name: self._address(tensor, start) for name, tensor in tensors.items()} | absmax
        return {**addresses, **numbers, "offset": skipped + start}

    def _address(self, tensor: Tensor | None, start: int = 0) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr() + start * tensor.element_size()

    def _finish(self, views: Sequence[tuple[int, ParamView]]) -> None:
        """The table itself."""
        self.table = torch.tensor(self._rows, dtype=torch.int64, device="cpu").view(-1, self.kernel.width)
        by_number = dict(views)
        names = [by_number[row[self._of_name["owner"]]].key for row in self._rows]
        self._names, self._class_of_row = (
            torch.tensor(numbers, dtype=torch.int64, device="cpu") for numbers in (names, self._of_class)
        )
        self._move = self.kernel.call(self.table, self.total, self.widest, threads_for(self.elements), self._only_sums)

    # -- at every step ---------------------------------------------------------------------------------------------

    def launch(self, gradients: "array[int]", scalars: StepScalars, found: Found) -> None:
        """Move the views.

        Args:
            gradients: addresses of those of all views of the step, which are contiguous.
        """
        values: list[Any] = []
        for view in self._classes:
            named, rows = scalars.named(view), scalars.rows(view)
            values += [named[n] if n in named else _OFF[n] for n in self.kernel.scalars]
            values += [row.rate for row in rows]
            values += [row.decay for row in rows]
        if scalars.stochastic:
            keys = [step_key(int(scalars.t(view)), view.group["seed"]) for view in self._classes]
            own = torch.tensor(keys, dtype=torch.int64, device="cpu")[self._class_of_row]
            self.table[:, self._of_name["key"]] = (self._names + own) & 0xFFFFFFFF
        kept: list[Any] = []
        for row, what, view, start in self._found:
            kept.append(_given(view, found)[what].float().contiguous())
            self.table[row, self._of_name[what]] = kept[-1].data_ptr() + 4 * start
        for view, places in self._told:
            assert found.told is not None
            told = found.told(view)
            kept.append(told)
            for row, segment, unit in places:
                for name, start in (("settings", segment), ("snr_factors", unit)):
                    own_values = getattr(told, name)
                    self.table[row, self._of_name[name]] = 0 if own_values is None else own_values[start:].data_ptr()
        numbers = array("f", values)
        clip = 1.0 if scalars.clip is None else float(scalars.clip_of(self._classes[0]))
        self._move(gradients.buffer_info()[0], numbers.buffer_info()[0], clip)


def _given(view: ParamView, found: Found) -> dict[str, Tensor]:
    """What of a view is not among the values of the step: its rates per block, or rates and decays per row."""
    if id(view) in found.lines:
        return {"rates": found.lines[id(view)].rate, "decays": found.lines[id(view)].decay}
    return {"rates": found.rates[id(view)]} if id(view) in found.rates else {}


_OFF = {"clip": 1.0, "weight_decay": 0.0}


class Unit(NamedTuple):
    """A unit of a control as a rectangle of what a view has here.

    Attributes:
        start, rows, columns, pitch: of the rectangle, the last 0 where it is all of the view; segment: its number;
            number: of the unit.
    """

    start: int
    rows: int
    columns: int
    pitch: int
    segment: int
    number: int


def units_of(view: ParamView) -> list[Unit]:
    """The units of a view that is bounded by whole matrices, or by vectors; none if not each is one rectangle here."""
    coded = any(held.format.block for held in view.stored())
    if view.unit != "matrix" or view.shard.cut or view.rule.has_blocks or coded:
        return []
    if is_columns(view):
        return [Unit(0, view.shape[0], view.shape[1], 0, 0, 0)] if view.n_matrices == 1 else []
    counts = [view.units_of(segment) for segment in view.segments]
    numbers = list(accumulate(counts, initial=0))
    found = []
    for own in view.rectangles:
        size, elements = view.segments[own.segment].numel // counts[own.segment], own.rows * own.columns
        if not size or elements % size or (elements > size and own.rows > 1):
            return []
        rows_lie = own.rows == 1 and view.is_matrix and size % view.shape[-1] == 0  # one after the other
        width = view.shape[-1] if rows_lie else min(own.columns, size)
        starts = range(own.own, own.own + elements, size) if own.rows == 1 else (own.own,)
        for start in starts:
            shape = (own.rows, width) if own.rows > 1 else (size // width, width)
            found.append(Unit(start, *shape, own.pitch if own.rows > 1 else width, own.segment, numbers[own.segment]))
            numbers[own.segment] += 1
    return found if len(found) == sum(counts) else []


def is_columns(view: ParamView) -> bool:
    """Whether a view is some columns of a parameter, which lie apart from row to row, and its state may as well."""
    if view.contiguous or view.by_row or not isinstance(view.layout.rows, slice) or len(view.shape) != 2:
        return False
    coded = [held.codes for held in view.stored() if held.format.block]  # whose blocks are counted as they lie
    return local(view.param).is_contiguous() and all(codes.stride(0) == view.shape[1] for codes in coded)


def scattered(view: ParamView) -> bool:
    """Whether elements that are neighbours here are none in the whole parameter."""
    return view.shard.shape[1:] != tuple(local(view.param).shape)[1:]


def first_index(view: ParamView) -> tuple[int, int]:
    """The global number of the first element of a view, and how far its rows are apart; see `index_refused`."""
    shape, offset = view.shard.shape, view.shard.offset
    first, size = 0, 1
    for n, start in zip(reversed(shape), reversed(offset), strict=True):
        first += start * size
        size *= n
    rows = view.layout.rows
    stride = 1
    if len(shape) > 1:
        stride = math.prod(shape[view.segments[0].dim + 1 :]) if view.by_row else int(shape[-1])
    return first + (rows.start * (stride if view.by_row else 1) if isinstance(rows, slice) else 0), stride


def index_refused(view: ParamView) -> str:
    """Why the global numbers of its elements are not those of equally spaced rows, or ""."""
    inner = zip(view.shard.shape[1:], local(view.param).shape[1:], strict=True)
    cut = view.param.dim() > 2 and any(whole != own for whole, own in inner)
    return "stochastic rounding of a shard that is cut inside" if cut else ""
