"""The scalars of a step: step sizes, decay, the scalars of the rules, once for all views that share them.

Learning rate and multiplier meet here, and nowhere else; so do weight decay and multiplier.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.counter import StepCounter
from sharpwise.engine.rehearsal import live, on_a_device
from sharpwise.engine.view import ParamView

_OFF = 1.0
"""The factor of a decay that is off."""


class Row(NamedTuple):
    """The step of a segment.

    Attributes:
        lr: learning rate times multiplier; rate: that over the bias correction.
        decay: factor on the parameter, where decay is decoupled; weight_decay: None if it is off.
    """

    lr: Any
    rate: Any
    decay: Any
    weight_decay: Any


@dataclass
class Class:
    """What all views of one group and rule that have taken the same number of steps share.

    Attributes:
        t: the number of the step; scalars: of the rule; weight_decay: None if it is off; correction: of the bias, which
            the rate is divided by; decay: factor on the parameter, where it does not follow the multiplier.
    """

    t: Any
    lr: Any
    weight_decay: Any
    correction: Any
    scalars: dict[str, Any]
    rows: dict[tuple[float, float], Row] = field(default_factory=dict)
    decay: Any = None


class StepScalars:
    """The scalars of a step, worked out once for all views that share them.

    Args:
        decoupled: whether weight decay shrinks the parameter; else it is added to the gradient. cautious: whether only
            where the update does too.
        scales_decay: whether it follows the multiplier.
        stochastic: whether bf16 is rounded stochastically.
        now: the multipliers of a view.

    Attributes:
        decoupled, stochastic: as given.
        ok: whether the step is taken: True, or a device tensor that says; clip: a factor on the gradients, None for 1.
    """

    def __init__(
        self,
        views: Sequence[ParamView],
        counter: StepCounter,
        *,
        decoupled: bool,
        cautious: bool,
        scales_decay: bool,
        stochastic: bool,
        now: Callable[[ParamView], tuple[float, ...]],
    ) -> None:
        self.counter, self._now, self.stochastic, self.cautious = counter, now, stochastic, cautious
        self.decoupled, self._scales_decay = decoupled, scales_decay
        kinds: dict[Any, int] = {}
        self._kind = {
            id(v): kinds.setdefault((id(v.group), v.rule, any(v.decays), v.device), len(kinds)) for v in views
        }
        self._changes = 0
        self._sorts: dict[int, int] = {}
        self._sort_numbers: dict[Any, int] = {}
        self._representatives: tuple[Sequence[ParamView], list[ParamView]] = ((), [])
        self.ok: Any = True
        self.clip: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget the numbers of the last step, and which views have taken the same number of steps."""
        self._labels = self.counter.labels
        self._classes: dict[Any, Class] = {}
        self._rows: dict[Any, tuple[Row, ...]] = {}
        self._kept: dict[Any, Any] = {}

    # -- the step ------------------------------------------------------------------------------------------------

    def begin(self, active: Sequence[ParamView], late: Collection[int] = ()) -> None:
        """Work out the rules' scalars of the step to come, before anything is written: what is wrong shows here.

        Args:
            late: ids of views whose back end works theirs out itself.
        """
        self.ok, self.clip = True, None
        if self._representatives[0] is not active or not self._labels.level:
            self._representatives = (active, list({self.class_key(view): view for view in active}.values()))
        for view in [view for view in active if id(view) not in late] if late else self._representatives[1]:
            self._class(view)

    def multipliers_changed(self) -> None:
        """Forget which views share theirs."""
        self._sorts.clear()
        self._sort_numbers.clear()
        self._changes += 1

    def class_key(self, view: ParamView) -> Any:
        """Views of one class are of one group, rule and device, and have taken the same number of steps."""
        kind = self._kind[id(view.origin)]
        return kind, None if self._labels.level else self._labels.of(view.origin)

    def t(self, view: ParamView) -> Any:
        """The number of this step, from 1."""
        return self._class(view).t

    def of_rule(self, view: ParamView) -> dict[str, Any]:
        """The scalars of its rule, without the bias correction."""
        return self._class(view).scalars

    def _class(self, view: ParamView) -> Class:
        view = view.origin
        key = self.class_key(view)
        found = self._classes.get(key)
        if found is None:
            group = view.settings
            wd = on_device(live(group["weight_decay"]), view.device)
            off = not any(view.decays) or (not isinstance(wd, Tensor) and wd == 0)
            hyper = {name: on_device(live(group[name]), view.device) for name in view.rule.defaults if name in group}
            t = self.counter.next(view)
            scalars = dict(view.rule.scalars(t, hyper))
            correction = scalars.pop("bias_correction", 1.0)
            lr = on_device(live(group["lr"]), view.device)
            found = self._classes[key] = Class(t, lr, None if off else wd, correction, scalars)
        return found

    def on_device(self, view: ParamView) -> bool:
        """Whether only a device knows its scalars: the number of the step, or a hyperparameter."""
        if not self.counter.on_host:
            return True
        view = view.origin
        key = "on device", self._kind[id(view)]
        if key not in self._kept:
            names = ("lr", "weight_decay", *view.rule.defaults)
            self._kept[key] = any(on_a_device(view.settings[name]) for name in names if name in view.settings)
        found: bool = self._kept[key]
        return found

    def factors(self, view: ParamView) -> list[tuple[Any, ...]]:
        """What `rows` are worked out from, per segment: the learning rate, its factors for the step and for decoupled
        decay, weight decay (0: off), and the peak."""
        lr, wd = live(view.settings["lr"]), live(view.settings["weight_decay"])
        pairs = zip(self._now(view.origin), view.decays, strict=True)
        peak = self.peak(view)
        return [(lr, m, m if self._scales_decay else 1.0, wd if decays else 0.0, peak) for m, decays in pairs]

    def hyper(self, view: ParamView) -> dict[str, Any]:
        """The hyperparameters of the rule as they are now."""
        return {name: live(value) for name, value in view.settings.items() if name in view.origin.rule.defaults}

    def settings(self, view: ParamView) -> list[dict[str, Any]]:
        """What a control is told of each segment: `program.SETTINGS`."""
        rule, hyper = view.origin.rule, self.hyper(view)
        shared = {"peak": self.peak(view), "t": self.t(view), "turn": rule.turn}
        shared |= {"momentum": rule.momentum_of(hyper), "mean_square": rule.mean_square(hyper)}
        pairs = zip(self.rows(view), self.multipliers(view), strict=True)
        own = [(row.lr, m, row.decay, 0.0 if row.weight_decay is None else row.weight_decay) for row, m in pairs]
        return [dict(zip(("lr", "multiplier", "decay", "weight_decay"), one, strict=True)) | shared for one in own]

    def peak(self, view: ParamView) -> Any:
        """The learning rate that a schedule climbs to, under a control."""
        group = view.group
        if group.get("reference_lr") is None:  # there is no control
            return 0.0
        return view.origin.rule.settings({**group, "lr": live(group.get("initial_lr", group["reference_lr"]))})["lr"]

    # -- one view --------------------------------------------------------------------------------------------------

    def key(self, view: ParamView) -> Any:
        """Views of one key have the same scalars in this step."""
        view = view.origin
        sort = self._sorts.get(id(view))
        if sort is None:
            kind = (self._kind[id(view)], view.multipliers, view.decays)
            sort = self._sorts[id(view)] = self._sort_numbers.setdefault(kind, len(self._sort_numbers))
        return sort if self._labels.level else (sort, self._labels.of(view))

    def partition(self, views: Sequence[ParamView]) -> Any:
        """Equal where the same ones of these views share their scalars as before."""
        if self._labels.level:
            return self._changes
        numbers: dict[Any, int] = {}
        return self._changes, tuple(numbers.setdefault(self.key(view), len(numbers)) for view in views)

    def multipliers(self, view: ParamView) -> tuple[float, ...]:
        """The multiplier of each segment."""
        return self._now(view.origin)

    def rows(self, view: ParamView) -> tuple[Row, ...]:
        """Learning rate and decay of each segment."""
        key = self.key(view)
        found = self._rows.get(key)
        if found is None:
            own = self._class(view)
            pairs = zip(self._now(view.origin), view.decays, strict=True)
            found = self._rows[key] = tuple(self._row(own, m, d) for m, d in pairs)
        return found

    def _row(self, own: Class, multiplier: float, decays: bool) -> Row:
        """Where learning rate and multiplier meet, and where decay and multiplier do."""
        found = own.rows.get((multiplier, decays))
        if found is None:
            lr, wd, decay = own.lr * multiplier, own.weight_decay if decays else None, _OFF
            if wd is not None and self.decoupled:
                if own.decay is None and not self._scales_decay:
                    own.decay = 1 - own.lr * wd  # one number for all rows: those of a device are not compared
                decay = 1 - lr * wd if self._scales_decay else own.decay
            found = own.rows[multiplier, decays] = Row(lr, lr / own.correction, decay, wd)
        return found

    def _decays_by_row(self, view: ParamView) -> bool:
        """Whether its rows differ in their factors of decay."""
        rows = self.rows(view)
        if not self.decoupled or all(row.weight_decay is None for row in rows):
            return False
        return any(_differ(row.decay, rows[0].decay) for row in rows)

    def named(self, view: ParamView) -> dict[str, Any]:
        """Scalars of `reference.update` by name: those of the rule, and `step`, `decay`, `weight_decay`, `clip`, `ok`
        where there are such, and they are the same for all rows."""
        key = "named", self.key(view)
        if key not in self._kept:
            first = self.rows(view)[0]
            s = dict(self._class(view).scalars)
            s["step"] = first.rate
            if first.weight_decay is not None and not self.decoupled:
                s["weight_decay"] = first.weight_decay
            elif self.decoupled and not self._decays_by_row(view) and first.weight_decay is not None:
                s["decay"] = first.decay
            if self.clip is not None:
                s["clip"] = self.clip_of(view)
            if self.ok is not True:
                s["ok"] = self.ok_of(view)
            self._kept[key] = s
        found: dict[str, Any] = self._kept[key]
        return found

    def clip_of(self, view: ParamView) -> Any:
        """The factor on its gradients: None, a number, or a tensor on its device."""
        return self.placed("clip", self.clip, view.device)

    def ok_of(self, view: ParamView) -> Any:
        """Whether it moves: True, or a tensor on its device."""
        return self.placed("ok", self.ok, view.device)

    def placed(self, name: str, value: Any, device: torch.device) -> Any:
        """A number of the step where it is needed, copied there once."""
        if not isinstance(value, Tensor) or value.device == device:
            return value
        if (name, device) not in self._kept:
            self._kept[name, device] = on_device(value, device)
        return self._kept[name, device]

    # -- vectors ---------------------------------------------------------------------------------------------------

    def row_rate(self, view: ParamView) -> Tensor | None:
        """Rates of its rows, shaped to broadcast, None where they are all the same; for rules without blocks."""
        rows = self.rows(view)
        return self._by_row(view, "rate") if any(row.rate is not rows[0].rate for row in rows) else None

    def row_decay(self, view: ParamView) -> Tensor | None:
        """Factors of decay of its rows, shaped to broadcast, None where they are all the same."""
        return self._by_row(view, "decay") if self._decays_by_row(view) else None

    def spread(self, views: Sequence[ParamView], what: str, index: Tensor) -> Any:
        """Rates or decays of the rows of several views on one device, at these places; one number where all agree."""
        values = [getattr(row, what) for view in views for row in self.rows(view)]
        if all(value is values[0] or (type(value) is float and value == values[0]) for value in values):
            return values[0]
        return _pack(values, views[0].dtype, views[0].device)[index]

    def _by_row(self, view: ParamView, what: str) -> Tensor:
        layout = view.layout
        key = what, self.key(view), id(layout.segment_of_row), view.row_shape, view.dtype
        if key not in self._kept:
            assert layout.segment_of_row is not None
            values = [getattr(row, what) for row in self.rows(view)]
            by_segment = _pack(values, view.dtype, view.device)
            self._kept[key] = by_segment[layout.segment_of_row].view(view.row_shape)
        found: Tensor = self._kept[key]
        return found


def on_device(value: Any, device: torch.device) -> Any:
    """A device tensor where it is needed, on the CPU as a number; anything else as it is."""
    if isinstance(value, Tensor) and value.device != device:
        return value.item() if device.type == "cpu" else value.to(device, non_blocking=True)
    return tuple(on_device(own, device) for own in value) if isinstance(value, tuple) else value


def _differ(some: Any, other: Any) -> bool:
    """Whether two numbers do; two on a device are taken to, unless they are one."""
    return some is not other and (isinstance(some, Tensor) or isinstance(other, Tensor) or some != other)


def rounded(value: Any, dtype: torch.dtype) -> Tensor:
    """A number as a tensor of this type: on the CPU if it is known there."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype, device="cpu")


def _pack(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, some of which only the device knows, in one vector: one copy from the host."""
    host = torch.tensor([0.0 if isinstance(v, Tensor) else v for v in values], dtype=torch.float64, device="cpu")
    vector = host.to(dtype).to(device, non_blocking=True)
    if not any(isinstance(v, Tensor) for v in values):
        return vector
    own = [v.to(dtype).view(()) if isinstance(v, Tensor) else vector[i] for i, v in enumerate(values)]
    return torch.stack(own)
