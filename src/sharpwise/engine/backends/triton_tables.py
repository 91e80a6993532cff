"""Tables of the Triton kernels on a device, kept between steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpwise.engine.backends import triton_launch, triton_print
from sharpwise.engine.backends.base import Found
from sharpwise.engine.backends.triton_bounds import BoundJobs, Cells
from sharpwise.engine.backends.triton_jobs import Array, MoveJobs, Place, SumJobs, in_pieces, pieces_of
from sharpwise.engine.backends.triton_launch import Staged, upload
from sharpwise.engine.backends.triton_print import DeviceScalars, Printed
from sharpwise.engine.program import overs_of
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.shards import Shard

Chunks = tuple[Tensor, int]
"""Chunks on the device, and how many."""


@dataclass
class Family:
    """Views that the kernels of one text move: their places among all, jobs, chunks by kernel, first scalar.

    scalars: the kernel that works out their scalars in this step; None if the host does. sums: for a control.
    """

    printed: Printed
    scalars: DeviceScalars | None = None
    places: list[int] = field(default_factory=list)
    jobs: Any = None
    chunks: dict[Any, Chunks] = field(default_factory=dict)
    slot: int = 0
    segments: int = 0
    sums: Any = None


class Tables:
    """Of the views of one device that move together.

    Args:
        grads, addresses: of this step; the alignment of those is a part of the tables.
        summed: of which views the squares are added to totals.
    """

    def __init__(
        self,
        views: list[ParamView],
        grads: list[Tensor],
        addresses: list[int],
        families: list[Family],
        summed: list[bool],
        device: torch.device,
    ) -> None:
        self.views, self.families, self.summed, self.device = views, families, summed, device
        self._groups = list({id(view.group): view.group for view in views}.values())
        self._kind = self._kind_of(grads, addresses)
        self._grads: list[Tensor] = []
        self.wanted = np.zeros(0, np.int64)
        places = self._place()
        self._sum(grads, addresses)
        self._move(places, grads, addresses)
        self.addresses = Staged(len(views), torch.int64, device)
        self.scalars = torch.empty(max(self._n_scalars, 1), dtype=torch.float32, device=device)
        self.rates = torch.empty(max(self._n_rates, 1), dtype=torch.float32, device=device)
        self.cells = torch.empty(max(self._n_cells, 1), 2, dtype=torch.float32, device=device)
        self.snr = torch.ones(max(self._n_units, 1), dtype=torch.float64, device=device)
        self.inputs: Staged | None = None
        self._counts: dict[int, Tensor] = {}
        self._late: dict[tuple[int, ...], Tensor] = {}

    # -- made once -------------------------------------------------------------------------------------------------

    def _place(self) -> dict[int, Place]:
        """Where scalars and steps of blocks lie: of one family after the other."""
        places, slot, rates = {}, 0, 0
        cut = [i for i, view in enumerate(self.views) if view.rule.has_blocks and view.summed_apart]
        begins: dict[int, int] = {}
        for i in [*cut, *(i for i in range(len(self.views)) if i not in set(cut))]:
            begins[i] = rates
            if i in cut or in_pieces(self.views[i]):
                rates += self.views[i].n_blocks
        self._given = [self.views[i] for i in cut]
        cells, units, of_control = 0, 0, {}
        self._lines: list[ParamView] = []
        self._bounded: list[tuple[ParamView, Any]] = []
        # Cells whose numbers are given come first, too.
        for i, own in sorted(self._cells().items(), key=lambda item: not item[1].given):
            of_control[i] = cells, units
            cells += own.number
            if own.given:
                self._lines.append(self.views[i])
            else:
                self._bounded.append((self.views[i], slice(units, units + own.units)))
                units += own.units
        for family in self.families:
            family.slot = slot
            for i in family.places:
                n = len(self.views[i].segments)
                width = len(family.printed.scalars)
                slots = tuple(slot + k * width for k in range(n))
                places[i] = Place(i, slots, begins[i], *of_control.get(i, (0, 0)))
                slot += n * width
                family.segments += n
        self._n_scalars, self._n_rates, self._n_cells, self._n_units = slot, rates, cells, units
        return places

    def _cells(self) -> dict[int, Cells]:
        """Of the views under a control, by their places."""
        return {i: view.kept["cells"] for i, view in enumerate(self.views) if "cells" in view.kept}

    def _sum(self, grads: list[Tensor], addresses: list[int]) -> None:
        sums = SumJobs()
        self._starts: dict[int, int] = {}
        for i, (view, g) in enumerate(zip(self.views, grads, strict=True)):
            own = view.rule.has_blocks and not view.summed_apart
            self._starts[i] = sums.blocks
            if own or self.summed[i]:
                sums.add(view, i, addresses[i], g.dtype, self.summed[i], own)
        chunks, starts, totals = sums.tables()
        self.sum_chunks = {key: (upload(own, self.device), len(own)) for key, own in chunks.items() if len(own)}
        self.sum_jobs = upload(sums.jobs.table(), self.device)
        self.starts = upload(starts, self.device)
        self.partial = torch.empty(max(sum(map(len, chunks.values())), 1), dtype=torch.float64, device=self.device)
        shards: dict[Any, Shard] = {
            v.shard.holders: v.shard for v, own in zip(self.views, self.summed, strict=True) if own
        }
        self.totals = [(shards[h], where) for h, where in totals.items() if h in shards and where.stop > where.start]

    def _move(self, places: Mapping[int, Place], grads: list[Tensor], addresses: list[int]) -> None:
        for family in self.families:
            formats = family.printed.formats
            moves, control = MoveJobs(formats.width, formats.granule, formats.stochastic), family.printed.control
            bounds = None if control is None else BoundJobs(moves.jobs, overs_of(control))
            for i in family.places:
                view, place = self.views[i], places[i]
                by_rate = view.rule.has_blocks and view.summed_apart
                pieces = pieces_of(view, place, by_rate) if bounds is None else bounds.pieces(view, place)
                moves.add(view, place, addresses[i], grads[i].element_size(), pieces)
                if view.rule.has_blocks and not by_rate and in_pieces(view):
                    moves.add_phases(view, places[i], self._starts[i])
            tables = {key: moves.jobs.chunk_table(key) for key in moves.jobs.chunks}
            family.chunks = {key: (upload(own, self.device), len(own)) for key, own in tables.items() if len(own)}
            family.jobs = upload(moves.jobs.table(), self.device) if family.chunks else None
            parts = 0 if bounds is None else bounds.parts
            family.sums = torch.empty(max(3 * parts, 1), dtype=torch.float64, device=self.device)

    # -- of a step -------------------------------------------------------------------------------------------------

    def _kind_of(self, grads: Sequence[Tensor], addresses: Sequence[int]) -> Any:
        seeds = [group.get("seed") for group in self._groups]
        return [g.dtype for g in grads], [a % 16 for a in addresses], seeds

    def serve(
        self, views: Sequence[ParamView], grads: Sequence[Tensor], addresses: Sequence[int], summed: Sequence[bool]
    ) -> bool:
        """Whether these are the tables of such a step."""
        same = len(views) == len(self.views) and all(a is b for a, b in zip(views, self.views, strict=True))
        return same and list(summed) == self.summed and self._kind == self._kind_of(grads, addresses)

    def use(self, grads: list[Tensor], addresses: Sequence[int]) -> None:
        """Take the gradients of a step; they are kept until it is done."""
        self._grads, self.wanted = grads, np.array(addresses, dtype=np.int64)

    def release(self) -> None:
        """Let the gradients go."""
        self._grads = []

    def take(self, found: Found) -> None:
        """What was worked out elsewhere: steps of blocks, and under a control what rows move by, and factors of SNR."""
        if self._given:
            given = [found.rates[id(view)] for view in self._given]
            torch.cat(given, out=self.rates[: sum(map(len, given))])
        if self._lines:
            pairs = [[own.expand(view.row_shape).reshape(-1) for own in found.lines[id(view)]] for view in self._lines]
            both = torch.stack([torch.cat(own) for own in zip(*pairs, strict=True)], 1)
            self.cells[: len(both)] = both
        if self._bounded and found.snr_factors is not None:
            own = [(at, known) for view, at in self._bounded if (known := found.snr_factors(view)) is not None]
            if own:
                torch._foreach_copy_([self.snr[at] for at, _ in own], [known for _, known in own])

    def write_scalars(self, scalars: StepScalars) -> None:
        """The scalars of a step, from the host, or worked out on the device where only that knows the step."""
        own = [family for family in self.families if family.scalars is not None]
        if len(own) < len(self.families):
            numbers, late = self._numbers(scalars, False)
            with np.errstate(over="ignore"):
                upload(numbers.astype(np.float32), self.device, self.scalars)
            self._put(self.scalars, late)
        if not own:
            return
        numbers, late = self._numbers(scalars, True)
        if self.inputs is None or len(self.inputs.tensor) != len(numbers):
            self.inputs = Staged(len(numbers), torch.float64, self.device)
        given = self.inputs.write(numbers)
        self._put(given, late)
        for family in own:
            assert family.scalars is not None
            if family.slot not in self._counts:
                views = [self.views[i] for i in family.places]
                steps = [scalars.counter.step(view.origin).data_ptr() for view in views for _ in view.segments]
                self._counts[family.slot] = upload(np.array(steps, dtype=np.int64), self.device)
            own_inputs, given = given.tensor_split([family.segments * family.scalars.width])
            args = own_inputs, self._counts[family.slot], self.scalars[family.slot :]
            function = triton_print.module(family.scalars.text).scalars_of_step
            triton_launch.launch(function, family.segments, args, {}, self.device)

    def _numbers(self, scalars: StepScalars, on_device: bool) -> tuple[Array, list[tuple[int, Tensor]]]:
        """Scalars of a step, or what the device works them out from, and which of them only a device knows."""
        numbers: list[float] = []
        late: list[tuple[int, Tensor]] = []
        for family in self.families:
            if on_device != (family.scalars is not None):
                numbers += [] if on_device else [0.0] * (family.segments * len(family.printed.scalars))
                continue
            alike: dict[Any, tuple[list[float], list[tuple[int, Tensor]]]] = {}
            for view in map(self.views.__getitem__, family.places):
                if (key := scalars.key(view)) not in alike:
                    rows = _inputs(view, scalars, family.scalars) if family.scalars else _values(view, scalars, family)
                    flat = [value for row in rows for value in row]
                    tensors = [(i, value) for i, value in enumerate(flat) if isinstance(value, Tensor)]
                    alike[key] = [0.0 if isinstance(value, Tensor) else value for value in flat], tensors
                floats, tensors = alike[key]
                late += [(len(numbers) + i, value) for i, value in tensors]
                numbers += floats
        return np.array(numbers, dtype=np.float64), late

    def _put(self, vector: Tensor, late: Sequence[tuple[int, Tensor]]) -> None:
        """Write numbers that only the device knows."""
        by_tensor: dict[int, tuple[Tensor, list[int]]] = {}
        for i, value in late:
            by_tensor.setdefault(id(value), (value, []))[1].append(i)
        for value, own in by_tensor.values():
            if (places := tuple(own)) not in self._late:
                self._late[places] = upload(np.array(own, dtype=np.int64), vector.device)
            vector.index_put_((self._late[places],), value.to(vector.device, vector.dtype))


def _values(view: ParamView, scalars: StepScalars, family: Family) -> list[list[Any]]:
    """The scalars of a view, per segment."""
    printed = family.printed
    own = {**scalars.of_rule(view), "t": scalars.t(view)}
    told = scalars.settings(view) if printed.control is not None else [{}] * len(view.segments)
    found = []
    for row, of_control in zip(scalars.rows(view), told, strict=True):
        decay = row.decay if not printed.coupled else 0.0 if row.weight_decay is None else row.weight_decay
        known = {**own, "step": row.rate, "decay": decay, **{f"told_{name}": x for name, x in of_control.items()}}
        found.append([known[name] for name in printed.scalars])
    return found


def _inputs(view: ParamView, scalars: StepScalars, kernel: DeviceScalars) -> list[list[Any]]:
    """What the scalars of a view are worked out from, per segment."""
    hyper = scalars.hyper(view)
    own = [hyper[name] if place is None else hyper[name][place] for name, place in kernel.inputs]
    return [[*factors, *own] for factors in scalars.factors(view)]
