"""GradientSNR, the scaling of SGD-SaI (Xu et al., No More Adam: Learning Rate Scaling at Initialization is All You
Need, arXiv 2412.11768).

    s_B = min(||g_B|| / std(g_B), 10 sqrt(n_B))        at the first gradient of B that is not zero, and for ever after

std is the root of the mean squared deviation from the mean. Of a gradient with mean 0, s is sqrt(n): most of what it
says is the size of the tensor.

| symbol | name |
|---|---|
| s_B | measured |
| n_B | segment.numel |

With `SGD(momentum=0.9, dampening=0.9)` and decay that does not follow it, this is SGD-SaI: `sharpwise.SGDSaI`.

Departs: the released code divides by std + 1e-8, in the unit of the gradient, reduces in fp32, takes whole tensors,
also fused ones, and the deviation with n - 1. There a tensor of one element explodes, a zero first gradient freezes a
tensor for ever, and a resumed run measures again; here one element has s = 1, a zero gradient waits for the next, and
all is saved. `normalize="max"` is the paper's Algorithm 1, `s / max s`, which the release left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, Measured, MeasuredLR, Source
from sharpwise.blocks import Segment

CAP = 10.0


@dataclass(frozen=True, kw_only=True)
class GradientSNR(MeasuredLR):
    """Multipliers by the signal-to-noise ratio of the first gradient, around sqrt(elements).

    Args:
        normalize: "none" (as released), or "max": the largest multiplier becomes 1, that of gradients seen so far.
        decay: see `BlockLR`; "base" here, as lr is small where s is large.
    """

    decay: Literal["scaled", "base"] = "base"
    normalize: Literal["none", "max"] = "none"

    name: ClassVar[str] = "gradient_snr"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalize not in ("none", "max"):
            raise ValueError(f"{self.name}: normalize must be 'none' or 'max', got {self.normalize!r}")

    @property
    def by_role(self) -> bool:
        return False

    @property
    def measures(self) -> Source:
        return "gradient"

    @property
    def waits(self) -> bool:
        return True

    def of_gradient(self, count: int, total: float, squares: float) -> float:
        return signal_to_noise(count, total, squares)

    def updated(self, before: float, now: float) -> float:
        return now if math.isnan(before) else before

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        values = measured.get(self, [math.nan] * len(segments))
        known = [s for s, segment in zip(values, segments, strict=True) if not math.isnan(s) and not segment.frozen]
        largest = max(known, default=1.0) if self.normalize == "max" else 1.0
        return [1.0 if math.isnan(s) else s / largest for s in values]


def signal_to_noise(count: int, total: float, squares: float) -> float:
    """s of `count` elements with this sum and this sum of squares; NaN of a gradient that is zero, or not finite."""
    if not 0.0 < squares < math.inf:
        return math.nan
    if count == 1:
        return 1.0
    variance = max(squares / count - (total / count) ** 2, 0.0)
    cap = CAP * math.sqrt(count)
    return cap if variance * cap * cap <= squares else math.sqrt(squares / variance)
