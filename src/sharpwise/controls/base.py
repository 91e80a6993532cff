"""What a control is: how large the update of a row or of a matrix may be, from a few sums over it.

A rule says where to go, u, and would move p to decay p - lr u. A control makes that c decay p - a lr u, with one a and
one c per unit: a row of a matrix, or a matrix. Vectors (norms, biases) move as without a control.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from torch import Tensor

Over = Literal["row", "matrix"]
OVERS: tuple[Over, ...] = get_args(Over)


class Sums(NamedTuple):
    """Of every unit, fp64 [units], over all processes that hold a part of it.

    Attributes:
        uu, pu, pp: sums of u u, p u and p p; p is the weight before the step, u the update in units of the learning
            rate (0 where that is 0), after bias correction and clipping.
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
    """

    name: ClassVar[str]
    over: ClassVar[Over]

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """a >= 0 and c of every unit, fp64 [units].

        Args:
            s: of every unit `lr`, with its multiplier, and `decay`, the factor of weight decay: fp64 [units].
        """
        raise NotImplementedError(f"{self.name} has no factors")
