"""Ablations: is it these multipliers on these blocks, or would a larger step do as well? Each wraps any block_lr.

m_s is the multiplier that `of` gives to segment s, n_s the elements of s, v_1 < ... < v_k the distinct m_s; all of
them over the whole model, whatever the groups and shards, without what is frozen. The multiplier of segment s becomes

    MeanMatched   m = sum_s n_s m_s / sum_s n_s                        the mean step of `of`, the same for all blocks
    Reversed      v_(k+1-i)  where m_s = v_i                           what had the largest gets the smallest, and so on
    Shuffled      v_(p(i))   where m_s = v_i                           p: a permutation of 1..k, of seed and k alone
    Only          m_s        where type or role of s is in `types`     1 elsewhere

`Reversed` of `BlockwiseLR()`, tied head: Emb 10 -> 1, QK 8 -> 4, FFN 6 -> 6, VO 4 -> 8, Norm 1 -> 10. Segments with
equal multipliers keep equal ones.

p is uniform over the permutations that leave nothing in its place (the nearly sorted ones would tell little): p(r) is
the i of rank r by SHA-256 of "seed/attempt/k/i", attempt = 0, 1, ... until p(i) != i for every i. It depends on how
many values there are and not on what they are: arms of one seed shuffle alike, and the last bit of a power does not
matter.

| symbol | name |
|---|---|
| m_s | of.multipliers |
| n_s | segment.numel |
| p | _permutation |

Units: none, factors on lr. Only MeanMatched keeps the mean step; Reversed and Shuffled change it, as values meet other
numbers of elements. How a multiplier follows the learning rate, and whether it scales decay, is as in `of`. A floor is
affine in the multiplier, so that means match at every learning rate. Where multipliers follow a measurement, those that
it leads to are changed, and reached as smoothly as without the ablation. Frozen is what was so when the block map was
made: the base weights of a LoRA model take no steps, and would drown the adapters in the mean. Should they be thawed,
`MeanMatched` treats them like all others, `Reversed` and `Shuffled` as far as their multipliers are among the v_i.
"""

import hashlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, BlockLR, Measured, MeasuredLR
from sharpwise.blocks import BlockType, Role, Segment
from sharpwise.blocks.roles import meant
from sharpwise.hints import kind_of

TYPES: tuple[str, ...] = (*map(str, BlockType), *map(str, Role))
"""What `Only` takes: block types, then roles."""


@dataclass(frozen=True)
class Ablation(BlockLR):
    """Base of all ablations: another block_lr with its multipliers changed, and everything else as it is there.

    Args:
        of: the block_lr.
    """

    decay: Literal["scaled", "base"] = field(init=False, repr=False)
    of: BlockLR

    def __post_init__(self) -> None:
        of: object = self.of
        if not isinstance(of, BlockLR):
            what = kind_of(of) if isinstance(of, type) else repr(of)
            raise TypeError(f"{self.name}: expected a BlockLR, such as BlockwiseLR(), got {what}")
        object.__setattr__(self, "decay", self.of.decay)

    def effective(self, multiplier: float, lr: float, peak: float) -> float:
        return self.of.effective(multiplier, lr, peak)

    @property
    def follows_lr(self) -> bool:
        return self.of.follows_lr

    @property
    def by_role(self) -> bool:
        return self.of.by_role or isinstance(self, Only)

    @property
    def sources(self) -> tuple[MeasuredLR, ...]:
        return self.of.sources

    def check(self, segments: Sequence[Segment]) -> None:
        self.of.check(segments)


@dataclass(frozen=True)
class MeanMatched(Ablation):
    """The mean multiplier of `of` for every block.

    The mean is weighted with the elements.

    Args:
        of: the block_lr.
    """

    name: ClassVar[str] = "mean_matched"

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        own = self.of.multipliers(segments, measured)
        sizes = [0 if s.frozen else s.numel for s in segments]
        total = sum(sizes)
        if not total:
            return own
        # Exact, and rounded once: the order of the segments does not matter, and equal multipliers stay what they are.
        moved = sum((Fraction(m) * size for m, size in zip(own, sizes, strict=True)), Fraction())
        return [float(moved / total)] * len(own)


@dataclass(frozen=True)
class Reversed(Ablation):
    """The multipliers of `of` in reversed order.

    What had the largest gets the smallest, and so on.

    Args:
        of: the block_lr.
    """

    name: ClassVar[str] = "reversed"

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        own = self.of.multipliers(segments, measured)
        values = _values(own, segments)
        return _renamed(own, values, values[::-1])


@dataclass(frozen=True)
class Shuffled(Ablation):
    """The multipliers of `of` in another order.

    It is drawn by a seed; every value moves if there are two or more.

    Args:
        of: the block_lr.
        seed: of the order, a whole number >= 0.
    """

    seed: int = 0

    name: ClassVar[str] = "shuffled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"{self.name}: seed must be a whole number >= 0, got {self.seed!r}")

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        own = self.of.multipliers(segments, measured)
        values = _values(own, segments)
        return _renamed(own, values, [values[i] for i in _permutation(self.seed, len(values))])


@dataclass(frozen=True)
class Only(Ablation):
    """The multipliers of `of` for some of the blocks alone.

    All others have 1.

    Args:
        of: the block_lr.
        types: block types ("Emb", "QK", "VO", "FFN", "Norm", "Head", "Other") or roles ("tok_emb", "q", ...); kept in
            that order, each once. "Emb" includes the position embedding, "Norm" those of queries and keys.

    >>> from sharpwise.block_lr import BlockwiseLR
    >>> Only(BlockwiseLR(), types=("FFN", "Emb")).types
    ('Emb', 'FFN')
    """

    types: Collection[str] = ("Emb",)

    name: ClassVar[str] = "only"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.types] if isinstance(self.types, str) else self.types
        if not isinstance(given, Collection):
            raise TypeError(f"{self.name}: types must be names of block types or roles, got {given!r}")
        wrong = [kind for kind in given if kind not in TYPES]
        if wrong or not given:
            got = "got " + (", ".join(f"{kind!r}{meant(kind, TYPES)}" for kind in wrong) or "none")
            raise ValueError(f"{self.name}: types takes block types and roles, {got}; allowed: {', '.join(TYPES)}")
        object.__setattr__(self, "types", tuple(kind for kind in TYPES if kind in given))

    def check(self, segments: Sequence[Segment]) -> None:
        super().check(segments)
        there = {str(kind) for segment in segments for kind in (segment.block_type, segment.role)}
        if segments and not there & {*self.types}:
            found = ", ".join(kind for kind in TYPES if kind in there)
            raise ValueError(f"{self.name}: this model has no {' or '.join(self.types)}; it has {found}")

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        own = self.of.multipliers(segments, measured)
        return [m if {s.block_type, s.role} & {*self.types} else 1.0 for m, s in zip(own, segments, strict=True)]


def _values(multipliers: Sequence[float], segments: Sequence[Segment]) -> list[float]:
    """The distinct multipliers of what is trained, sorted."""
    return sorted({m for m, s in zip(multipliers, segments, strict=True) if not s.frozen})


def _renamed(multipliers: Sequence[float], values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Every one of `values` replaced by that in its place in `others`; all else as it is."""
    instead = dict(zip(values, others, strict=True))
    return [instead.get(m, m) for m in multipliers]


def _permutation(seed: int, size: int) -> list[int]:
    """The i-th value of the result goes where the i-th was; from 0."""
    for attempt in itertools.count():
        ranks = [hashlib.sha256(f"{seed}/{attempt}/{size}/{i}".encode()).digest() for i in range(1, size + 1)]
        order = sorted(range(size), key=ranks.__getitem__)
        if size < 2 or all(i != j for i, j in enumerate(order)):
            return order
    raise AssertionError  # some attempt succeeds: one in e does
