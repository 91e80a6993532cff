"""A bound on the root mean square of the update of a matrix, as Adafactor has it (arXiv 1804.04235, section 6).

u <- min(1, limit / rms(u)) u        rms over a matrix, u in units of the learning rate
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.controls.base import Control, Over, Sums


@dataclass(frozen=True)
class RMSClip(Control):
    """The update of no matrix has a root mean square above `limit`, in units of the learning rate.

    Args:
        limit: the largest root mean square, above 0.
    """

    limit: float = 1.0

    name: ClassVar[str] = "rms-clip"
    over: ClassVar[Over] = "matrix"
    scales_only: ClassVar[bool] = True

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        most = self.limit * self.limit * sums.elements
        above = sums.uu > most
        return torch.where(above, (most / torch.where(above, sums.uu, 1.0)).sqrt(), 1.0), torch.ones_like(sums.uu)


def check_clip(who: str, clip: Any) -> RMSClip | None:
    """The control of updates for this bound; None for none.

    Raises:
        TypeError, ValueError: unless it is a finite number above 0, or None.
    """
    if clip is None:
        return None
    if isinstance(clip, bool) or not isinstance(clip, Real):
        raise TypeError(f"{who}: clip must be a number > 0, or None, got {clip!r}")
    if not 0.0 < float(clip) < math.inf:
        raise ValueError(f"{who}: clip must be a finite number > 0, or None, got {clip!r}")
    return RMSClip(float(clip))
