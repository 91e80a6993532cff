"""Several per-block learning rates at once: `SharpnessLR() * LayerDecay(rate=0.9)`.

m_s = product of the m_s of all factors
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, BlockLR, Measured
from sharpwise.block_lr.measured import MeasuredLR
from sharpwise.blocks import Segment


@dataclass(frozen=True)
class Product(BlockLR):
    """The product of the multipliers of two or more; usually written `a * b`.

    Decay is scaled with the product, unless one of them keeps it as it is ("base"). A floor holds for the product.

    Args:
        factors: block_lrs; products among them are taken apart.

    Raises:
        ValueError: less than two factors, or two with a floor.
    """

    decay: Literal["scaled", "base"] = field(init=False, repr=False)
    factors: tuple[BlockLR, ...]

    name: ClassVar[str] = "product"

    def __post_init__(self) -> None:
        given = self.factors if isinstance(self.factors, (tuple, list)) else (self.factors,)
        wrong = [factor for factor in given if not isinstance(factor, BlockLR)]
        if wrong:
            raise TypeError(f"{self.name}: expected BlockLRs, such as BlockwiseLR(), got {wrong[0]!r}")
        flat = [part for factor in given for part in (factor.factors if isinstance(factor, Product) else (factor,))]
        if len(flat) < 2:
            raise ValueError(f"{self.name}: it takes two factors or more, got {len(flat)}")
        if len(floors := [part for part in flat if part.follows_lr]) > 1:
            raise ValueError(f"{self.name}: one factor at most has a floor, got {', '.join(map(str, floors))}")
        object.__setattr__(self, "factors", tuple(flat))
        object.__setattr__(self, "decay", "base" if any(part.decay == "base" for part in flat) else "scaled")

    def __str__(self) -> str:
        return "*".join(map(str, self.factors))

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        own = [factor.multipliers(segments, measured) for factor in self.factors]
        return [prod(values) for values in zip(*own, strict=True)]

    def effective(self, multiplier: float, lr: float, peak: float) -> float:
        for factor in self.factors:
            multiplier = factor.effective(multiplier, lr, peak) if factor.follows_lr else multiplier
        return multiplier

    @property
    def by_role(self) -> bool:
        return any(factor.by_role for factor in self.factors)

    @property
    def parts(self) -> tuple[BlockLR, ...]:
        return self.factors

    @property
    def follows_lr(self) -> bool:
        return any(factor.follows_lr for factor in self.factors)

    @property
    def sources(self) -> tuple[MeasuredLR, ...]:
        return tuple(dict.fromkeys(source for factor in self.factors for source in factor.sources))

    def check(self, segments: Sequence[Segment]) -> None:
        for factor in self.factors:
            factor.check(segments)
