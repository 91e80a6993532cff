"""The block phase: new block state, and the step sizes of blocks, for all views of a class in a handful of calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


class BlockPhase:
    """Moves block state."""

    def __init__(self, scalars: StepScalars) -> None:
        self.scalars = scalars
        self._batches: dict[tuple[int, ...], _Batch] = {}

    def run(self, views: Sequence[ParamView], sums: Sequence[SquareSum | None]) -> dict[int, Tensor]:
        """Write the new block state of views whose sums are given; their step sizes per block, by id of the view."""
        together: dict[Any, list[tuple[ParamView, SquareSum]]] = {}
        for view, squares in zip(views, sums, strict=True):
            if squares is not None:
                kind = self.scalars.class_key(view), view.dtype, view.own["step"].dtype
                together.setdefault(kind, []).append((view, squares))
        rates: dict[int, Tensor] = {}
        for pairs in together.values():
            own = [view for view, _ in pairs]
            found = self._step(self._batch(own), SquareSum.joined([squares for _, squares in pairs]))
            for view, rate in zip(own, found, strict=True):
                rates[id(view)] = rate
        return rates

    def _batch(self, views: list[ParamView]) -> _Batch:
        key = tuple(map(id, views))
        if key not in self._batches:
            self._batches = {**dict(list(self._batches.items())[-15:]), key: _Batch.of(views)}
        return self._batches[key]

    def _step(self, batch: _Batch, squares: SquareSum) -> Sequence[Tensor]:
        """Step sizes per block of every view."""
        first, scalars = batch.views[0], self.scalars
        dtype, ok = first.dtype, scalars.ok_of(first)
        # As kernels round them: the same bits, whoever does it.
        of_rule = {name: rounded(value, dtype) for name, value in scalars.of_rule(first).items()}
        held = {name: [view.blocks[name] for view in batch.views] for name in first.blocks}
        old = {name: torch.cat(tensors) for name, tensors in held.items()}
        mean = squares.mean(batch.counts, scalars.clip_of(first))
        new, denominator = first.rule.block_phase({name: t.to(dtype) for name, t in old.items()}, mean, of_rule)
        for name, tensors in held.items():
            value = new[name].to(old[name].dtype)
            value = value if ok is True else torch.where(ok, value, old[name])
            torch._foreach_copy_(tensors, list(value.split(batch.sizes)))
        rate = rounded(scalars.spread(batch.views, "rate", batch.of_segment), dtype)
        return (rate / denominator).to(dtype).split(batch.sizes)
