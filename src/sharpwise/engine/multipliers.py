"""The multiplier of every segment as it is now: fixed, following the learning rate, or following a measurement."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sharpwise.block_lr import HeavyTailLR, MeasuredLR
from sharpwise.blocks import Segment
from sharpwise.engine.measuring import measure
from sharpwise.engine.mesh import Team, local
from sharpwise.engine.options import Options
from sharpwise.engine.plan import Entry, multiplier_map

logger = logging.getLogger(__name__)

Probe = Callable[[int], dict[str, list[float]]]
"""Steps taken -> what a probe of the model found, by name of the parameter, per segment."""


class Multipliers:
    """Multipliers of entries whose state is allocated.

    Where they follow measurements, state holds per parameter `lr_multiplier`, where they are going, `lr_before`, where
    from [segments], and `lr_measured` [segments, sources], 0 where there is nothing. Groups hold `lr_step`, the steps
    taken, and `lr_switch`, since when they are going there and in how many steps.

    Args:
        known: all segments of the model, also of what is not here.
    """

    def __init__(
        self, entries: Sequence[Entry], known: Sequence[Segment], state: Any, options: Options, probe: Probe
    ) -> None:
        self.entries, self.known, self.state, self.options, self.probe = list(entries), known, state, options, probe
        self.block_lr = options.block_lr
        self.sources: tuple[MeasuredLR, ...] = () if self.block_lr is None else self.block_lr.sources
        self.groups = list({id(e.group): e.group for e in entries}.values())
        self._listed = False
        self._before: dict[str, tuple[float, ...]] = {}
        self._after: dict[str, tuple[float, ...]] = {}
        self._measured: dict[MeasuredLR, dict[str, list[float]]] = {source: {} for source in self.sources}
        if self.sources:
            self._read()
            self._go(self.taken)

    @property
    def taken(self) -> int:
        """Steps taken so far, as block_lrs count them."""
        return max((int(group["lr_step"]) for group in self.groups), default=0)

    def now(self, entry: Entry) -> tuple[float, ...]:
        """Multipliers of an entry's segments at the current learning rate."""
        block_lr = self.block_lr
        if block_lr is None or not block_lr.follows_lr:
            return entry.multipliers
        lr, peak = float(entry.group["lr"]), float(entry.group["peak_lr"])
        return tuple(block_lr.effective(m, lr, max(peak, lr)) for m in entry.multipliers)

    def advance(self, active: Sequence[Entry], ok: Any, team: Callable[[], Team]) -> bool:
        """Bring them to the step that is being taken, measuring what is due; returns whether any may have changed.

        Args:
            active: entries that have gradients.
            ok: whether the step is taken: True, or a tensor on a device, which is read where gradients are measured.
            team: the processes that hold parts; asked for only where something is measured.
        """
        if self.block_lr is not None and self.block_lr.follows_lr:
            for group in {id(e.group): e.group for e in active}.values():
                group["peak_lr"] = max(float(group["peak_lr"]), float(group["lr"]))
        if not self.sources:
            return False
        taken = self.taken
        changed = self._go(taken)  # as in a run that is resumed here
        due = [s for s in self.sources if self._is_due(s, taken, active)]
        if any(source.waits for source in due) and not bool(ok):
            due = [source for source in due if not source.waits]
        for source in due:
            self._measure(source, taken, team())
        for group in self.groups:
            group["lr_step"] = taken + 1
        return self._go(taken) or changed

    def _is_due(self, source: MeasuredLR, taken: int, active: Sequence[Entry]) -> bool:
        if not source.waits:
            return source.due(taken, self.options.total_steps)
        known = self._measured[source]
        return any(math.isnan(value) for entry in active for value in known[entry.name])

    # -- measuring -------------------------------------------------------------------------------------------------

    def _measure(self, source: MeasuredLR, taken: int, team: Team) -> None:
        """Measure, and set out for the multipliers that follow."""

        def probe() -> list[list[float]]:
            found = self.probe(taken)
            return [found.get(e.name, [math.nan] * len(e.segments)) for e in self.entries]

        block_lr = self.block_lr
        assert block_lr is not None
        found = measure(source, self.entries, self.state, team, probe)
        own = self._measured[source]
        for entry, values in zip(self.entries, found, strict=True):
            pairs = zip(own[entry.name], values, strict=True)
            own[entry.name] = [source.updated(before, now) for before, now in pairs]
        self._list_missing(source)
        targets = multiplier_map(self.known, block_lr.multipliers(self.known, self._by_segment()))
        before = {entry.name: entry.multipliers for entry in self.entries}
        changed = any(targets[e.name] != self._after[e.name] for e in self.entries)
        if changed:
            self._before, self._after = before, {e.name: targets[e.name] for e in self.entries}
            for group in self.groups:
                group["lr_switch"] = (taken, source.smooth)
        self._write()

    def _by_segment(self) -> dict[MeasuredLR, list[float]]:
        """What was measured, in the order of all segments of the model."""
        result = {}
        for source, by_name in self._measured.items():
            rest = {name: iter(values) for name, values in by_name.items()}
            result[source] = [next(rest[s.name]) if s.name in rest else math.nan for s in self.known]
        return result

    def _list_missing(self, source: MeasuredLR) -> None:
        """Say once which matrices have no spectrum to go by."""
        if self._listed or source.measures != "matrix":
            return
        self._listed = True
        own = self._measured[source]
        none = [e.name for e in self.entries for s, v in zip(e.segments, own[e.name], strict=True)
                if math.isnan(v) and isinstance(source, HeavyTailLR) and source.reads(s)]  # fmt: skip
        if none:
            names = ", ".join(dict.fromkeys(none))
            logger.warning("block_lr %s: multiplier 1 for what has too few eigenvalues, or no tail: %s", source, names)

    # -- state -----------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for entry in self.entries:
            own = self.state[entry.param]
            self._before[entry.name] = tuple(own["lr_before"].tolist())
            self._after[entry.name] = tuple(own["lr_multiplier"].tolist())
            for i, source in enumerate(self.sources):
                self._measured[source][entry.name] = [v or math.nan for v in own["lr_measured"][:, i].tolist()]

    def _write(self) -> None:
        for entry in self.entries:
            own = self.state[entry.param]
            for key, value in (
                ("lr_before", self._before[entry.name]),
                ("lr_multiplier", self._after[entry.name]),
                ("lr_measured", list(zip(*(self._measured[s][entry.name] for s in self.sources), strict=True))),
            ):
                kept = local(own[key])
                kept.copy_(torch.tensor(value, dtype=kept.dtype).nan_to_num(nan=0.0).view(kept.shape))

    def _go(self, taken: int) -> bool:
        """Set the multipliers of all entries for the step after so many; whether they differ from what they were."""
        begin, length = max((tuple(group["lr_switch"]) for group in self.groups), default=(0, 0))
        share = 1.0 if length <= 1 else min((taken - begin + 1) / length, 1.0)
        changed = False
        for entry in self.entries:
            before, after = self._before[entry.name], self._after[entry.name]
            now = after if share >= 1.0 else tuple(a + (b - a) * share for a, b in zip(before, after, strict=True))
            changed = changed or now != entry.multipliers
            entry.multipliers = now
        return changed
