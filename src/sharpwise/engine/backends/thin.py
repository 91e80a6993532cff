"""Rules that have a number of every element from products of thin matrices with the gradient (`rules.base.ThinRule`).

    x, one matrix at a time, in a scratch that is used again -> moved by the back ends of elements

Where second moments are by element, x lies beside them as another tensor of state, and the gradient is read along;
where they are by block, x takes the place of the gradient, and the steps of blocks are known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sharpwise.engine.backends.base import Backend, Choice, Found, Spec
from sharpwise.engine.scalars import StepScalars
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Kind, Scalars, Stage, State, ThinRule
from sharpwise.shards import local

X = "x"
"""What a rule calls it in its state."""


@dataclass(frozen=True)
class Beside(Stage):
    """The elements of a thin rule, x among their state."""

    rule: ThinRule

    name: ClassVar[str] = "beside"

    @property
    def state(self) -> dict[str, Kind]:
        return super().state | {X: "element"}

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        new, m, below = self.rule.direction(g, state, s)
        return {**new, X: state[X]}, m, below


@dataclass(frozen=True)
class InPlaceOfGradients(Stage):
    """The elements of a thin rule with block state, whose gradient is x."""

    rule: ThinRule

    name: ClassVar[str] = "in-place-of-gradients"
    kind: ClassVar[Kind] = "block"
    stage = "move"

    def block_phase(self, blocks: State, mean_square: Tensor, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        return self.rule.block_phase(blocks, mean_square, s)

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return {}, g, None


@dataclass(eq=False)
class _Stage:
    """How the elements of a view are moved.

    Attributes:
        x: what is filled, as the view lies; whole: the scratch as the local tensor of the parameter lies.
        copied: whether x has to be put there, as its rows are scattered.
    """

    views: list[ParamView]
    backend: Backend
    x: Tensor
    whole: Tensor
    beside: bool
    copied: bool


class Thin(Backend):
    """Fills x, and has it moved.

    Args:
        elements: of a device, the back ends of what goes element by element.
        scratch: shared with what sums up updates before they are made.
    """

    name: ClassVar[str] = "thin"

    def __init__(self, elements: Callable[[torch.device], Sequence[Backend]], scratch: "Scratch") -> None:
        self.elements, self.scratch = elements, scratch

    def refuses(self, spec: Spec) -> str:
        if not isinstance(spec.view.rule, ThinRule):
            return "for rules of thin products"
        spec.view.kept["thin", spec.grad] = spec
        spec.view.kept["thin refusals"] = _stage(spec, self.scratch, self.elements)[1]
        return ""

    def slower(self, spec: Spec) -> Sequence[tuple[str, str]]:
        found: Sequence[tuple[str, str]] = spec.view.kept["thin refusals"]
        return found

    def bounds(self, spec: Spec) -> bool:
        stage = self._current(spec.view, spec.grad)
        return stage.beside and stage.backend.bounds(spec._replace(view=stage.views[0]))

    def step(self, views: Sequence[ParamView], grads: Sequence[Tensor], scalars: StepScalars, found: Found) -> None:
        self.scratch.of(views[0], max(local(view.param).numel() for view in views))
        for view, g in zip(views, grads, strict=True):
            if not view.numel:
                continue
            stage = self._current(view, g.dtype)
            own = stage.views[0]
            clip = None if scalars.clip is None else scalars.clip_of(view)
            squares = found.rules[id(view)].fill(stage.x, view.rows_of(g), clip)
            rates, bounded = found.rates.get(id(view)), id(view) in found.lines or view.shard.cut
            if rates is not None and found.rates_of is not None and not bounded:
                rates = found.rates_of(view, stage.x, squares, rates)
            if stage.copied:
                view.put_rows(stage.whole, stage.x)
            given = [g] if stage.beside else [stage.whole]
            lines = {id(own): found.lines[id(view)]} if id(view) in found.lines else {}
            moved = Found({} if rates is None else {id(own): rates}, {}, lines, told=found.told)
            stage.backend.prepare(stage.views, given, [False], scalars)
            stage.backend.step(stage.views, given, scalars, moved)

    def _current(self, view: ParamView, dtype: torch.dtype) -> _Stage:
        """The stage of a view, in the scratch as it is now."""
        stage: _Stage | None = view.kept.get("thin stage")
        if stage is None or stage.whole.data_ptr() != self.scratch.of(view, 0).data_ptr():
            stage = view.kept["thin stage"] = _stage(view.kept["thin", dtype], self.scratch, self.elements)[0]
        return stage


def _stage(
    spec: Spec, scratch: "Scratch", elements: Callable[[torch.device], Sequence[Backend]]
) -> tuple[_Stage, Sequence[tuple[str, str]]]:
    """How the elements of a view are moved, and which back ends refused that, and why."""
    view = spec.view
    room, held = scratch.of(view, local(view.param).numel()), local(view.param)
    whole = room[: held.numel()].view(held.shape)
    beside, copied = not view.rule.has_blocks, False
    assert isinstance(view.rule, ThinRule)
    if beside:
        stage = view.stage(rule=Beside(view.rule), own={**view.own, X: whole})
        if stage.state_key(X) != X:
            stage.own[X] = room[: view.numel].view(view.shape)
        x = stage.rows_of(stage.own[X], X)
    else:
        stage, x = view.stage(rule=InPlaceOfGradients(view.rule)), view.rows_of(whole)
    if isinstance(view.layout.rows, Tensor) and stage.own.get(X, whole) is whole:
        copied, x = True, torch.empty_like(x)
    choice = Choice.of(elements(view.device), spec._replace(view=stage, grad=spec.grad if beside else whole.dtype))
    return _Stage([stage], choice.backend, x, whole, beside, copied), choice.refusals


class Scratch:
    """Memory for one matrix at a time, by device and type."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def of(self, view: ParamView, size: int) -> Tensor:
        """That for the arithmetic of a view, of so many elements at least."""
        key = view.device, view.dtype
        if key not in self._held or len(self._held[key]) < size:
            with torch.inference_mode(False):
                self._held[key] = torch.empty(size, dtype=view.dtype, device=view.device)
        return self._held[key]
