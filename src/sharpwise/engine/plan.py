"""The plan of a step: which back end moves which view, and why none that is faster does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpwise.engine.backends import Backends
from sharpwise.engine.backends.base import Choice, Spec, Work
from sharpwise.engine.options import Options
from sharpwise.engine.view import ParamView


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
            self._chosen[key] = Choice.of(self.backends.of(view, self.kernels), self.spec(view, grad))
        return self._chosen[key]

    def works(self, views: Sequence[ParamView], grads: Sequence[Tensor]) -> tuple[list[Work], list[bool]]:
        """Views with gradients by back end, the same lists as long as these are the same; and of which views the sums
        over blocks are taken before they move."""
        types = [g.dtype for g in grads]
        if self._works[0] is views and self._works[1] == types and self._works[4] == torch.get_num_threads():
            return self._works[2:4]
        moved_by = [self.choose(view, dtype).backend for view, dtype in zip(views, types, strict=True)]
        summed = [
            view.rule.has_blocks and not backend.sums_blocks(self.spec(view, dtype))
            for view, dtype, backend in zip(views, types, moved_by, strict=True)
        ]
        # Whether blocks are summed by the way depends on the threads that share them.
        self._works = views, types, Work.of(views, moved_by), summed, torch.get_num_threads()
        return self._works[2:4]
