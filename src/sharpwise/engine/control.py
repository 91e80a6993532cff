"""Sums over rows or matrices before anything moves, and what a control makes of them.

Stage A of a step with a control: the direction is worked out as the reference does, summed up, and forgotten. Nothing
is written. Where a mesh cuts rows or matrices, one collective completes all sums. Stage B is the step of every back
end, by rates and decays per row.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.controls import Control, Sums
from sharpwise.controls.base import bounded
from sharpwise.engine.backends import Backend, Backends
from sharpwise.engine.backends.base import Found, Lines, Told, row_step
from sharpwise.engine.backends.reference import aimed, cut_rows, pieces
from sharpwise.engine.layout import Layout, Layouts
from sharpwise.engine.mesh import Bucket, Partial, ReduceGroup
from sharpwise.engine.norms import SquareSum, squares_of
from sharpwise.engine.program import SETTINGS
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.snr import GradientSNR
from sharpwise.engine.view import HELD, ParamView
from sharpwise.rules.base import MatrixRule, ThinRule


class Bounds:
    """What a control makes of the views of an optimizer.

    Args:
        backends: of the optimizer; kernels: whether they may be used.
    """

    def __init__(self, control: Control, backends: Backends, kernels: bool) -> None:
        self.control, self.scratch = control, backends.scratch
        self.backends = backends if kernels else None
        self._layouts, self.snr = Layouts(), GradientSNR(control)
        self._factors_of_snr: dict[int, Tensor] = {}
        self._settings_of: dict[Any, Tensor] = {}

    def found(
        self,
        views: Sequence[ParamView],
        grads: Sequence[Tensor],
        scalars: StepScalars,
        found: Found,
        squares: Sequence[SquareSum | None],
        group: ReduceGroup,
        unscale: Any = None,
    ) -> Found:
        """`found` with the lines of what moves element by element, or its rates per block, if they suffice; and with
        what gives the lines of whole matrices, once their owners have worked.

        Args:
            squares: of gradients per block, where there are blocks.
            group: the processes that hold parts.
            unscale: what undoes the scale of a loss in the gradients; None for 1.
        """
        self._factors_of_snr = self.snr.finish(scalars, unscale)
        self._settings_of.clear()

        def bound(some: Sequence[ParamView], updates: Sequence[Tensor]) -> Mapping[int, Lines]:
            return self._bound(some, updates, [None] * len(some), scalars, found, Bucket(group)).lines

        def rates_of(view: ParamView, x: Tensor, squares: Tensor | None, rates: Tensor) -> Tensor:
            return self._of_numerators(view, x, squares, scalars, rates)

        bounded = self._bound(views, grads, squares, scalars, found, Bucket(group))
        bounded = bounded._replace(bound=bound, rates_of=rates_of, snr_factors=self._snr_factor)
        return bounded._replace(told=lambda view: self._told(view, scalars))

    def _bound(
        self,
        views: Sequence[ParamView],
        grads: Sequence[Tensor],
        squares: Sequence[SquareSum | None],
        scalars: StepScalars,
        found: Found,
        bucket: Bucket,
    ) -> Found:
        """Rates and decays of the rows of matrices; other rates per block, if they suffice."""
        partials: list[tuple[ParamView, Partial]] = []
        asked: list[tuple[ParamView, Tensor]] = []
        for view, g, own in zip(views, grads, squares, strict=True):
            if view.unit is None or isinstance(view.rule, MatrixRule) or self._moves_bounded(view, g.dtype):
                continue
            rates = found.rates.get(id(view)) if self._by_block(view, found) else None
            if rates is not None and isinstance(view.rule, ThinRule) and not view.shard.cut:
                continue  # its back end asks for `rates_of`
            if rates is not None and view.rule.plain and own is not None:
                sums = self._of_plain(view, own.times(scalars.clip_of(view)), rates)
                partials.append((view, Partial(sums, view.shard)))  # of all processes already
                continue
            asked.append((view, g))
        for (view, _), rows in zip(asked, self._sums_of_rows(asked, scalars, found), strict=True):
            sums = torch.stack([self._units(view).gather(of) for of in rows])
            cut = view.unit == "matrix" or view.cuts_rows or not _all_held(view)
            partials.append((view, bucket.add(sums, view.shard) if cut else Partial(sums, view.shard)))
        bucket.reduce()
        lines: dict[int, Lines] = {}
        bounded = dict(found.rates)
        for view, partial in partials:
            if self._by_block(view, found):
                bounded[id(view)] = self._bounded(view, partial.values, scalars, bounded[id(view)])
            else:
                lines[id(view)] = self._lines(view, *self._factors(view, partial.values, scalars), scalars, found)
        return found._replace(rates=bounded, lines=lines)

    def _moves_bounded(self, view: ParamView, grad: torch.dtype) -> bool:
        """Whether its back end bounds it as it moves. While norms are not held, all processes have to hear of them."""
        own = self.backends
        backends: Iterable[Backend] = () if own is None else (*own.by_name.values(), own.thin[True])
        specs = [(own, view.kept[own.name, grad]) for own in backends if (own.name, grad) in view.kept]
        return any(own.bounds(spec) for own, spec in specs) and (not view.shard.cut or _all_held(view))

    def _told(self, view: ParamView, scalars: StepScalars) -> Told:
        """What the control is told of rows that move bounded."""
        key, units = scalars.key(view), self._units(view)
        if key not in self._settings_of:
            n = len(view.segments)
            one = torch.zeros(n, dtype=torch.float64, device="cpu")
            s = self._settings(view, scalars, torch.arange(n, device="cpu"), one)
            self._settings_of[key] = torch.stack([one + s[name] for name in SETTINGS], 1)
        held, snr = view.origin.own[HELD] if view.holds else None, self._snr_factor(view)
        return Told(self._settings_of[key], view.layout.segment_of_row, held, snr, units.block_of_row)

    def _sums_of_rows(
        self, asked: Sequence[tuple[ParamView, Tensor]], scalars: StepScalars, found: Found
    ) -> Iterator[Tensor]:
        """Sums over the rows of views with gradients: by the kernel of those that move by it, else by torch. See
        `_row_sums`; of a control that looks at no others the first alone."""
        views, grads = [view for view, _ in asked], [g for _, g in asked]
        given = {} if self.backends is None else self.backends.cpp.sums(views, grads, scalars, found)
        only = self.control.scales_only
        for view, g in asked:
            if id(view) in given:
                yield given[id(view)][: 1 if only else 3]
            else:
                yield (self._row_squares if only else _row_sums)(view, g, scalars, found)

    def _by_block(self, view: ParamView, found: Found) -> bool:
        """Whether other rates per block suffice."""
        return self.control.scales_only and view.unit == "matrix" and id(view) in found.rates

    def _of_numerators(
        self, view: ParamView, x: Tensor, squares: Tensor | None, scalars: StepScalars, rates: Tensor
    ) -> Tensor:
        """Rates per block of a view that no mesh cuts, from the numerators of its elements, which lie as it does, and
        the sums of their squares per row, if they are known."""
        rows = self._squares(view, x, squares)
        step = view.spread(rates).double().view(-1)
        return self._bounded(view, self._units(view).gather(rows * step * step)[None], scalars, rates)

    def _bounded(self, view: ParamView, sums: Tensor, scalars: StepScalars, rates: Tensor) -> Tensor:
        """Rates per block, times what a control that scales only makes of these sums over matrices."""
        a, _ = self._factors(view, sums, scalars)
        return (a[self._unit_of_block(view)] * rates).to(view.dtype)

    def _squares(self, view: ParamView, x: Tensor, known: Tensor | None) -> Tensor:
        return squares_of([x], [view.dim], self._kernel(view))[0] if known is None else known

    def _kernel(self, view: ParamView) -> Any:
        return self.backends.cpp.of_squares if self.backends is not None and view.device.type == "cpu" else None

    def _of_plain(self, view: ParamView, squares: SquareSum, rates: Tensor) -> Tensor:
        """Sums of d d over the matrices of a view whose numerator is the gradient: fp64 [1, units]."""
        counts = self._units(view).counts
        assert counts is not None
        rates = rates.double() * squares.unit
        return torch.zeros_like(counts).index_add_(0, self._unit_of_block(view), rates * rates * squares.values)[None]

    def _row_squares(self, view: ParamView, g: Tensor, scalars: StepScalars, found: Found) -> Tensor:
        """Sums of d d over the rows held here, where -d is what would be added to p: fp64 [1, rows]."""
        step, s, clip = _step(view, scalars, found), scalars.named(view), scalars.clip_of(view)
        rule, kernel = found.rules.get(id(view), view.rule), self._kernel(view)
        if isinstance(view.rule, ThinRule) and view.rule.has_blocks and view.numel:
            room = self.scratch.of(view, view.numel)[: view.numel].view(view.shape)
            parts = [self._squares(view, room, rule.fill(room, view.rows_of(g), clip))]
        else:
            p, g, stored = view.parameter(), view.rows_of(g), view.stored()
            parts = [torch.zeros(p[:0].sum(view.dim).numel(), dtype=torch.float64, device=p.device)]
            for j in pieces(view, rule, cached=True):
                _, _, u, below = aimed(rule, s, p[j], g[j], [one.piece(j) for one in stored])
                parts += squares_of([u if below is None else u / below], [view.dim], kernel)
        rows = torch.stack(parts).sum(0) if view.dim == 0 and len(view.shape) == 2 else torch.cat(parts)
        own = step.double().view(-1) if isinstance(step, Tensor) else step
        return (rows * own * own)[None]

    def _units(self, view: ParamView) -> Layout:
        assert view.unit is not None
        return view.by_unit(view.unit, self._layouts)

    def _unit_of_block(self, view: ParamView) -> Tensor:
        """The number of the matrix that each block is of."""
        if "unit of block" not in view.kept:
            pairs = zip(view.segments, view.cuts, strict=True)
            sizes = [s.blocks(cut) // s.copies for s, cut in pairs for _ in range(s.copies)]
            counts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
            view.kept["unit of block"] = (
                torch.arange(len(sizes), device="cpu").repeat_interleave(counts).to(view.device)
            )
        found: Tensor = view.kept["unit of block"]
        return found

    def _factors(self, view: ParamView, sums: Tensor, scalars: StepScalars) -> tuple[Tensor, Tensor]:
        """a, and c times the factor of decay, of its units."""
        units = self._units(view)
        counts, of = units.counts, units.segment_of_block
        assert counts is not None
        of = torch.zeros_like(counts, dtype=torch.int64) if of is None else of
        if self.control.scales_only:
            lr, decay = (_filled(scalars.spread([view], what, of), counts) for what in ("lr", "decay"))
            s: dict[str, Any] = {"lr": lr, "decay": decay}
        else:
            s = self._settings(view, scalars, of, counts)
        uu, pu, pp = sums if len(sums) == 3 else (sums[0],) * 3  # a control that scales only reads the first
        none = 0.0 if self.control.scales_only else torch.zeros_like(counts)  # nor would these read it
        s["held"] = view.origin.own[HELD].double() if view.holds else none
        a, decay, held = bounded(self.control, Sums(uu, pu, pp, counts), s, view.holds)
        if view.holds:
            taken = scalars.ok_of(view)
            view.origin.own[HELD].copy_(held if taken is True else torch.where(taken != 0, held, s["held"]))
        return a, decay

    def _lines(self, view: ParamView, a: Tensor, decay: Tensor, scalars: StepScalars, found: Found) -> Lines:
        of = self._units(view).block_of_row
        a, decay = ((x if of is None else x[of]).view(view.row_shape) for x in (a, decay))
        return Lines((a * _step(view, scalars, found)).to(view.dtype), decay.to(view.dtype))

    def _settings(self, view: ParamView, scalars: StepScalars, of: Tensor, like: Tensor) -> dict[str, Any]:
        """What `Control.factors` is told; of: the segment of each unit."""

        def per_unit(values: Sequence[Any]) -> Tensor:
            found = [torch.as_tensor(v, dtype=torch.float64, device=view.device) for v in values]
            return torch.stack(found)[of].expand_as(like)

        settings, snr = scalars.settings(view), self._snr_factor(view)
        by_segment = ("lr", "multiplier", "decay", "weight_decay")
        found = settings[0] | {name: per_unit([own[name] for own in settings]) for name in by_segment}
        return found | {"snr_factor": 1.0 if snr is None else snr, "over": view.unit}

    def _snr_factor(self, view: ParamView) -> Tensor | None:
        """Of each unit that of its matrix, fp64; None where none is measured."""
        view = view.origin
        factors = self._factors_of_snr.get(id(view))
        if factors is None:
            return None
        if "matrix of unit" not in view.kept:
            per = [view.units_of(s) // s.copies for s in view.segments for _ in range(s.copies)]
            counts = torch.tensor(per, dtype=torch.int64, device="cpu")
            numbers = torch.arange(len(per), device="cpu").repeat_interleave(counts)
            view.kept["matrix of unit"] = numbers.to(view.device)
        found: Tensor = factors[view.kept["matrix of unit"]]
        return found


def _filled(value: Any, like: Tensor) -> Tensor:
    """A number, or several, as a tensor like this; numbers of the host are not copied."""
    return value.to(like.dtype).expand_as(like) if isinstance(value, Tensor) else torch.full_like(like, value)


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
