"""Blockwise LR: The Sharpness Disparity Principle in Transformers (Wang et al., arXiv 2502.19002).

    lr_B = m_B lr,   m = 10 (Emb), 8 (QK), 6 (FFN), 4 (VO), 1 (Norm)

With a floor, all blocks end at the same absolute learning rate (as in the authors' scripts):

    lr_B = floor + (m_B peak - floor) (lr - floor) / (peak - floor)        peak: the largest lr so far

| symbol | name |
|---|---|
| m_B | emb, qk, ffn, vo, norm, head, pos_emb, other |

Departs: the untied output head and the position embedding are separate types at 1, as in the authors' scripts (the
paper names five types). At and below the floor every block follows lr itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

from sharpwise.block_lr.base import NOTHING, BlockLR, Measured, is_number
from sharpwise.blocks import BlockType, Role, Segment

BY_TYPE = {
    BlockType.EMB: "emb",
    BlockType.QK: "qk",
    BlockType.FFN: "ffn",
    BlockType.VO: "vo",
    BlockType.NORM: "norm",
    BlockType.HEAD: "head",
    BlockType.OTHER: "other",
}

KINDS = (*BY_TYPE.values(), "pos_emb")
"""The arguments that are multipliers."""


@dataclass(frozen=True, kw_only=True)
class BlockwiseLR(BlockLR):
    """Multipliers by block type.

    Args:
        emb, qk, ffn, vo, norm, head, pos_emb, other: multipliers, > 0; the defaults are the paper's.
        floor: None (each block anneals to the same fraction of its own peak) or the absolute learning rate at which
            all blocks end.
        decay: see `BlockLR`.

    >>> BlockwiseLR(emb=1).effective(6.0, lr=1e-3, peak=1e-3)
    6.0
    """

    emb: float = 10.0
    qk: float = 8.0
    ffn: float = 6.0
    vo: float = 4.0
    norm: float = 1.0
    head: float = 1.0
    pos_emb: float = 1.0
    other: float = 1.0
    floor: float | None = None

    name: ClassVar[str] = "blockwise"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "decay" or (field.name == "floor" and value is None):
                continue
            zero = field.name == "floor"
            if not is_number(value) or not (0.0 < value < float("inf") or (zero and value == 0)):
                sign = ">=" if zero else ">"
                raise ValueError(f"{self.name}: {field.name} must be a finite number {sign} 0, got {value!r}")

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        return [float(getattr(self, argument_of(segment))) for segment in segments]

    def effective(self, multiplier: float, lr: float, peak: float) -> float:
        if self.floor is None or lr >= peak > 0:
            return multiplier
        if lr <= self.floor:
            return 1.0
        rest = (lr - self.floor) / (peak - self.floor)
        return (self.floor + (multiplier * peak - self.floor) * rest) / lr

    @property
    def follows_lr(self) -> bool:
        return self.floor is not None


def argument_of(segment: Segment) -> str:
    """Which of the arguments of BlockwiseLR a segment goes by: its block type, or "pos_emb"."""
    return "pos_emb" if segment.role == Role.POS_EMB else BY_TYPE[segment.block_type]
