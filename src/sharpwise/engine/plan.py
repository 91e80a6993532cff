"""The plan of a step: which back end moves which view, and why none that is faster does."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharpwise.engine.backends import Backend, Backends, Spec
from sharpwise.engine.options import Options
from sharpwise.engine.view import ParamView


class Choice(NamedTuple):
    """The back end of a view, and for each that would be faster why it does not take it."""

    backend: Backend
    refusals: tuple[tuple[str, str], ...]

    @property
    def why(self) -> str:
        """The refusals in words."""
        return "; ".join(f"{name}: {reason}" for name, reason in self.refusals)


class Work(NamedTuple):
    """What a back end moves in a step: views, by their places in the list of all that move."""

    backend: Backend
    places: list[int]
    views: list[ParamView]


class Plan:
    """Chooses back ends: the only decision about it.

    Args:
        backends: of the optimizer.
        views: all of its parameters.
    """

    def __init__(self, backends: Backends, views: Sequence[ParamView], options: Options) -> None:
        self.backends, self.options = backends, options
        self.kernels = options.compile is not False
        self._chosen: dict[tuple[int, torch.dtype], Choice] = {}
        self._views = list(views)  # whose ids are in use
        self._works: tuple[Sequence[ParamView], list[torch.dtype], list[Work], list[bool], int] = ((), [], [], [], 0)

    def spec(self, view: ParamView, grad: torch.dtype) -> Spec:
        """What back ends are asked about."""
        return Spec(view, grad, self.options)

    def choose(self, view: ParamView, grad: torch.dtype) -> Choice:
        """The first back end of the device's list that does not refuse a view with such a gradient."""
        key = id(view), grad
        if key not in self._chosen:
            refusals: list[tuple[str, str]] = []
            for backend in self.backends.of(view, self.kernels):
                reason = backend.refuses(self.spec(view, grad))
                if not reason:
                    self._chosen[key] = Choice(backend, tuple(refusals))
                    break
                refusals.append((backend.name, reason))
        return self._chosen[key]

    def works(self, views: Sequence[ParamView], grads: Sequence[Tensor]) -> tuple[list[Work], list[bool]]:
        """Views with gradients by back end, the same lists as long as these are the same; and of which views the sums
        over blocks are taken before they move."""
        types = [g.dtype for g in grads]
        if self._works[0] is views and self._works[1] == types and self._works[4] == torch.get_num_threads():
            return self._works[2:4]
        works: dict[int, Work] = {}
        for i, (view, dtype) in enumerate(zip(views, types, strict=True)):
            backend = self.choose(view, dtype).backend
            own = works.setdefault(id(backend), Work(backend, [], []))
            own.places.append(i)
            own.views.append(view)
        summed = [
            view.rule.has_blocks and not self.choose(view, dtype).backend.sums_blocks(self.spec(view, dtype))
            for view, dtype in zip(views, types, strict=True)
        ]
        # Whether blocks are summed by the way depends on the threads that share them.
        self._works = views, types, list(works.values()), summed, torch.get_num_threads()
        return self._works[2:4]
