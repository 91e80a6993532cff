"""Step counts: how many steps were taken with each parameter."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.view import ParamView
from sharpwise.shards import is_dtensor


class Labels(NamedTuple):
    """Parameters of one label have taken the same number of steps; `level`: all have."""

    places: dict[int, int]
    values: list[Any]
    level: bool

    def of(self, view: ParamView) -> Any:
        """The label of a view."""
        return self.values[self.places[id(view.param)]]


class StepCounter:
    """Steps taken with each parameter: views of one fp32 vector per device, and their copies on the host.

    Args:
        views: of the parameters; state["step"] of each becomes a view of a vector, unless it is one.
        on_host: whether the host can know the counts; not so where a device says whether a step is taken.
    """

    def __init__(self, views: Sequence[ParamView], state: Any, on_host: bool) -> None:
        self.on_host = on_host
        held = {id(view.param): state[view.param] for view in views}
        self._index = {name: i for i, name in enumerate(held)}
        self.steps = _as_views(list(held.values()))
        bases = {id(base): base for step in self.steps if (base := step._base) is not None}
        self._loose = [step for step in self.steps if step._base is None]
        self._vectors = list(bases.values())
        # A vector may hold the counts of parameters that are frozen now.
        self._whole = not self._loose and sum(len(vector) for vector in self._vectors) == len(self.steps)
        self._last: tuple[Any, set[int]] = ((), set())
        self._versions: list[int] = []
        self._counts: list[int] = []
        self._labels: list[Any] = []
        self.level = True

    def read(self) -> None:
        """Read the counts again where somebody wrote them: a rollback, a distributed checkpoint."""
        versions = versions_of(self._vectors)
        if versions == self._versions and not self._loose:
            return
        self._versions = versions
        self._counts = [int(count) for count in values_of(self.steps)]
        self._labels = list(self._counts)
        self.level = len(set(self._counts)) <= 1

    @property
    def begun(self) -> bool:
        """Whether any step has been taken."""
        return any(self._counts)

    def leave_to_device(self) -> None:
        """From now on only the device knows the counts, as it decides whether a step is taken."""
        self.on_host = False

    @property
    def labels(self) -> "Labels":
        """As they are before the next step is counted."""
        return Labels(self._index, self._labels, self.level)

    def step(self, view: ParamView) -> Tensor:
        """The count, a 0-d tensor on the device."""
        return self.steps[self._index[id(view.param)]]

    def next(self, view: ParamView) -> Any:
        """The number of the step to come, from 1: an int, or a 0-d fp64 tensor where only the device knows it."""
        i = self._index[id(view.param)]
        return self._counts[i] + 1 if self.on_host else self.steps[i].double() + 1

    def advance(self, active: Sequence[ParamView], ok: Any, taken: Tensor | None = None) -> None:
        """Count one step more (ok: True, or a device tensor that says whether it is taken; `taken`: that in fp32)."""
        if taken is not None:
            ok = taken
        if self._last[0] is not active:
            self._last = active, {self._index[id(view.param)] for view in active}
        here = self._last[1]
        everyone = len(here) == len(self.steps)
        if everyone and self._whole:
            for vector in self._vectors:
                vector.add_(1.0 if ok is True else ok.to(vector.device, torch.float32))
        else:
            own = [self.steps[i] for i in sorted(here)]
            torch._foreach_add_(own, [1.0 if ok is True else ok.to(step.device, torch.float32) for step in own])
        self._versions = versions_of(self._vectors)
        self._counts = [count + (i in here) for i, count in enumerate(self._counts)]
        if self.on_host:
            self._labels = self._counts
        elif not everyone:  # of those that were alike so far, some may have counted a step, and others not
            numbers: dict[Any, int] = {}
            pairs = [(label, i in here) for i, label in enumerate(self._labels)]
            self._labels = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
        self.level = everyone if self.level else len(set(self._labels)) <= 1


def _as_views(states: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The steps of all states; those that are no view of a vector yet become views of a new one, by device."""
    by_device: dict[torch.device, list[dict[str, Any]]] = {}
    for own in states:
        step = own["step"]
        if not is_dtensor(step) and not _is_in_vector(step):
            by_device.setdefault(step.device, []).append(own)
    for group in by_device.values():
        vector = torch.stack([own["step"].detach().float() for own in group])
        for own, step in zip(group, vector.unbind(), strict=True):
            own["step"] = step
    return [own["step"] for own in states]


def _is_in_vector(step: Tensor) -> bool:
    """Whether it is a number of an fp32 vector that can be written, and its data are still there."""
    base = step._base
    if base is None or base.dim() != 1 or base.dtype != torch.float32 or base.is_inference():
        return False
    own, whole = step.untyped_storage(), base.untyped_storage()
    return own.device.type == "meta" or own.data_ptr() == whole.data_ptr()


def values_of(steps: Sequence[Tensor]) -> list[float]:
    """Their values; read together, as each reading of a device waits for it."""
    by_device: dict[torch.device, list[int]] = {}
    for i, step in enumerate(steps):
        by_device.setdefault(step.device, []).append(i)
    values = [0.0] * len(steps)
    for device, own in by_device.items():
        if device.type != "meta":
            found = torch.stack([steps[i].detach().double() for i in own]).tolist()
            for i, value in zip(own, found, strict=True):
                values[i] = value
    return values


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """How often each was written in place; what inference mode made does not count that."""
    return [0 if t.is_inference() else t._version for t in tensors]
