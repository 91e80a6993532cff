"""Controls that the library does not have: the smallest that use each sum, each factor and both units."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.controls import L2, Angular, Control, Hyperball, Over, Sums


@dataclass(frozen=True)
class Turned(Control):
    """Every row moves by the same angle: its update has lr times its norm."""

    name: ClassVar[str] = "test-turned"
    over: ClassVar[Over] = "row"

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return _root(sums.pp, sums.uu), torch.ones_like(sums.uu)


@dataclass(frozen=True)
class Sized(Control):
    """The update of a matrix has the same size per element, whatever the rule."""

    size: float = 0.3

    name: ClassVar[str] = "test-sized"
    over: ClassVar[Over] = "matrix"

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return self.size * _root(sums.elements, sums.uu), torch.ones_like(sums.uu)


@dataclass(frozen=True)
class Sideways(Control):
    """A row loses what of its update points along itself, and decay with it: p (1 + lr u.p / p.p) - lr u."""

    name: ClassVar[str] = "test-sideways"
    over: ClassVar[Over] = "row"

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        along = torch.where(sums.pp > 0, sums.pu / sums.pp, 0.0)
        return torch.ones_like(sums.uu), (1 + s["lr"] * along) / s["decay"]


def _root(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0).sqrt()


CONTROLS: dict[str, Control] = {"turned": Turned(), "sized": Sized(), "sideways": Sideways()}
BOUNDS: dict[str, Control] = CONTROLS | {"angular": Angular(), "hyperball": Hyperball(), "l2": L2()}
BOUNDS["snr"] = Angular(snr=True, batch_size=8)
"""With those of the library."""
