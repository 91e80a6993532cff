"""The block phase: new block state, and the step sizes of blocks, for all views of a class in a handful of calls.

A block that spans parameters is in the state of each of them: their sums are added up here, over what has a gradient,
and all get the same mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.layout import rows_of_blocks
from sharpwise.engine.norms import SquareSum
from sharpwise.engine.scalars import StepScalars, rounded
from sharpwise.engine.view import ParamView


@dataclass
class _Batch:
    """Views of one class, with what of them does not change: elements per block, and the segment of each block."""

    views: list[ParamView]
    sizes: list[int]
    counts: Tensor
    of_segment: Tensor

    @staticmethod
    def of(views: list[ParamView]) -> "_Batch":
        layouts = [view.layout for view in views]
        counts = [layout.counts for layout in layouts if layout.counts is not None]
        owners, start = [], 0
        for view, own in zip(views, counts, strict=True):
            of = view.layout.segment_of_block
            owners.append((torch.zeros(len(own), dtype=torch.int64, device=own.device) if of is None else of) + start)
            start += len(view.segments)
        return _Batch(views, [len(own) for own in counts], torch.cat(counts), torch.cat(owners))


@dataclass
class _Spans:
    """Blocks that span views.

    Attributes:
        key: ids of the views; index: of their blocks, one after the other, of which span each is a part, int64.
        table: parts of each block, padded with -1, int64 [blocks, most parts].
        counts: elements of the blocks of each view, on its device.
    """

    key: tuple[int, ...]
    index: Tensor
    table: Tensor
    counts: list[Tensor]

    @staticmethod
    def of(views: Sequence[ParamView], key: tuple[int, ...], device: torch.device) -> "_Spans":
        numbers: dict[Any, int] = {}
        owners = [numbers.setdefault(one, len(numbers)) for view in views for one in view.joint]
        index = torch.tensor(owners, dtype=torch.int64, device="cpu")
        sizes = [len(view.joint) for view in views]
        spans = _Spans(key, index, rows_of_blocks(index, 0, len(numbers)), [])
        own = torch.cat([view.layout.counts.cpu() for view in views if view.layout.counts is not None])
        parts = spans.gather(own)[index].split(sizes)
        spans.counts = [part.to(view.device) for view, part in zip(views, parts, strict=True)]
        spans.index, spans.table = index.to(device), spans.table.to(device)
        return spans

    def gather(self, values: Tensor) -> Tensor:
        """Parts -> sums per block, in the order of the parts."""
        return torch.cat((values, values.new_zeros(1)))[self.table].sum(1)


class BlockPhase:
    """Moves block state."""

    def __init__(self, scalars: StepScalars) -> None:
        self.scalars = scalars
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._spans: _Spans | None = None

    def run(self, views: Sequence[ParamView], sums: Sequence[SquareSum | None]) -> dict[int, Tensor]:
        """Write the new block state of views whose sums are given; their step sizes per block, by id of the view."""
        together: dict[Any, list[tuple[ParamView, SquareSum]]] = {}
        for view, squares in zip(views, sums, strict=True):
            if squares is not None:
                kind = self.scalars.class_key(view), view.dtype, view.own["step"].dtype
                together.setdefault(kind, []).append((view, squares))
        rates: dict[int, Tensor] = {}
        spanning = [(v, s) for pairs in together.values() for v, s in pairs if v.joint]
        joint = self._joined(spanning) if spanning else {}
        for pairs in together.values():
            own = [view for view, _ in pairs]
            batch = self._batch(own)
            found = self._step(batch, *self._sums(batch, [squares for _, squares in pairs], joint))
            for view, rate in zip(own, found, strict=True):
                rates[id(view)] = rate
        return rates

    def _batch(self, views: list[ParamView]) -> _Batch:
        key = tuple(map(id, views))
        if key not in self._batches:
            self._batches = {**dict(list(self._batches.items())[-15:]), key: _Batch.of(views)}
        return self._batches[key]

    def _sums(
        self, batch: _Batch, squares: Sequence[SquareSum], joint: Mapping[int, tuple[SquareSum, Tensor]]
    ) -> tuple[SquareSum, Tensor]:
        """Sums over blocks, and how many elements each has."""
        if not joint:
            return SquareSum.joined(squares), batch.counts
        counts = [view.layout.counts for view in batch.views]
        whole = [joint.get(id(v), (s, c)) for v, s, c in zip(batch.views, squares, counts, strict=True)]
        return SquareSum.joined([s for s, _ in whole]), torch.cat([c for _, c in whole if c is not None])

    def _joined(self, pairs: Sequence[tuple[ParamView, SquareSum]]) -> dict[int, tuple[SquareSum, Tensor]]:
        """Sums over blocks that span these views, and their elements, by id of the view; added up device by device, in
        the order of the views: one copy from each, and one back."""
        by_device: dict[torch.device, list[tuple[ParamView, SquareSum]]] = {}
        for view, own in pairs:
            by_device.setdefault(own.values.device, []).append((view, own))
        views = [view for own in by_device.values() for view, _ in own]
        # Not on the CPU, if there is a device: copies from there are waited for.
        device, key = max(by_device, key=lambda place: place.type != "cpu"), tuple(map(id, views))
        if self._spans is None or self._spans.key != key:
            self._spans = _Spans.of(views, key, device)
        spans = self._spans
        joined = [SquareSum.joined([sums for _, sums in own]) for own in by_device.values()]
        parts, unit = [own.values.to(device, non_blocking=True) for own in joined], None
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        if any(isinstance(own.unit, Tensor) for own in joined):
            units = torch.cat(
                [(torch.ones_like(own.values) * own.unit).to(device, non_blocking=True) for own in joined]
            )
            unit = units.max()
            values = values * (units / unit) * (units / unit)  # one after the other: a square of these may be 0
        total = spans.gather(values)[spans.index]
        found, counts = {}, iter(spans.counts)
        sizes = [sum(len(view.joint) for view, _ in own) for own in by_device.values()]
        for (place, there), sums in zip(by_device.items(), total.split(sizes), strict=True):
            here = sums.to(place, non_blocking=place.type != "cpu")
            of = 1.0 if unit is None else unit.to(place, non_blocking=place.type != "cpu")
            for (view, _), part in zip(there, here.split([len(view.joint) for view, _ in there]), strict=True):
                found[id(view)] = SquareSum(part, of.expand_as(part) if isinstance(of, Tensor) else of), next(counts)
        return found

    def _step(self, batch: _Batch, squares: SquareSum, counts: Tensor) -> Sequence[Tensor]:
        """Step sizes per block of every view."""
        first, scalars = batch.views[0], self.scalars
        dtype, ok = first.dtype, scalars.ok_of(first)
        # As kernels round them: the same bits, whoever does it.
        of_rule = {name: rounded(value, dtype) for name, value in scalars.of_rule(first).items()}
        held = {name: [view.blocks[name] for view in batch.views] for name in first.blocks}
        old = {name: torch.cat(tensors) for name, tensors in held.items()}
        mean = squares.mean(counts, scalars.clip_of(first))
        new, denominator = first.rule.block_phase({name: t.to(dtype) for name, t in old.items()}, mean, of_rule)
        for name, tensors in held.items():
            value = new[name].to(old[name].dtype)
            value = value if ok is True else torch.where(ok, value, old[name])
            torch._foreach_copy_(tensors, list(value.split(batch.sizes)))
        rate = rounded(scalars.spread(batch.views, "rate", batch.of_segment), dtype)
        return (rate / denominator).to(dtype).split(batch.sizes)
