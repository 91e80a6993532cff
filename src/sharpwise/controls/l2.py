"""L2, the control of LionA: updates of one norm (Kosson et al., "Analyzing and Reducing the Need for Learning Rate
Warmup in GPT Training", arXiv 2410.23922).

    p <- p (1 - lr wd) - lr s u / |u|,    s = sqrt(n (1-b) / (1+b))

n is how many elements there are, b the momentum: s is the norm that AdamW's update has in the long run, for gradients
that are independent, so that its lr and weight decay serve. A unit is a matrix (of a segment, of an expert), or a
vector. What is all zeros stays.

Departs: the paper's code was not released. The form of s, and `inverse_bias_correction`, which multiplies s by 1 - b^t
(the first steps, whose momentum is small, are small again), are from descriptions of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.blocks import Segment
from sharpwise.controls.base import Control, Over, Sums, ratio


@dataclass(frozen=True, kw_only=True)
class L2(Control):
    """Updates of one l2 norm, whatever the rule.

    Args:
        inverse_bias_correction: multiply it by 1 - b^t in step t.
    """

    inverse_bias_correction: bool = False

    name: ClassVar[str] = "l2"
    over: ClassVar[Over] = "matrix"

    def __post_init__(self) -> None:
        check_flag(self, "inverse_bias_correction")

    def unit(self, segments: Sequence[Segment]) -> Over | None:
        return "matrix"

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return at_size(sums, s) * (begun(s) if self.inverse_bias_correction else 1.0), torch.ones_like(sums.uu)


def at_size(sums: Sums, s: Mapping[str, Any]) -> Tensor:
    """The factor that gives updates the norm sqrt(n (1-b) / (1+b))."""
    return ratio((sums.elements * s["mean_square"]).sqrt(), sums.uu.sqrt())


def begun(s: Mapping[str, Any]) -> Any:
    """1 - b^t: how much of the momentum there is in step t."""
    return 1 - s["momentum"] ** s["t"]


def check_flag(control: Control, name: str) -> None:
    """Raise TypeError unless it is True or False."""
    if not isinstance(getattr(control, name), bool):
        raise TypeError(f"{control.name}: {name} must be True or False, got {getattr(control, name)!r}")
