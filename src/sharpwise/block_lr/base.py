"""How far, per block: a multiplier of the learning rate for every segment."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sharpwise.blocks import Segment


@dataclass(frozen=True)
class BlockLR:
    """Base of all per-block learning rates.

    Args:
        decay: "scaled" multiplies decoupled decay with the multiplier as well (lr * multiplier * wd), as published;
            "base" keeps lr * wd for every block.
    """

    decay: Literal["scaled", "base"] = "scaled"

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.decay not in ("scaled", "base"):
            raise ValueError(f"{self.name}: decay must be 'scaled' or 'base', got {self.decay!r}")

    def multipliers(self, segments: Sequence[Segment]) -> list[float]:
        """One multiplier >= 0 per segment of the whole model."""
        raise NotImplementedError

    def effective(self, multiplier: float, lr: float, peak: float) -> float:
        """The multiplier at a learning rate, `peak` being the largest one seen so far."""
        return multiplier

    @property
    def follows_lr(self) -> bool:
        """Whether `effective` depends on the learning rate."""
        return False
