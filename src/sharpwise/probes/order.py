"""What a measured sharpness says: the order of the block types, and the learning rates that it suggests."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sharpwise.block_lr import SharpnessLR
from sharpwise.blocks import BlockType
from sharpwise.probes.estimate import Estimate, Measurement

ORDER = ((BlockType.EMB, BlockType.QK), (BlockType.QK, BlockType.FFN), (BlockType.FFN, BlockType.VO),
         (BlockType.VO, BlockType.NORM))  # fmt: skip
"""Emb << QK < FFN < VO << Norm (arXiv 2502.19002): pairs, the flatter first."""
RATIOS = {BlockType.EMB: "emb", BlockType.QK: "qk", BlockType.FFN: "ffn", BlockType.VO: "vo", BlockType.HEAD: "head"}
MEANS = ("sharpness", "sharpness, geometric mean")


@dataclass(frozen=True)
class Relation:
    """Whether one type is flatter than another: `ratio` of the sharper to the flatter, and what its interval says."""

    flatter: str
    sharper: str
    ratio: float
    low: float
    high: float

    @property
    def holds(self) -> Literal["yes", "no", "open"]:
        """Whether the interval lies above 1, below 1, or holds it."""
        return "yes" if self.low > 1 else "no" if self.high < 1 else "open"


def relations(measurement: Measurement, quantity: str = "sharpness") -> list[Relation]:
    """The relations of the paper, of the types that the model has.

    The interval of a ratio is from the ends of the two intervals: wider than 95%, as both would have to be wrong.
    """
    found = {e.of: e for e in measurement.select(quantity=quantity, by="type")}
    pairs = [(found[a], found[b]) for a, b in ORDER if a in found and b in found]
    return [_relation(a, b) for a, b in pairs if a.value > 0]


def ranking(measurement: Measurement, quantity: str = "sharpness") -> list[Relation]:
    """Each type and the next sharper one, as they were measured, the flattest first; types of sharpness 0 have none."""
    found = sorted(measurement.select(quantity=quantity, by="type"), key=lambda e: e.value)
    return [_relation(a, b) for a, b in pairwise(e for e in found if e.value > 0)]


def _relation(a: Estimate, b: Estimate) -> Relation:
    low_a, high_a = _ends(a)
    low_b, high_b = _ends(b)
    return Relation(a.of, b.of, b.value / a.value, low_b / high_a, high_b / low_a if low_a > 0 else float("inf"))


def _ends(e: Estimate) -> tuple[float, float]:
    error = float("inf") if e.error is None else e.error
    return max(e.value - error, 0.0), e.value + error


def suggested_ratios(measurement: Measurement, *, power: float = 0.6, cap: float = 10.0) -> dict[str, float]:
    """Arguments of `BlockwiseLR`: (S_Norm / S_b) ** power, between 1 and `cap`, to two digits.

    Raises:
        ValueError: the model has no norms, or one of its types has no sharpness.
    """
    found = {e.of: e.value for e in measurement.select(quantity="sharpness", by="type")}
    reference = found.get(BlockType.NORM, 0.0)
    if not reference > 0:
        raise ValueError(f"ratios are relative to the sharpness of norms; measured were {', '.join(found) or 'none'}")
    flat = [name for name, value in found.items() if name in RATIOS and not value > 0]
    if flat:
        raise ValueError(f"no ratio follows from a sharpness of 0, as that of {', '.join(flat)}")
    ratio = SharpnessLR(power=power, max_ratio=cap).ratio
    return {RATIOS[BlockType(name)]: float(f"{ratio(reference, s):.2g}") for name, s in found.items() if name in RATIOS}


def as_block_lr(ratios: Mapping[str, float]) -> str:
    """The ratios as code."""
    return f"BlockwiseLR({', '.join(f'{name}={value:g}' for name, value in ratios.items())})"
