"""The numbers of one step: hyperparameters as they are now, bias corrections, step sizes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.items import Item, into_buffer
from sharpwise.engine.plan import Entry, live
from sharpwise.shards import is_dtensor


class Rates(NamedTuple):
    """Learning rate, weight decay (None: off) and the scalars of the rule for one entry at one step."""

    lr: Any
    weight_decay: Any
    of_rule: dict[str, Any]


@dataclass
class Numbers:
    """What the items of one group, rule, multipliers and step count share in a step.

    Attributes:
        scalars: of `kernels.update`, by name.
        rate: lr / bias correction, without multiplier; lr_decay: lr * weight decay where that varies by row, else None.
        multipliers, decays: per segment, factors on the step and on the decay.
        uniform: whether all multipliers are the same.
    """

    scalars: dict[str, Any]
    rate: Any
    lr_decay: Any
    multipliers: tuple[float, ...]
    decays: tuple[float, ...]
    uniform: bool
    packs: dict[Any, Tensor] = field(default_factory=dict)
    rows: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def decays_by_row(self) -> bool:
        """Whether the decay varies by row."""
        return self.lr_decay is not None

    def by_row(self, what: Literal["step", "multiplier", "decay"], item: Item) -> Tensor:
        """Step sizes, multipliers or factors of decay of the rows of an item; once for all that are laid out alike."""
        layout = item.layout
        key = what, id(layout.segment_of_row), layout.row_shape, layout.dtype
        if key not in self.rows:
            values = item.spread_segments(self.decays if what == "decay" else self.multipliers)
            if what == "decay":
                values = 1 - values * self.lr_decay
            elif what == "step":
                values = values * self.rate
            self.rows[key] = values.to(layout.dtype)
        return self.rows[key]

    def named(self, names: Sequence[str]) -> Tensor:
        """`scalars` by these names, and `multiplier`; 1 for a decay or clipping that is off. fp32, on the CPU."""
        key = tuple(names)
        if key not in self.packs:
            values = {"decay": 1.0, "clip": 1.0, "multiplier": self.multipliers[0] if self.uniform else 1.0}
            values |= self.scalars
            self.packs[key] = torch.tensor([values[name] for name in names], dtype=torch.float32, device="cpu")
        return self.packs[key]

    def packed(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The scalars in one tensor, in their order."""
        key = dtype, device
        if key not in self.packs:
            self.packs[key] = _pack(list(self.scalars.values()), dtype, device)
        return self.packs[key]


class Clock:
    """Step counts of all entries. On the CPU they are read as numbers, on a device they stay there.

    What has been worked out for a step, once per group, rule and count, is kept until the next.
    """

    def __init__(self, entries: Sequence[Entry], state: Any) -> None:
        self._step = {id(e): state[e.param]["step"] for e in entries}
        self.on_host = all(t.device.type == "cpu" for t in self._step.values())
        self._rates: dict[Any, Rates] = {}
        # Entries of one kind have the same scalars as long as they have taken the same number of steps.
        kinds: dict[Any, int] = {}
        self._kind = {id(e): kinds.setdefault((id(e.group), e.rule, any(e.decays)), len(kinds)) for e in entries}
        self._steps = list(self._step.values())
        alike = len({(type(t), t.dtype, t.device) for t in self._steps}) == 1 and not is_dtensor(self._steps[0])
        self._buffer = into_buffer(self._steps) if alike else None
        # On a device: gradients had, skipped or not.
        self._counts: dict[int, int] = {}
        self._versions: list[int] = []

    def read(self) -> None:
        """Read the counts again where somebody may have written them in place: a rollback, a distributed checkpoint."""
        if not self.on_host:
            versions = versions_of(self._steps)
            if versions == self._versions:  # nobody but us, and reading would wait for the device
                return
            self._versions = versions
        values = [float(step) for step in self._steps] if self._buffer is None else self._buffer.tolist()
        self._counts = dict(zip(self._step, map(int, values), strict=True))

    @property
    def begun(self) -> bool:
        """Whether any step has been taken."""
        return any(self._counts.values())

    def begin(self, active: Sequence[Entry]) -> None:
        """Work out the scalars of the step to come, before it is counted: what is wrong with them shows here."""
        self._rates.clear()
        if not self.on_host:
            return  # they follow the counts on the device
        counts, kinds = self._counts, self._kind
        for entry in active:
            counts[id(entry)] += 1
        for entry in {(kinds[id(e)], counts[id(e)]): e for e in active}.values():
            self.rates(entry)

    def advance(self, active: Sequence[Entry], ok: Any) -> None:
        """Count one step more (ok: True, or a device tensor that says whether it is taken)."""
        taken = 1.0 if ok is True else ok.to(torch.float32)
        if self._buffer is not None and len(active) == len(self._step):
            self._buffer += taken
        else:
            steps = [self._step[id(e)] for e in active]
            torch._foreach_add_(steps, [taken] * len(steps))
            self._versions = versions_of(self._steps)
        for entry in active if not self.on_host else ():
            self._counts[id(entry)] += 1

    def t(self, entry: Entry) -> Any:
        """Steps taken with this entry: an int, or a 0-d tensor on its device."""
        return self._counts[id(entry)] if self.on_host else self._step[id(entry)]

    def together(self, entries: Sequence[Entry]) -> bool:
        """Whether all have taken the same number of steps."""
        return len({self._counts[id(e)] for e in entries}) <= 1

    def hyper(self, entry: Entry) -> dict[str, Any]:
        """The hyperparameters of the rule as they are now."""
        return {k: live(v) for k, v in entry.group.items() if k in entry.rule.defaults}

    def rates(self, entry: Entry) -> Rates:
        """The numbers of this step."""
        key = (self._kind[id(entry)], self.t(entry)) if self.on_host else id(entry)
        if key not in self._rates:
            group, t = entry.group, self.t(entry)
            wd = live(group["weight_decay"])
            off = not any(entry.decays) or (not isinstance(wd, Tensor) and wd == 0)
            scalars = entry.rule.scalars(t if self.on_host else t.double(), self.hyper(entry))
            self._rates[key] = Rates(live(group["lr"]), None if off else wd, scalars)
        return self._rates[key]


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written in place; what inference mode made does not count that."""
    return [0 if t.is_inference() else t._version for t in tensors]


def rounded(value: Any, dtype: torch.dtype) -> Tensor:
    """A number as a 0-d tensor: on the CPU if it is known there."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")


def _pack(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    if all(not isinstance(v, Tensor) for v in values):
        return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)
    # Filling, not copying: a copy of a number from the host would wait for the device.
    filled = [v if isinstance(v, Tensor) else torch.full((), v, dtype=dtype, device=device) for v in values]
    return torch.stack([v.to(dtype) for v in filled])
