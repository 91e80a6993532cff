"""What a control is: how large the update of a row or of a matrix may be, from a few sums over it.

A rule says where to go, u, and would move p to decay p - lr u. A control makes that c decay p - a lr u, with one a and
one c per unit: a row of a matrix, or a matrix. What is no unit of it (norms and biases, unless it says otherwise) moves
as without a control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sharpwise.blocks import Segment

Over = Literal["row", "matrix"]
OVERS: tuple[Over, ...] = get_args(Over)


class Sums(NamedTuple):
    """Of every unit, fp64 [units], over all processes that hold a part of it.

    Attributes:
        uu, pu, pp: sums of u u, p u and p p (0 both, if the control scales only); p is the weight before the step, u
            the update in units of the learning rate (0 where that is 0), after bias correction and clipping.
        elements: how many these are.
    """

    uu: Tensor
    pu: Tensor
    pp: Tensor
    elements: Tensor


class Control:
    """Base of all controls. Concrete controls are frozen dataclasses; nothing concrete is overridden.

    A control is pure and knows no mesh, dtype or back end. Any of its sums may be 0: what it returns is finite then.

    Attributes:
        over: what a unit is: an output row, or a matrix (of a segment, of an expert).
        holds: whether the norm of every unit of that kind is held: that of the first step in which it is above
            `SMALLEST` per element, kept as the state `held_norm`.
        scales_only: it looks at u u alone, and c is always 1.
    """

    name: ClassVar[str]
    over: ClassVar[Over]
    holds: ClassVar[bool] = False
    scales_only: ClassVar[bool] = False

    @property
    def snr_samples(self) -> int:
        """Samples of a step, if `factors` reads `s["snr_factor"]`; else 0, and no gradient SNR is measured."""
        return 0

    def __str__(self) -> str:
        """Its spelling, with only what differs from the defaults."""
        own = [f for f in fields(self) if getattr(self, f.name) != f.default]  # type: ignore[arg-type]
        said = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in own)
        return f"{self.name}({said})" if said else self.name

    def unit(self, segments: Sequence[Segment]) -> Over | None:
        """What a unit is of segments of a parameter that move alike; "matrix" of vectors is all of a segment. None:
        they move as without a control."""
        return self.over if all(segment.is_matrix for segment in segments) else None

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """a >= 0 and c of every unit, fp64 [units].

        Args:
            s: of every unit, fp64 [units], `lr`, with its `multiplier`; `decay`, the factor of weight decay, and
                `weight_decay`, 0 where it is off; `held`, the norm that is held, 0 where there is none yet;
                `snr_factor`, that of `controls.snr` (1 where none is measured). For all:
                `over`, what a unit is; `peak`, the `initial_lr` of the group, or else the constructor's lr; `t`, the
                number of the step; of the rule `momentum`, `mean_square` and `turn`.
        """
        raise NotImplementedError(f"{self.name} has no factors")

    def remark(self, weight_decay: float) -> str:
        """What a user should know of it under this weight decay; "" if nothing."""
        return ""


SMALLEST = 1e-3
"""Root mean square of a unit whose norm is held: what begins at zero has to grow first."""


def held_norms(sums: Sums, held: Tensor) -> Tensor:
    """The norms that are held from this step on."""
    own = sums.pp.sqrt()
    return torch.where((held == 0) & (own > SMALLEST * sums.elements.sqrt()), own, held)


def bounded(control: Control, sums: Sums, s: Mapping[str, Any], holds: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What a control makes of units: factors on their rates, their factors of decay, and norms held from now on.

    Args:
        sums: with u in units of the weights, times the learning rate.
        s: as `Control.factors` is told, `held` as it was before the step; holds: whether norms are held.
    """
    per_lr = torch.where(s["lr"] != 0, s["lr"].reciprocal(), 0.0)
    own = Sums(sums.uu * per_lr * per_lr, sums.pu * per_lr, sums.pp, sums.elements)
    held = held_norms(own, s["held"]) if holds else s["held"]
    a, c = control.factors(own, {**s, "held": held})
    return a, c * s["decay"], held


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, 0 where below is 0."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)
