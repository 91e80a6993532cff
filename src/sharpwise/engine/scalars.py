"""The numbers of one step: hyperparameters as they are now, bias corrections, step sizes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.plan import Entry


class Rates(NamedTuple):
    """Learning rate, weight decay (None: off) and the scalars of the rule for one entry at one step."""

    lr: Any
    weight_decay: Any
    of_rule: dict[str, Any]


class Clock:
    """Step counts of all entries. On the CPU they are read as numbers, on a device they stay there.

    What has been worked out for a step, once per group, rule and count, is kept until the next.
    """

    def __init__(self, entries: Sequence[Entry], state: Any) -> None:
        self._step = {id(e): state[e.param]["step"] for e in entries}
        self.on_host = all(t.device.type == "cpu" for t in self._step.values())
        self._counts = {
            key: int(step) for key, step in self._step.items()
        }  # on a device: gradients had, skipped or not
        self._rates: dict[Any, Rates] = {}
        self._scalars: dict[Any, dict[str, Any]] = {}
        self._packs: dict[Any, Tensor] = {}

    def advance(self, active: Sequence[Entry], ok: Any) -> None:
        """Count one step more (ok: True, or a device tensor that says whether it is taken)."""
        steps = [self._step[id(e)] for e in active]
        if ok is True:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, [ok.to(torch.float32)] * len(steps))
        for entry in active:
            self._counts[id(entry)] += 1
        self._rates.clear()
        self._scalars.clear()
        self._packs.clear()

    def t(self, entry: Entry) -> Any:
        """Steps taken with this entry: an int, or a 0-d tensor on its device."""
        return self._counts[id(entry)] if self.on_host else self._step[id(entry)]

    def together(self, entries: Sequence[Entry]) -> bool:
        """Whether all have taken the same number of steps."""
        return len({self._counts[id(e)] for e in entries}) <= 1

    def key(self, entry: Entry) -> tuple[Any, ...]:
        """Entries with the same key have the same rates."""
        return id(entry.group), entry.rule, entry.decays, self.t(entry) if self.on_host else id(entry)

    def rates(self, entry: Entry) -> Rates:
        """The numbers of this step."""
        key = self.key(entry)
        if key not in self._rates:
            group, t = entry.group, self.t(entry)
            own = {k: _live(v) for k, v in group.items() if k in entry.rule.defaults}
            wd = _live(group["weight_decay"])
            off = not any(entry.decays) or (not isinstance(wd, Tensor) and wd == 0)
            scalars = entry.rule.scalars(t if self.on_host else t.double(), own)
            self._rates[key] = Rates(_live(group["lr"]), None if off else wd, scalars)
        return self._rates[key]

    def scalars(self, key: tuple[Any, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, kept for this step under `key`."""
        if key not in self._scalars:
            self._scalars[key] = make()
        return self._scalars[key]

    def pack(self, key: tuple[Any, ...], values: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Scalars in one tensor, kept for this step under `key`."""
        key = (*key, dtype, device)
        if key not in self._packs:
            self._packs[key] = _pack(list(values.values()), dtype, device)
        return self._packs[key]


def _live(value: Any) -> Any:
    """A hyperparameter as it is now: tensors on the CPU as floats, on a device left there."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else value.detach().double()
    return tuple(_live(v) for v in value) if isinstance(value, (tuple, list)) else value


def _pack(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    if all(not isinstance(v, Tensor) for v in values):
        return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
    # Filling, not copying: a copy of a number from the host would wait for the device.
    filled = [v if isinstance(v, Tensor) else torch.full((), v, dtype=dtype, device=device) for v in values]
    return torch.stack([v.to(dtype) for v in filled])
