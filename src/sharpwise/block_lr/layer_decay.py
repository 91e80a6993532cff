"""Layer-wise learning rate decay (ULMFiT, arXiv 1801.06146; in this form BEiT, arXiv 2106.08254).

lr_B = rate^(L + 1 - depth) lr,   depth 0: embeddings;  l + 1: layer l of L;  L + 1: final norm and head
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, BlockLR, Measured, is_number
from sharpwise.blocks import BlockType, Segment


@dataclass(frozen=True)
class LayerDecay(BlockLR):
    """Multipliers that shrink from layer to layer towards the input.

    Args:
        rate: factor per layer, in (0, 1].
        decay: see `BlockLR`.
    """

    decay: Literal["scaled", "base"] = field(default="scaled", kw_only=True)
    rate: float = 0.75

    name: ClassVar[str] = "layer_decay"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.rate) or not 0.0 < self.rate <= 1.0:
            raise ValueError(f"{self.name}: rate must be in (0, 1], got {self.rate!r}")

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        layers = 1 + max((s.layer for s in segments if s.layer is not None), default=-1)
        return [self.rate ** (layers + 1 - _depth(segment, layers)) for segment in segments]


def _depth(segment: Segment, layers: int) -> int:
    if segment.layer is not None:
        return segment.layer + 1
    return 0 if segment.block_type == BlockType.EMB else layers + 1
