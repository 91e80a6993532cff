"""Multipliers of all segments: fixed, following the learning rate, or ramping to measured targets."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharpwise.block_lr import BlockLR, MeasuredLR
from sharpwise.blocks import Segment
from sharpwise.engine.measuring import measure
from sharpwise.engine.mesh import ReduceGroup
from sharpwise.engine.options import Options
from sharpwise.engine.plan import Entry, multiplier_map
from sharpwise.engine.scalars import versions_of
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
    """Multipliers of entries whose state is allocated.

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
        entries: Sequence[Entry],
        groups: Sequence[dict[str, Any]],
        known: Sequence[Segment],
        state: Any,
        options: Options,
        probe: Probe,
        warned: set[str],
    ) -> None:
        self.entries, self.known, self.state, self.options = list(entries), known, state, options
        self.probe, self.warned = probe, warned
        self.block_lr = options.block_lr
        self.sources: tuple[MeasuredLR, ...] = () if self.block_lr is None else self.block_lr.sources
        self.groups = groups
        self._from: dict[str, Factors] = {}
        self._to: dict[str, Factors] = {}
        self._measured: dict[MeasuredLR, dict[str, list[float]]] = {source: {} for source in self.sources}
        self._applied: list[float] = []
        if any(source.measures == "probe" for source in self.sources) and any(is_dtensor(e.param) for e in entries):
            raise ValueError(
                f"block_lr {self.block_lr} probes the model, and {entries[0].name} is sharded; source='second_moment' "
                f"works on any mesh"
            )
        kept = (
            ("multiplier_from", "multiplier_to", "block_lr_measured")
            if self.sources
            else ("lr_multiplier",)
            if self.block_lr
            else ()
        )
        self._kept = [local(state[e.param][key]) for e in self.entries for key in kept]
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

    def now(self, entry: Entry) -> tuple[float, ...]:
        """Multipliers of an entry's segments at the current learning rate."""
        block_lr = self.block_lr
        if block_lr is None or not block_lr.follows_lr:
            return entry.multipliers
        lr, peak = float(entry.group["lr"]), float(entry.group["peak_lr"])
        return tuple(block_lr.effective(m, lr, max(peak, lr)) for m in entry.multipliers)

    def advance(self, active: Sequence[Entry], ok: Any, reduce_group: ReduceGroup) -> bool:
        """Advance to the step that is being taken, measuring what is due; returns whether any may have changed.

        Args:
            active: entries that have gradients.
            ok: whether the step is taken: True, or a tensor on a device, which is read where gradients are measured.
            reduce_group: the processes that hold parts.
        """
        taken = self.taken if self.sources else 0
        waiting = {source: self._waiting(source, active) for source in self.sources if source.waits}
        if any(waiting.values()) and not bool(ok):
            waiting = {}
        due = [s for s in self.sources if waiting.get(s) or s.due(taken, self.options.total_steps)]
        found = [self._measure(source, waiting.get(source, self.entries), taken, reduce_group) for source in due]
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

    def _waiting(self, source: MeasuredLR, active: Sequence[Entry]) -> list[Entry]:
        """Entries with gradients, some elements of which have no value yet."""
        known = self._measured[source]
        return [
            entry
            for entry in active
            if any(math.isnan(v) and s.numel for v, s in zip(known[entry.name], entry.segments, strict=True))
        ]

    # -- measuring -------------------------------------------------------------------------------------------------

    def _measure(
        self, source: MeasuredLR, entries: Sequence[Entry], taken: int, reduce_group: ReduceGroup
    ) -> dict[str, list[float]]:
        """The values of a source, updated by a measurement now, by name."""

        def probe() -> list[list[float]]:
            found = self.probe(taken)
            return [found.get(e.name, [math.nan] * len(e.segments)) for e in entries]

        exact = self.options.compile is False
        measured = measure(source, entries, self.state, reduce_group, probe, exact)
        return {
            entry.name: [source.updated(*pair) for pair in zip(self._measured[source][entry.name], values, strict=True)]
            for entry, values in zip(entries, measured, strict=True)
        }

    def _retarget(self, due: Sequence[MeasuredLR], taken: int) -> None:
        """Ramp from the current factors to the measured targets."""
        assert self.block_lr is not None
        progress = self._progress(taken)
        found = factor_maps(self.block_lr, self._known_now(), self._by_segment())
        ramps = list(self._ramps)
        for f, (factor, by_name) in enumerate(zip(self.block_lr.parts, found, strict=True)):
            measured = [source for source in factor.sources if source in due]
            if not measured or all(by_name[e.name] == self._to[e.name][f] for e in self.entries):
                continue
            for entry in self.entries:
                start, target = self._from[entry.name], self._to[entry.name]
                start[f], target[f] = _interpolated(start[f], target[f], progress[f]), by_name[entry.name]
            ramps[2 * f : 2 * f + 2] = taken, max(source.smooth for source in measured)
        for group in self.groups:
            group["multiplier_ramp"] = tuple(ramps)
        self._applied = []
        self._write()

    def _known_now(self) -> list[Segment]:
        """All segments of the model, frozen or not as they are now, and not as when the optimizer was built."""
        frozen = {entry.name: not entry.param.requires_grad for entry in self.entries}
        return [replace(s, frozen=frozen.get(s.name, s.frozen)) for s in self.known]

    def _by_segment(self) -> dict[MeasuredLR, list[float]]:
        """Measured values, in the order of all segments of the model."""
        result = {}
        for source, by_name in self._measured.items():
            rest = {name: iter(values) for name, values in by_name.items()}
            result[source] = [next(rest[s.name]) if s.name in rest else math.nan for s in self.known]
        return result

    def _warn(self, source: MeasuredLR) -> None:
        """Pass on, once, what the source has to remark of its values."""
        segments = [segment for entry in self.entries for segment in entry.segments]
        remarks = source.remarks(segments, [v for e in self.entries for v in self._measured[source][e.name]])
        if remarks is None or str(source) in self.warned:
            return
        self.warned.add(str(source))
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            logger.warning("block_lr %s: %s", source, remarks)

    # -- state -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for entry in self.entries:
            own = self.state[entry.param]
            self._from[entry.name] = [tuple(column) for column in own["multiplier_from"].T.tolist()]
            self._to[entry.name] = [tuple(column) for column in own["multiplier_to"].T.tolist()]
            for i, source in enumerate(self.sources):
                self._measured[source][entry.name] = [v or math.nan for v in own["block_lr_measured"][:, i].tolist()]

    def _write(self) -> None:
        kept: list[Tensor] = []
        flat: list[float] = []
        for entry in self.entries:
            own, name = self.state[entry.param], entry.name
            measured = [self._measured[source][name] for source in self.sources]
            for key, columns in (
                ("multiplier_from", self._from[name]),
                ("multiplier_to", self._to[name]),
                ("block_lr_measured", measured),
                ("lr_multiplier", [product(self._to[name], len(entry.segments))]),
            ):
                kept.append(local(own[key]))
                flat += [value for row in zip(*columns, strict=True) for value in row]
        if kept:
            values = torch.tensor(flat, dtype=torch.float64, device="cpu").nan_to_num(nan=0.0).to(kept[0].device)
            pieces = values.split([tensor.numel() for tensor in kept])
            torch._foreach_copy_(kept, [piece.view(t.shape) for piece, t in zip(pieces, kept, strict=True)])
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
        """Set the multipliers of all entries for the step after `taken` steps; returns whether any changed."""
        progress, changed = self._progress(taken), False
        if progress == self._applied:
            return False
        self._applied = progress
        for entry in self.entries:
            factors = zip(self._from[entry.name], self._to[entry.name], progress, strict=True)
            now = product([_interpolated(*factor) for factor in factors], len(entry.segments))
            changed = changed or now != entry.multipliers
            entry.multipliers = now
        return changed


def _interpolated(start: Sequence[float], target: Sequence[float], progress: float) -> tuple[float, ...]:
    if progress >= 1.0:
        return tuple(target)
    return tuple(a + (b - a) * progress for a, b in zip(start, target, strict=True))
