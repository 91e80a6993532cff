"""AuxLR: what is no hidden matrix at a rate of its own, as a ratio to that of the matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, BlockLR, Measured
from sharpwise.blocks import Segment


@dataclass(frozen=True)
class AuxLR(BlockLR):
    """1 for hidden matrices, `ratio` for embeddings, head, router, norms, biases and what no source explains.

    What the option `aux_lr` of an optimizer becomes: kept as a ratio, so that a schedule of lr moves both.

    Args:
        ratio: lr of the others over lr, >= 0.
        decay: see `BlockLR`.
    """

    decay: Literal["scaled", "base"] = field(default="scaled", kw_only=True)
    ratio: float = 1.0

    name: ClassVar[str] = "aux_lr"

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        return [1.0 if segment.is_hidden_matrix else self.ratio for segment in segments]
