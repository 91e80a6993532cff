"""Multipliers of all segments: fixed, following the learning rate, or ramping to measured targets."""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharpwise.block_lr import BlockLR, MeasuredLR
from sharpwise.blocks import Segment
from sharpwise.engine.counter import versions_of
from sharpwise.engine.measuring import measure
from sharpwise.engine.mesh import ReduceGroup
from sharpwise.engine.options import Options
from sharpwise.engine.view import ParamView
from sharpwise.shards import is_dtensor, local

logger = logging.getLogger(__name__)

Probe = Callable[[int], dict[str, list[float]]]
"""Steps taken -> sharpness by a probe of the model, by name of the parameter, per segment."""
Factors = list[tuple[float, ...]]
"""Multipliers of one parameter: per factor of the block_lr, per segment."""


def factor_maps(
    block_lr: BlockLR, known: Sequence[Segment], measured: Mapping[MeasuredLR, Sequence[float]] | None = None
) -> list[Mapping[str, tuple[float, ...]]]:
    """The multipliers of every factor, per parameter name."""
    return [multiplier_map(known, factor.multipliers(known, measured or {})) for factor in block_lr.parts]


def product(factors: Sequence[Sequence[float]], segments: int) -> tuple[float, ...]:
    """One multiplier per segment."""
    return tuple(math.prod(own) for own in zip(*factors, strict=True)) if factors else (1.0,) * segments


class Multipliers:
    """Multipliers of views whose state is allocated.

    State of a parameter whose multipliers follow measurements: `multiplier_from` and `multiplier_to`, both ends of the
    ramp of every factor of the block_lr [segments, factors]; `lr_multiplier`, the product of the ends [segments];
    `block_lr_measured` [segments, sources], 0 where there is nothing. Groups hold `block_lr_step`, the steps taken (on
    a device: asked for, skipped or not), and `multiplier_ramp`, first step and length of the ramp of every factor.

    Args:
        groups: all of the optimizer.
        known: all segments of the model, also of what is not here.
        warned: warnings that were given once and are not repeated.
    """

    def __init__(
        self,
        views: Sequence[ParamView],
        groups: Sequence[dict[str, Any]],
        known: Sequence[Segment],
        state: Any,
        options: Options,
        probe: Probe,
        warned: set[str],
    ) -> None:
        self.views, self.known, self.state, self.options = list(views), known, state, options
        self.probe, self.warned = probe, warned
        self.block_lr = options.block_lr
        self.sources: tuple[MeasuredLR, ...] = () if self.block_lr is None else self.block_lr.sources
        self.groups = groups
        self._from: dict[str, Factors] = {}
        self._to: dict[str, Factors] = {}
        self._measured: dict[MeasuredLR, dict[str, list[float]]] = {source: {} for source in self.sources}
        self._applied: list[float] = []
        if any(source.measures == "probe" for source in self.sources) and any(is_dtensor(e.param) for e in views):
            raise ValueError(
                f"block_lr {self.block_lr} probes the model, and {views[0].name} is sharded; source='second_moment' "
                f"works on any mesh"
            )
        kept: tuple[str, ...] = () if self.block_lr is None else ("lr_multiplier",)
        if self.sources:
            kept = "multiplier_from", "multiplier_to", "block_lr_measured"
        self._kept = [local(state[v.param][v.state_key(key)]) for v in self.views for key in kept]
        self._versions = versions_of(self._kept)
        if self.sources:
            self._read()
            self._apply(self.taken)

    def overwritten(self) -> bool:
        """Whether their state was written in place since it was read: by a rollback, a distributed checkpoint."""
        return versions_of(self._kept) != self._versions

    @property
    def taken(self) -> int:
        """Steps taken so far, as block_lrs count them."""
        return max((int(group["block_lr_step"]) for group in self.groups), default=0)

    def now(self, view: ParamView) -> tuple[float, ...]:
        """Multipliers of a view's segments at the current learning rate."""
        block_lr = self.block_lr
        if block_lr is None or not block_lr.follows_lr:
            return view.multipliers
        lr, peak = float(view.group["lr"]), float(view.group["peak_lr"])
        return tuple(block_lr.effective(m, lr, max(peak, lr)) for m in view.multipliers)

    def advance(self, active: Sequence[ParamView], ok: Any, reduce_group: ReduceGroup) -> bool:
        """Advance to the step that is being taken, measuring what is due; returns whether any may have changed.

        Args:
            active: views that have gradients.
            ok: whether the step is taken: True, or a tensor on a device, which is read where gradients are measured.
            reduce_group: the processes that hold parts.
        """
        taken = self.taken if self.sources else 0
        waiting = {source: self._waiting(source, active) for source in self.sources if source.waits}
        if any(waiting.values()) and not bool(ok):
            waiting = {}
        due = [s for s in self.sources if waiting.get(s) or s.due(taken, self.options.total_steps)]
        found = [self._measure(source, waiting.get(source, self.views), taken, reduce_group) for source in due]
        # A measurement may fail; nothing is written before the last is there.
        for source, values in zip(due, found, strict=True):
            self._measured[source] |= values
            self._warn(source)
        if self.block_lr is not None and self.block_lr.follows_lr:
            for group in {id(e.group): e.group for e in active}.values():
                group["peak_lr"] = max(float(group["peak_lr"]), float(group["lr"]))
        if not self.sources:
            return False
        if due:
            self._retarget(due, taken)
        for group in self.groups:
            group["block_lr_step"] = taken + 1
        return self._apply(taken)

    def _waiting(self, source: MeasuredLR, active: Sequence[ParamView]) -> list[ParamView]:
        """Views with gradients, some elements of which have no value yet."""
        known = self._measured[source]
        return [
            view
            for view in active
            if any(math.isnan(v) and s.numel for v, s in zip(known[view.full_name], view.segments, strict=True))
        ]

    # -- measuring -------------------------------------------------------------------------------------------------

    def _measure(
        self, source: MeasuredLR, views: Sequence[ParamView], taken: int, reduce_group: ReduceGroup
    ) -> dict[str, list[float]]:
        """The values of a source, updated by a measurement now, by name."""

        def probe() -> list[list[float]]:
            found = self.probe(taken)
            none = (math.nan,) * len(self.known)
            return [list(v.of_segments(found.get(v.name, none))) for v in views]

        known = self._measured[source]
        measured = measure(source, views, reduce_group, probe)
        return {
            view.full_name: [source.updated(*pair) for pair in zip(known[view.full_name], values, strict=True)]
            for view, values in zip(views, measured, strict=True)
        }

    def _retarget(self, due: Sequence[MeasuredLR], taken: int) -> None:
        """Ramp from the current factors to the measured targets."""
        assert self.block_lr is not None
        progress = self._progress(taken)
        found = factor_maps(self.block_lr, self._known_now(), self._by_segment())
        ramps = list(self._ramps)
        for f, (factor, by_name) in enumerate(zip(self.block_lr.parts, found, strict=True)):
            measured = [source for source in factor.sources if source in due]
            if not measured or all(v.of_segments(by_name[v.name]) == self._to[v.full_name][f] for v in self.views):
                continue
            for view in self.views:
                start, target = self._from[view.full_name], self._to[view.full_name]
                own = view.of_segments(by_name[view.name])
                start[f], target[f] = _interpolated(start[f], target[f], progress[f]), own
            ramps[2 * f : 2 * f + 2] = taken, max(source.smooth for source in measured)
        for group in self.groups:
            group["multiplier_ramp"] = tuple(ramps)
        self._applied = []
        self._write()

    def _known_now(self) -> list[Segment]:
        """All segments of the model, frozen or not as they are now, and not as when the optimizer was built."""
        frozen = {view.name: not view.param.requires_grad for view in self.views}
        return [replace(s, frozen=frozen.get(s.name, s.frozen)) for s in self.known]

    def _by_segment(self) -> dict[MeasuredLR, list[float]]:
        """Measured values, in the order of all segments of the model."""
        result = {}
        for source, values in self._measured.items():
            pairs = [(v.name, zip(v.numbers, values[v.full_name], strict=True)) for v in self.views]
            found = {(name, i): value for name, own in pairs for i, value in own}
            numbers = {name: itertools.count() for name in dict.fromkeys(s.name for s in self.known)}
            result[source] = [found.get((s.name, next(numbers[s.name])), math.nan) for s in self.known]
        return result

    def _warn(self, source: MeasuredLR) -> None:
        """Pass on, once, what the source has to remark of its values."""
        segments = [segment for view in self.views for segment in view.segments]
        remarks = source.remarks(segments, [v for e in self.views for v in self._measured[source][e.full_name]])
        if remarks is None or str(source) in self.warned:
            return
        self.warned.add(str(source))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            logger.warning("block_lr %s: %s", source, remarks)

    # -- state -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for view in self.views:
            own, name = self.state[view.param], view.full_name
            self._from[name] = [tuple(column) for column in own[view.state_key("multiplier_from")].T.tolist()]
            self._to[name] = [tuple(column) for column in own[view.state_key("multiplier_to")].T.tolist()]
            values = own[view.state_key("block_lr_measured")]
            for i, source in enumerate(self.sources):
                self._measured[source][name] = [v or math.nan for v in values[:, i].tolist()]

    def _write(self) -> None:
        kept: list[Tensor] = []
        flat: list[float] = []
        for view in self.views:
            own, name = self.state[view.param], view.full_name
            measured = [self._measured[source][name] for source in self.sources]
            for key, columns in (
                ("multiplier_from", self._from[name]),
                ("multiplier_to", self._to[name]),
                ("block_lr_measured", measured),
                ("lr_multiplier", [product(self._to[name], len(view.segments))]),
            ):
                kept.append(local(own[view.state_key(key)]))
                flat += [value for row in zip(*columns, strict=True) for value in row]
        if kept:
            values = torch.tensor(flat, dtype=torch.float64, device="cpu").nan_to_num(nan=0.0)
            for device in dict.fromkeys(tensor.device for tensor in kept):
                pieces = values.to(device).split([tensor.numel() for tensor in kept])
                own = [(t, piece.view(t.shape)) for t, piece in zip(kept, pieces, strict=True) if t.device == device]
                torch._foreach_copy_([t for t, _ in own], [piece for _, piece in own])
            self._versions = versions_of(self._kept)

    @property
    def _ramps(self) -> tuple[int, ...]:
        """First step and length of the ramp of every factor, one after the other."""
        assert self.block_lr is not None
        none = (0, 0) * len(self.block_lr.parts)
        return max((tuple(group["multiplier_ramp"]) for group in self.groups), default=none)

    def _progress(self, taken: int) -> list[float]:
        """The fraction of its ramp that each factor has covered, in (0, 1]."""
        ramps = zip(self._ramps[::2], self._ramps[1::2], strict=True)
        return [1.0 if length <= 1 else min((taken - begin + 1) / length, 1.0) for begin, length in ramps]

    def _apply(self, taken: int) -> bool:
        """Set the multipliers of all views for the step after `taken` steps; returns whether any changed."""
        progress, changed = self._progress(taken), False
        if progress == self._applied:
            return False
        self._applied = progress
        for view in self.views:
            factors = zip(self._from[view.full_name], self._to[view.full_name], progress, strict=True)
            now = product([_interpolated(*factor) for factor in factors], len(view.segments))
            changed = changed or now != view.multipliers
            view.multipliers = now
        return changed


def _interpolated(start: Sequence[float], target: Sequence[float], progress: float) -> tuple[float, ...]:
    if progress >= 1.0:
        return tuple(target)
    return tuple(a + (b - a) * progress for a, b in zip(start, target, strict=True))


def multiplier_map(segments: Sequence[Segment], values: Sequence[float]) -> Mapping[str, tuple[float, ...]]:
    """Multipliers per parameter name, in segment order, from one per segment of the model."""
    result: dict[str, tuple[float, ...]] = {}
    for segment, value in zip(segments, values, strict=True):
        result[segment.name] = (*result.get(segment.name, ()), value)
    return result
