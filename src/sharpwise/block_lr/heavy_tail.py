"""HeavyTailLR: layerwise learning rates by the tails of the weight spectra (LLR, He et al., arXiv 2605.22297).

    m_W = s1 + (s2 - s1) (alpha_W - min alpha) / (max alpha - min alpha)        over all matrices W of the model

alpha is PL_Alpha_Hill of the eigenvalues of W^T W (`sharpwise.block_lr.tail`): a light tail, a large alpha, a large
learning rate. Embeddings and the output head have s2 without a spectrum, norms and biases 1. Measured from the first
step on, every 100 steps until a fifth of the training; there in 50 steps each, and frozen at the end.

| symbol | name |
|---|---|
| s1, s2 | low, high |
| alpha_W | measured |

At initialization, and for long, alpha is nothing but the shape of the matrix: 2.12 where it is square, 3.45 at an
aspect of 4. `shape_corrected=True` subtracts that of a random matrix of the same shape. What is left at initialization
is then noise, which the mapping spreads over all of s1 to s2; start it later, where that matters.

Departs: fused matrices are taken by segment, experts by the mean of their alphas. Matrices without an alpha (fewer than
50 eigenvalues, half of them zero, all alike) have 1, and no part in min and max. The released code leaves those of
fewer than 50 eigenvalues at 1 too, but only after the embedding and the head were given the largest alpha of all,
theirs included, and these two stay in its scale: where a small matrix (a router, a projection to few rows) has the
largest alpha, no other matrix there reaches s2, and all are nearer to s1 than here. The released code also averages the
learning rate, not the multiplier, over the 50 steps, which differs by the slope of the schedule, and drops the
measurement at its last step.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sharpwise.block_lr.base import NOTHING, Measured, Source, check_choices, is_number
from sharpwise.block_lr.measured import PhasedLR
from sharpwise.block_lr.tail import Convention, Spectrum, alpha_hill, alpha_of_random
from sharpwise.blocks import BlockType, Segment

_CHOICES = {
    "normalize": ("none", "geometric"),
    "by": ("matrix", "type"),
    "convention": ("hill", "published"),
    "shape_corrected": (False, True),
}


@dataclass(frozen=True, kw_only=True)
class HeavyTailLR(PhasedLR):
    """Multipliers by the heaviness of the spectrum of each matrix.

    Args:
        low, high: smallest and largest multiplier, s1 and s2: > 0.
        shape_corrected: subtract the alpha of a random matrix of the same shape.
        normalize: "none" (as published: no multiplier is below `low`), or "geometric": divided by the geometric mean of
            those of matrices, embeddings and head, so that it is 1.
        by: one multiplier per "matrix", or per "type", by the mean of its alphas.
        convention: of alpha, "hill" or "published"; see `sharpwise.block_lr.tail`.
        least: eigenvalues that a matrix needs to have an alpha, >= 2.
        start, stop, every, soft: when; see `PhasedLR`. stop=0: the weights as they are initialized, for ever.
        decay: see `BlockLR`.
    """

    low: float = 1.0
    high: float = 5.0
    shape_corrected: bool = False
    normalize: Literal["none", "geometric"] = "none"
    by: Literal["matrix", "type"] = "matrix"
    convention: Convention = "hill"
    least: int = 50
    stop: float | None = 0.2
    soft: int | None = 50

    name: ClassVar[str] = "llr"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("low", "high"):
            value = getattr(self, key)
            if not is_number(value) or not 0.0 < value < math.inf:
                raise ValueError(f"{self.name}: {key} must be a finite number > 0, got {value!r}")
        if type(self.least) is not int or self.least < 2:
            raise ValueError(f"{self.name}: least must be a whole number >= 2, got {self.least!r}")
        check_choices(self, _CHOICES)

    @property
    def measures(self) -> Source:
        return "matrix"

    def reads(self, segment: Segment) -> bool:
        return segment.is_matrix and segment.block_type not in (BlockType.EMB, BlockType.HEAD, BlockType.NORM)

    def of_matrices(self, matrices: Iterable[Tensor]) -> float:
        """Mean alpha of the matrices of a segment, less those of random ones if asked for; NaN where one has none."""
        found = []
        for matrix in matrices:
            spectrum = Spectrum.of(matrix) if min(matrix.shape) >= self.least else None
            alpha = None if spectrum is None else alpha_hill(spectrum.scaled, self.convention)
            if alpha is None or not math.isfinite(alpha):
                return math.nan
            random = alpha_of_random(*matrix.shape, self.convention) if self.shape_corrected else 0.0
            found.append(alpha - random)
        return math.fsum(found) / len(found) if found else math.nan

    def updated(self, before: float, now: float) -> float:
        return now

    def remarks(self, segments: Sequence[Segment], values: Sequence[float]) -> str | None:
        none = [s.name for s, alpha in zip(segments, values, strict=True) if math.isnan(alpha) and self.reads(s)]
        names = ", ".join(dict.fromkeys(none))
        return f"multiplier 1 for what has too few eigenvalues, or no tail: {names}" if none else None

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        values = list(measured.get(self, [math.nan] * len(segments)))
        if self.by == "type":
            values = _means_by_type(values, segments)
        known = [a for a, segment in zip(values, segments, strict=True) if not math.isnan(a) and not segment.frozen]
        if not known:
            return [1.0] * len(segments)
        low, high = min(known), max(known)
        found = [self._multiplier(a, segment, low, high) for a, segment in zip(values, segments, strict=True)]
        if self.normalize == "geometric":
            logs = [math.log(m) for m, s in zip(found, segments, strict=True) if m is not None and not s.frozen]
            mean = math.exp(math.fsum(logs) / len(logs)) if logs else 1.0
            found = [None if m is None else m / mean for m in found]
        return [1.0 if m is None else m for m in found]

    def _multiplier(self, alpha: float, segment: Segment, least: float, most: float) -> float | None:
        """None for what has none of its own: norms, biases, matrices without an alpha."""
        if segment.block_type in (BlockType.EMB, BlockType.HEAD) and not segment.bias:
            return self.high
        if math.isnan(alpha):
            return None
        share = (min(max(alpha, least), most) - least) / (most - least) if most > least else 0.0
        return self.high if share == 1.0 else self.low + (self.high - self.low) * share  # exact at both ends


def _means_by_type(values: Sequence[float], segments: Sequence[Segment]) -> list[float]:
    """For every segment that has a value the mean of those of its type."""
    known: dict[BlockType, list[float]] = {}
    for value, segment in zip(values, segments, strict=True):
        if not math.isnan(value) and not segment.frozen:
            known.setdefault(segment.block_type, []).append(value)
    means = {kind: math.fsum(own) / len(own) for kind, own in known.items()}
    return [
        math.nan if math.isnan(value) else means.get(segment.block_type, math.nan)
        for value, segment in zip(values, segments, strict=True)
    ]
