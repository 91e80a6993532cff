"""What moves views by a step: a table of back ends, the fastest first."""

from typing import Any

import torch

from sharpwise.engine.backends.base import Backend, Spec
from sharpwise.engine.backends.cpp import Cpp
from sharpwise.engine.backends.matrices import Matrices
from sharpwise.engine.backends.reference import Reference
from sharpwise.engine.backends.triton import DeviceGuard, Triton
from sharpwise.engine.backends.triton_launch import refused
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import MatrixRule

ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp",),
    "cuda": ("triton",),
}
"""By kind of device, which back ends are asked, in this order; then, and everywhere else, the reference."""


class Backends:
    """One of each, for as long as an optimizer lives: they keep what they compile.

    Args:
        replicas: a group of processes with the same plain parameters, that share work on whole matrices.
    """

    def __init__(self, replicas: Any = None) -> None:
        self.cpp = Cpp()
        self.by_name: dict[str, Backend] = {b.name: b for b in (Triton(), self.cpp)}
        self._reference = Reference()
        self.matrices = {batched: Matrices(batched, replicas) for batched in (False, True)}

    def of(self, view: ParamView, kernels: bool) -> list[Backend]:
        """Those to be asked for a view, the reference last; without kernels it alone."""
        if isinstance(view.rule, MatrixRule):
            return [self.matrices[kernels]]
        names = ORDER.get(view.device.type, ()) if kernels else ()
        return [*(self.by_name[name] for name in names), self._reference]

    def guard(self, device: torch.device, max_norm: float | None, skips: bool) -> Any:
        """What decides about a step in one launch on a device; None where no kernel of ours runs."""
        return None if refused(device) else DeviceGuard(device, max_norm, skips)

    @property
    def built(self) -> int:
        """How many kernels all of them have built."""
        return sum(backend.built for backend in self.by_name.values())


__all__ = ["ORDER", "Backend", "Backends", "Reference", "Spec"]
