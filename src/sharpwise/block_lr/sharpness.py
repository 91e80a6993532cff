"""SharpnessLR: learning rates by the sharpness of the blocks, measured while training (after arXiv 2502.19002).

    r_b = clip((S_ref / S_b)^power, 1, max_ratio)

S_b is the mean of the diagonal of the Fisher matrix over block b, S_ref that of the reference type, the norms. With
power 0.6 the sharpnesses that the paper measured in a LLaMA give close to its 10, 8, 6, 4, 1.

- `source="second_moment"`: S_b is proportional to the mean of v / (1 - b2^t), which AdamW and Adam-mini keep: free.
- `source="probe"`: `sharpwise.probes.sharpness` with labels drawn from the model, on batches that are given.

Over the measurements log S of every segment is averaged with weights `ema`: log S <- ema log S + (1 - ema) log S_now;
S_b of a type is the mean over the elements of what its segments then have.

| symbol | name |
|---|---|
| S_b | measured |
| r_b | multipliers |

Departs: the paper measures once, by hand, and takes five fixed ratios. The position embedding is a type of its own.
The order of the S_b settles after about 2% of the steps only, so that nothing is measured before. Five fixed ratios of
a model of one's own: `sharpwise.probes.calibrate`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, Measured, Source, is_number
from sharpwise.block_lr.blockwise import BY_TYPE, argument_of
from sharpwise.block_lr.measured import PhasedLR
from sharpwise.blocks import BlockType, Segment
from sharpwise.blocks.roles import meant


@dataclass(frozen=True, kw_only=True)
class SharpnessLR(PhasedLR):
    """Multipliers that follow the measured sharpness of the blocks.

    Args:
        power: of the ratio of sharpnesses, >= 0.
        max_ratio: largest multiplier, >= 1; the smallest is 1.
        source: "second_moment" (of AdamW and Adam-mini), or "probe", for which the optimizer needs `probe_batches=`.
        by: one multiplier per "type" of block, or per "module", that is for every segment.
        reference: the block type that has multiplier 1 per type.
        start, stop, every, soft: when; see `PhasedLR`.
        ema: weight of what was measured before, in [0, 1).
        decay: see `BlockLR`.
    """

    power: float = 0.6
    max_ratio: float = 10.0
    source: Literal["second_moment", "probe"] = "second_moment"
    by: Literal["type", "module"] = "type"
    reference: str = "Norm"
    start: float = 0.02
    every: int = 200
    soft: int | None = 10
    ema: float = 0.5

    name: ClassVar[str] = "sharpness"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least, below in (("power", 0.0, math.inf), ("max_ratio", 1.0, math.inf), ("ema", 0.0, 1.0)):
            value = getattr(self, key)
            if not is_number(value) or not least <= value < below:
                raise ValueError(f"{self.name}: {key} must be a number in [{least:g}, {below:g}), got {value!r}")
        for key, allowed in (
            ("source", ("second_moment", "probe")),
            ("by", ("type", "module")),
            ("reference", tuple(map(str, BlockType))),
        ):
            if (value := getattr(self, key)) not in allowed:
                hint = meant(value, allowed)
                raise ValueError(f"{self.name}: {key} must be one of {', '.join(allowed)}, got {value!r}{hint}")

    @property
    def measures(self) -> Source:
        return self.source

    def updated(self, before: float, now: float) -> float:
        if not 0.0 < now < math.inf:
            return before
        if math.isnan(before):
            return now
        mean = before**self.ema * now ** (1 - self.ema)
        return min(max(mean, min(before, now)), max(before, now))  # rounding may lead out of the range of floats

    def remarks(self, segments: Sequence[Segment], values: Sequence[float]) -> str | None:
        known = {s.block_type for s, value in zip(segments, values, strict=True) if not math.isnan(value)}
        if not known or self.reference in known:
            return None
        there = ", ".join(sorted(map(str, known)))
        return f"all multipliers are 1: the optimizer moves no {self.reference}; reference={there}?"

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        values = measured.get(self, [math.nan] * len(segments))
        kinds = [argument_of(segment) for segment in segments]
        known = [
            (kind, value, segment)
            for kind, value, segment in zip(kinds, values, segments, strict=True)
            if not math.isnan(value) and not segment.frozen
        ]
        means = {kind: _mean([(v, s) for k, v, s in known if k == kind]) for kind in dict.fromkeys(kinds)}
        reference = means.get(BY_TYPE[BlockType(self.reference)], math.nan)
        own = values if self.by == "module" else [means[kind] for kind in kinds]
        return [self.ratio(reference, value) for value in own]

    def ratio(self, reference: float, sharpness: float) -> float:
        """The multiplier of a block of this sharpness; 1 where one of the two is NaN."""
        if math.isnan(reference) or math.isnan(sharpness):
            return 1.0
        log_ratio = self.power * (math.log(reference) - math.log(sharpness))
        return self.max_ratio if log_ratio >= math.log(self.max_ratio) else math.exp(max(log_ratio, 0.0))

    def check(self, segments: Sequence[Segment]) -> None:
        trained = [segment for segment in segments if not segment.frozen]
        there = dict.fromkeys(str(segment.block_type) for segment in trained)
        if trained and self.reference not in there:
            raise ValueError(
                f"{self.name}: ratios are relative to the sharpness of {self.reference}, which no trained parameter "
                f"of this model is; reference must be one of {', '.join(there)}"
            )


def _mean(values: Sequence[tuple[float, Segment]]) -> float:
    """The mean over elements; NaN of nothing. Scaled, as the sum of many large ones may have no double."""
    scale = max((value for value, _ in values), default=math.nan)
    total = sum(segment.numel for _, segment in values)
    if math.isnan(scale) or not total:
        return math.nan
    return scale * (math.fsum(value / scale * segment.numel for value, segment in values) / total)
