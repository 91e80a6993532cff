"""What moves views by a step: a table of back ends, the fastest first."""

from functools import partial
from typing import Any

import torch

from sharpwise.engine.backends.base import Backend, Spec
from sharpwise.engine.backends.cpp import Cpp
from sharpwise.engine.backends.matrices import Matrices
from sharpwise.engine.backends.reference import Reference
from sharpwise.engine.backends.thin import Scratch, Thin
from sharpwise.engine.backends.triton import Triton
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import MatrixRule, ThinRule

ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp",),
    "cuda": ("triton",),
}
"""By kind of device, which back ends are asked, in this order; then, and everywhere else, the reference."""
BACKENDS: dict[str, type[Backend]] = {kind.name: kind for kind in (Triton, Cpp)}
"""Those by their names."""


def add_backend(kind: type[Backend], device: str) -> None:
    """Have a back end asked before all others about views on a kind of device, by optimizers that are built after this.

    Raises:
        ValueError: for a name that is taken.
    """
    if kind.name in BACKENDS or kind.name == Reference.name:
        raise ValueError(f"a back end is called {kind.name!r} already: {', '.join(sorted(BACKENDS))}, {Reference.name}")
    BACKENDS[kind.name] = kind
    ORDER[device] = (kind.name, *ORDER.get(device, ()))


def remove_backend(kind: type[Backend]) -> None:
    """Take back `add_backend`; an optimizer that moves by it keeps it until it is bound anew."""
    del BACKENDS[kind.name]
    for device, names in ORDER.items():
        ORDER[device] = tuple(name for name in names if name != kind.name)


class Backends:
    """One of each, for as long as an optimizer lives: they keep what they compile.

    Args:
        replicas: a group of processes with the same plain parameters, that share work on whole matrices.
    """

    def __init__(self, replicas: Any = None) -> None:
        self.by_name: dict[str, Backend] = {name: kind() for name, kind in BACKENDS.items()}
        self._reference, self.scratch = Reference(), Scratch()
        self.matrices = {
            batched: Matrices(partial(self.of_elements, kernels=batched), batched, replicas)
            for batched in (False, True)
        }
        self.thin = {
            kernels: Thin(partial(self.of_elements, kernels=kernels), self.scratch) for kernels in (False, True)
        }

    @property
    def cpp(self) -> Any:
        """Whose kernels add up squares too."""
        return self.by_name["cpp"]

    def of(self, view: ParamView, kernels: bool) -> list[Backend]:
        """Those to be asked for a view, the reference last; without kernels it alone."""
        if isinstance(view.rule, MatrixRule):
            return [self.matrices[kernels]]
        return [self.thin[kernels]] if isinstance(view.rule, ThinRule) else self.of_elements(view.device, kernels)

    def of_elements(self, device: torch.device, kernels: bool) -> list[Backend]:
        """The same for what is moved element by element, on a device."""
        names = ORDER.get(device.type, ()) if kernels else ()
        return [*(self.by_name[name] for name in names if name in self.by_name), self._reference]

    def guard(self, device: torch.device, max_norm: float | None, skips: bool) -> Any:
        """What decides about a step in one launch on a device; None where no kernel of ours does."""
        kernels = (self.by_name[name].guard(device, max_norm, skips) for name in ORDER.get(device.type, ()))
        return next((own for own in kernels if own is not None), None)

    @property
    def built(self) -> int:
        """How many kernels all of them have built."""
        return sum(backend.built for backend in self.by_name.values())


__all__ = ["ORDER", "Backend", "Backends", "Reference", "Spec", "add_backend", "remove_backend"]
