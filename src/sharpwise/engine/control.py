"""Sums over rows or matrices before anything moves, and what a control makes of them.

Stage A of a step with a control: the direction is worked out as the reference does, summed up, and forgotten. Nothing
is written. Where a mesh cuts rows or matrices, one collective completes all sums. Stage B is the step of every back
end, by rates and decays per row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.controls import Control, Sums
from sharpwise.controls.base import held_norms
from sharpwise.engine.backends.base import Found, Lines, row_step
from sharpwise.engine.backends.reference import aimed, cut_rows, pieces
from sharpwise.engine.layout import Layout, Layouts
from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import CUT_OF, HELD, ParamView
from sharpwise.rules.base import MatrixRule
from sharpwise.shards import local


class Bounds:
    """What a control makes of the views of an optimizer."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self._layouts = Layouts()

    def found(
        self,
        views: Sequence[ParamView],
        grads: Sequence[Tensor],
        scalars: StepScalars,
        found: Found,
        group: ReduceGroup,
    ) -> Found:
        """`found` with the lines of what moves element by element, and with what gives those of whole matrices, once
        their owners have worked.

        Args:
            group: the processes that hold parts.
        """

        def bound(some: Sequence[ParamView], updates: Sequence[Tensor]) -> dict[int, Lines]:
            return self._all_lines(some, updates, scalars, found, Bucket(group))

        pairs = [(v, g) for v, g in zip(views, grads, strict=True) if not isinstance(v.rule, MatrixRule)]
        return found._replace(lines=bound([v for v, _ in pairs], [g for _, g in pairs]), bound=bound)

    def _all_lines(
        self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found, bucket: Bucket
    ) -> dict[int, Lines]:
        """Rates and decays of the rows of matrices, by id of the view."""
        partials: list[tuple[ParamView, Partial]] = []
        for view, g in zip(views, grads, strict=True):
            if view.unit is not None:
                sums = _row_sums(view, g, scalars, found)
                sums = torch.stack([self._units(view).gather(own) for own in sums])
                cut = view.unit == "matrix" or _cuts_rows(view) or not _all_held(view)
                partials.append((view, bucket.add(sums, view.shard) if cut else Partial(sums, view.shard)))
        bucket.reduce()
        return {id(view): self._lines(view, partial.values, scalars, found) for view, partial in partials}

    def _units(self, view: ParamView) -> Layout:
        if "units" not in view.kept:
            assert view.unit is not None
            cuts, held = (CUT_OF[view.unit],) * len(view.segments), tuple(local(view.param).shape)
            view.kept["units"] = self._layouts.of(view.segments, cuts, not view.part, held, view.shard, view.device)
        found: Layout = view.kept["units"]
        return found

    def _lines(self, view: ParamView, sums: Tensor, scalars: StepScalars, found: Found) -> Lines:
        units = self._units(view)
        counts, of = units.counts, units.segment_of_block
        assert counts is not None
        of = torch.zeros_like(counts, dtype=torch.int64) if of is None else of
        own, s = view.origin, self._settings(view, scalars, of, counts)
        per_lr = torch.where(s["lr"] != 0, s["lr"].reciprocal(), 0.0)
        of_units = Sums(sums[0] * per_lr * per_lr, sums[1] * per_lr, sums[2], counts)
        if view.holds:
            held = own.own[HELD]
            s["held"] = held_norms(of_units, held.double())
            taken = scalars.ok_of(view)
            held.copy_(s["held"] if taken is True else torch.where(taken != 0, s["held"], held.double()))
        a, c = self.control.factors(of_units, s)
        decay = s["decay"]
        lines = (x if units.block_of_row is None else x[units.block_of_row] for x in (a, c * decay))
        a, decay = (x.view(view.row_shape) for x in lines)
        return Lines((a * _step(view, scalars, found)).to(view.dtype), decay.to(view.dtype))

    def _settings(self, view: ParamView, scalars: StepScalars, of: Tensor, like: Tensor) -> dict[str, Any]:
        """What `Control.factors` is told; of: the segment of each unit."""

        def per_unit(values: Sequence[Any]) -> Tensor:
            found = [torch.as_tensor(v, dtype=torch.float64, device=view.device) for v in values]
            return torch.stack(found)[of].expand_as(like)

        origin, rows, hyper = view.origin, scalars.rows(view), scalars.hyper(view)
        peak = view.group.get("initial_lr", view.group["reference_lr"])
        peak = float(origin.rule.settings({**view.group, "lr": float(peak)})["lr"])
        decays = [0.0 if row.weight_decay is None else row.weight_decay for row in rows]
        return {
            "lr": per_unit([row.lr for row in rows]),
            "multiplier": per_unit(scalars.multipliers(view)),
            "decay": per_unit([row.decay for row in rows]),
            "weight_decay": per_unit(decays),
            "held": torch.zeros_like(like),
            "over": view.unit,
            "peak": peak,
            "t": scalars.t(view),
            "momentum": origin.rule.momentum_of(hyper),
            "mean_square": origin.rule.mean_square(hyper),
            "turn": origin.rule.turn,
        }


def _step(view: ParamView, scalars: StepScalars, found: Found) -> Tensor | float:
    """Its step sizes before the control, per row or for all."""
    rows = row_step(view, scalars, found)
    step: Tensor | float = scalars.named(view)["step"] if rows is None else rows
    return step


def _row_sums(view: ParamView, g: Tensor, scalars: StepScalars, found: Found) -> Tensor:
    """Sums of d d, p d and p p over the rows held here, where -d is what would be added to p: fp64 [3, rows]."""
    step, s = _step(view, scalars, found), scalars.named(view)
    rule = found.rules.get(id(view), view.rule)
    p, g, stored = view.parameter(), view.rows_of(g), view.stored()
    parts = [torch.zeros(3, *p[:0].sum(view.dim).shape, dtype=torch.float64, device=p.device)]
    for j in pieces(view, rule):
        x, _, u, below = aimed(rule, s, p[j], g[j], [one.piece(j) for one in stored])
        d = cut_rows(step, j) * u
        d, x = (d if below is None else d / below).double(), x.double()
        parts.append(torch.stack([(a * b).sum(view.dim) for a, b in ((d, d), (x, d), (x, x))]))
    whole = torch.stack(parts).sum(0) if view.dim == 0 else torch.cat(parts, 1)
    return whole.view(3, -1)


def _all_held(view: ParamView) -> bool:
    """Whether all norms are held, or none is to be: until then every process hears of those of all others, so that all
    have the same state. Read from the state, no more once it holds."""
    if view.holds and not view.kept.get("all held"):
        view.kept["all held"] = bool((view.origin.own[HELD] > 0).all())
    return not view.holds or bool(view.kept["all held"])


def _cuts_rows(view: ParamView) -> bool:
    """Whether a mesh cuts its rows: a row has parts in several processes."""
    first = view.segments[0]
    lines = {first.dim, 0} if first.stacked else {first.dim}
    return any(view.shard.placements[d].dim not in lines for d in view.shard.cut)
