"""Tables of the Triton kernels on a device, kept between steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharpwise.engine.backends import triton_launch, triton_print
from sharpwise.engine.backends.triton_jobs import MoveJobs, Place, SumJobs, in_pieces
from sharpwise.engine.backends.triton_launch import upload
from sharpwise.engine.backends.triton_print import DeviceScalars, Formats, Printed
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.shards import Shard

Chunks = tuple[Tensor, int]
"""Chunks on the device, and how many."""


@dataclass
class Family:
    """Views that the kernels of one text move: their places among all, jobs, chunks by kernel, first scalar."""

    printed: Printed
    formats: Formats
    places: list[int] = field(default_factory=list)
    jobs: Any = None
    chunks: dict[Any, Chunks] = field(default_factory=dict)
    slot: int = 0
    segments: int = 0


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
        self._wanted = np.zeros(0, np.int64)
        self._uploaded = np.zeros(0, np.int64)
        places = self._place()
        self._sum(grads, addresses)
        self._move(places, grads, addresses)
        self.addresses = torch.empty(len(views), dtype=torch.int64, device=device)
        self.scalars = torch.empty(max(self._n_scalars, 1), dtype=torch.float32, device=device)
        self.rates = torch.empty(max(self._n_rates, 1), dtype=torch.float32, device=device)
        self._counts: dict[int, Tensor] = {}

    # -- made once -------------------------------------------------------------------------------------------------

    def _place(self) -> dict[int, Place]:
        """Where scalars and steps of blocks lie: of one family after the other."""
        places, slot, rates = {}, 0, 0
        cut = [i for i, view in enumerate(self.views) if view.rule.has_blocks and view.shard.cut]
        begins: dict[int, int] = {}
        for i in [*cut, *(i for i in range(len(self.views)) if i not in set(cut))]:
            begins[i] = rates
            if i in cut or in_pieces(self.views[i]):
                rates += self.views[i].n_blocks
        self._given = [self.views[i] for i in cut]
        for family in self.families:
            family.slot = slot
            for i in family.places:
                n = len(self.views[i].segments)
                width = len(family.printed.scalars)
                places[i] = Place(i, tuple(slot + k * width for k in range(n)), begins[i])
                slot += n * width
                family.segments += n
        self._n_scalars, self._n_rates = slot, rates
        return places

    def _sum(self, grads: list[Tensor], addresses: list[int]) -> None:
        sums = SumJobs()
        self._starts: dict[int, int] = {}
        for i, (view, g) in enumerate(zip(self.views, grads, strict=True)):
            own = view.rule.has_blocks and not view.shard.cut
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
            formats = family.formats
            moves = MoveJobs(triton_print.width(formats), formats.granule, formats.stochastic)
            for i in family.places:
                view = self.views[i]
                by_rate = bool(view.rule.has_blocks and view.shard.cut)
                moves.add(view, places[i], addresses[i], grads[i].element_size(), by_rate)
                if view.rule.has_blocks and not by_rate and in_pieces(view):
                    moves.add_phases(view, places[i], self._starts[i])
            tables = {key: moves.jobs.chunk_table(key) for key in moves.jobs.chunks}
            family.chunks = {key: (upload(own, self.device), len(own)) for key, own in tables.items() if len(own)}
            family.jobs = upload(moves.jobs.table(), self.device) if family.chunks else None

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
        self._grads, self._wanted = grads, np.array(addresses, dtype=np.int64)

    def upload_addresses(self) -> None:
        """Tell the device where gradients lie, if that changed."""
        if not np.array_equal(self._wanted, self._uploaded):
            upload(self._wanted.copy(), self.device, self.addresses)
            self._uploaded = self._wanted

    def release(self) -> None:
        """Let the gradients go."""
        self._grads = []

    def take_rates(self, rates: Mapping[int, Tensor]) -> None:
        """Steps of blocks that were worked out elsewhere."""
        if self._given:
            given = [rates[id(view)] for view in self._given]
            torch.cat(given, out=self.rates[: sum(map(len, given))])

    def write_scalars(self, scalars: StepScalars, kernels: Sequence[DeviceScalars | None], coupled: bool) -> None:
        """The scalars of a step. `kernels`: of families whose scalars are worked out on the device."""
        host: list[float] = []
        late: list[tuple[int, Tensor]] = []
        for family, kernel in zip(self.families, kernels, strict=True):
            alike: dict[Any, tuple[list[float], list[tuple[int, Tensor]]]] = {}
            for view in map(self.views.__getitem__, family.places):
                key = scalars.key(view)
                if key not in alike:
                    rows = (
                        _values(view, scalars, family.printed.scalars, coupled)
                        if kernel is None
                        else _inputs(view, scalars, kernel)
                    )
                    flat = [value for row in rows for value in row]
                    tensors = [(i, value) for i, value in enumerate(flat) if isinstance(value, Tensor)]
                    alike[key] = [0.0 if isinstance(value, Tensor) else value for value in flat], tensors
                floats, tensors = alike[key]
                late += [(len(host) + i, value) for i, value in tensors]
                host += floats
        numbers = np.array(host, dtype=np.float64)
        if all(kernel is None for kernel in kernels):
            with np.errstate(over="ignore"):
                upload(numbers.astype(np.float32), self.device, self.scalars)
            _put(self.scalars, late)
            return
        given = upload(numbers, self.device)
        _put(given, late)
        at = 0
        for f, (family, kernel) in enumerate(zip(self.families, kernels, strict=True)):
            width = len(family.printed.scalars)
            own = self.scalars[family.slot : family.slot + family.segments * width]
            wide = width if kernel is None else len(triton_print.FACTORS) + len(kernel.inputs)
            part = given[at : at + family.segments * wide]
            at += family.segments * wide
            if kernel is None:
                own.copy_(part)
                continue
            if f not in self._counts:
                views = [self.views[i] for i in family.places]
                steps = [scalars.counter.step(view).data_ptr() for view in views for _ in view.segments]
                self._counts[f] = upload(np.array(steps, dtype=np.int64), self.device)
            function = triton_print.module(kernel.text).scalars_of_step
            triton_launch.launch(function, family.segments, (part, self._counts[f], own), {}, self.device)


def _values(view: ParamView, scalars: StepScalars, names: Sequence[str], coupled: bool) -> list[list[Any]]:
    """The scalars of a view, per segment."""
    own = [scalars.of_rule(view)[name] for name in names[: -len(triton_print.OURS)]]
    t = scalars.t(view)
    found = []
    for row in scalars.rows(view):
        decay = row.decay if not coupled else 0.0 if row.weight_decay is None else row.weight_decay
        found.append([*own, row.rate, decay, t])
    return found


def _inputs(view: ParamView, scalars: StepScalars, kernel: DeviceScalars) -> list[list[Any]]:
    """What the scalars of a view are worked out from, per segment."""
    hyper = scalars.hyper(view)
    own = [hyper[name] if place is None else hyper[name][place] for name, place in kernel.inputs]
    return [[*factors, *own] for factors in scalars.factors(view)]


def _put(vector: Tensor, late: Sequence[tuple[int, Tensor]]) -> None:
    """Write numbers that only the device knows."""
    by_tensor: dict[int, tuple[Tensor, list[int]]] = {}
    for i, value in late:
        by_tensor.setdefault(id(value), (value, []))[1].append(i)
    for value, own in by_tensor.values():
        index = upload(np.array(own, dtype=np.int64), vector.device)
        vector.index_put_((index,), value.to(vector.device, vector.dtype))
