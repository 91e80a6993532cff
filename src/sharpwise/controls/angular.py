"""Angular, the control of LionAR: every row of a matrix turns by a set angle, and its norm is held (Kosson et al.,
arXiv 2410.23922; "Rotational Equilibrium", arXiv 2305.17212).

    u' = u - (p.u / p.p) p                                      what of the update turns the row
    p  <- cos(theta) p - sin(theta) |p| u' / |u'|               exactly by theta, and then to the norm that is held
    theta = (lr / peak) sqrt(2 peak wd (1-b) / (1+b)) m         "linear"

b is the momentum, m the multiplier, peak the `initial_lr` of the group (a scheduler sets it) or else the constructor's
lr; where that was 0, lr as it is: theta is the angle at which AdamW's rows turn in the long run, so that its lr and
weight decay serve. "sqrt" has the root of lr / peak, as that angle would follow a schedule; with "lr", lr is the angle
in radians. Of Lion (1-b)/(1+b) becomes (pi/2) ((1-b1)^2 + b1^2 (1-b2)/(1+b2)).

With `snr`, theta is multiplied by the factor of `controls.snr`, of the matrix that the row is in, and so is the norm of
updates of rows that are not held yet.

Nothing that is held decays; vectors have updates as under `L2`, and decay. So have rows without a norm to hold yet
(those that begin at zero, until their root mean square is above 1e-3) and, where the angle comes from the weight
decay, those that have none. A row whose update points along it does not turn.

Departs: the paper's code was not released; per row and this angle follow the authors' earlier code, but the angle of
each step is exact, where that bounds a running mean.

| symbol | name | shape |
|---|---|---|
| norm that is held | held_norm | [rows] |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sharpwise.blocks import Segment
from sharpwise.controls.base import Control, Over, Sums, ratio
from sharpwise.controls.l2 import at_size, begun, check_flag

Angle = Literal["linear", "sqrt", "lr"]
PARALLEL = 1e-10
"""Of the square of an update, what of it turns a row at the least: below is rounding."""


@dataclass(frozen=True, kw_only=True)
class Angular(Control):
    """Rows that turn by a set angle and keep their norms; vectors as under `L2`.

    Args:
        angle: "linear", "sqrt" or "lr".
        inverse_bias_correction: multiply angles and norms by 1 - b^t in step t.
        snr: multiply angles by the factor of the gradient SNR of the matrix; the rule has to keep a momentum.
        batch_size: sequences of a step, of all processes together; for `snr`.
    """

    angle: Angle = "linear"
    inverse_bias_correction: bool = False
    snr: bool = False
    batch_size: int | None = None

    name: ClassVar[str] = "angular"
    over: ClassVar[Over] = "row"
    holds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_flag(self, "inverse_bias_correction")
        check_flag(self, "snr")
        if self.angle not in get_args(Angle):
            raise ValueError(f"{self.name}: angle must be one of {', '.join(get_args(Angle))}, got {self.angle!r}")
        if self.batch_size is None:
            if self.snr:
                raise ValueError(
                    f"{self.name}: snr=True needs batch_size, the sequences of a step over all processes and "
                    f"accumulated micro-batches, such as {self.name}(snr=True, batch_size=480)"
                )
        elif type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"{self.name}: batch_size must be a whole number >= 1, got {self.batch_size!r}")
        elif not self.snr:
            raise ValueError(f"{self.name}: batch_size={self.batch_size} is for snr=True; give both or none")

    @property
    def snr_samples(self) -> int:
        return self.batch_size or 0

    def unit(self, segments: Sequence[Segment]) -> Over | None:
        long = all(segment.is_matrix and segment.numel > segment.rows * segment.copies for segment in segments)
        return "row" if long else "matrix"

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        begins = (begun(s) if self.inverse_bias_correction else 1.0) * s["snr_factor"]
        free = at_size(sums, s) * begins, torch.ones_like(sums.uu)
        if s["over"] != "row":
            return free
        theta, turning = self._angle(s), sums.uu - ratio(sums.pu * sums.pu, sums.pp)
        turning = torch.where(turning > PARALLEL * sums.uu, turning, 0.0)
        theta = torch.where(turning > 0, theta * begins, 0.0)
        k = ratio(theta.sin() * sums.pp.sqrt(), turning.sqrt())
        back = ratio(s["held"], sums.pp.sqrt())
        a, c = ratio(k * back, s["lr"]), (theta.cos() + k * ratio(sums.pu, sums.pp)) * back / s["decay"]
        holds = (s["held"] > 0) & (s["lr"] > 0)
        holds = holds if self.angle == "lr" else holds & (s["weight_decay"] > 0)
        return torch.where(holds, a, free[0]), torch.where(holds, c, free[1])

    def remark(self, weight_decay: float) -> str:
        if self.angle == "lr":
            return "rows that are held do not decay: weight_decay is for vectors alone" if weight_decay else ""
        none = f"angle='{self.angle}' comes from weight_decay, which is 0: rows do not turn, and move as under 'l2'; "
        return "" if weight_decay else f"{none}give a weight_decay, about 0.1, or control='angular(angle=lr)'"

    def _angle(self, s: Mapping[str, Any]) -> Tensor:
        lr, peak = s["lr"], 0 * s["lr"] + s["peak"]
        peak = torch.where(peak > 0, peak, ratio(lr, s["multiplier"]))
        if self.angle == "lr":
            return lr
        at_peak = (2 * peak * s["weight_decay"] * s["mean_square"]).sqrt() * s["turn"]
        if self.angle == "sqrt":
            return at_peak * ratio(lr * s["multiplier"], peak).sqrt()
        return at_peak * ratio(lr, peak)
