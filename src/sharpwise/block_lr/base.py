"""How far, per block: a multiplier of the learning rate for every segment, and products of several.

m_s = product of the m_s of all factors, `SharpnessLR() * LayerDecay(rate=0.9)`
"""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isnan, prod
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor

from sharpwise.blocks import Segment
from sharpwise.blocks.roles import meant
from sharpwise.hints import kind_of

Source = Literal["second_moment", "centred", "gradient", "matrix", "probe", "directional"]
"""Of each segment: the mean of the second moment that the rule keeps, or of the variance that both moments tell; what
`of_gradient` and `of_matrices` make of the gradient and the weights; what a probe of the model finds, and one that is
told in which direction the rule moves."""
Measured = Mapping["MeasuredLR", Sequence[float]]
"""What was measured for each block_lr that asks: one number per segment of the model, NaN where none is known."""
NOTHING: Measured = MappingProxyType({})


@dataclass(frozen=True)
class BlockLR:
    """Base of all per-block learning rates. `str()` of one is the spelling that `make_block_lr` reads.

    Args:
        decay: "scaled" multiplies decoupled decay with the multiplier as well (lr * multiplier * wd), as published;
            "base" keeps lr * wd for every block.
    """

    decay: Literal["scaled", "base"] = "scaled"

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if self.decay not in ("scaled", "base"):
            # `decay` comes first, where most expect the argument that matters.
            first = next((f.name for f in fields(self) if f.init and f.name != "decay"), "decay")
            given: Any = self.decay
            meant = repr(given) if is_number(given) else "..."
            hint = f"; arguments are given by name, {type(self).__name__}({first}={meant})"
            got = repr(given) if isinstance(given, str) or is_number(given) else kind_of(given)
            raise ValueError(
                f"{self.name}: decay must be 'scaled' or 'base', got {got}{'' if isinstance(given, str) else hint}"
            )

    def __str__(self) -> str:
        said = []
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, BlockLR):
                said.append(str(value))
            elif each.init and value != each.default:
                said.append(f"{each.name}={spelled(each.metadata.get('as', _same)(value))}")
        return f"{self.name}({', '.join(said)})" if said else self.name

    def __mul__(self, other: object) -> BlockLR:
        """Both: the product of their multipliers."""
        return Product((self, other)) if isinstance(other, BlockLR) else NotImplemented

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        """One multiplier >= 0 per segment of the whole model."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[BlockLR, ...]:
        """What it is the product of, each on a path of its own where it follows a measurement."""
        return (self,)

    @property
    def sources(self) -> tuple[MeasuredLR, ...]:
        """What has to be measured for the multipliers, each once; () where they stand from the start."""
        return ()

    @property
    def by_role(self) -> bool:
        """Whether it distinguishes what blocks are, so that all of them have to be known."""
        return True

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise ValueError where it speaks of something that the model has not."""

    def effective(self, multiplier: float, lr: float, peak: float) -> float:
        """The multiplier at a learning rate, `peak` being the largest one seen so far."""
        return multiplier

    @property
    def follows_lr(self) -> bool:
        """Whether `effective` depends on the learning rate."""
        return False


@dataclass(frozen=True)
class MeasuredLR(BlockLR):
    """Base of block_lrs that need a measurement; as long as there is none, multipliers are 1.

    Args:
        decay: "scaled" with the multiplier, as lr is, or "base", without it.
    """

    @property
    def measures(self) -> Source:
        """What is measured."""
        raise NotImplementedError

    @property
    def sources(self) -> tuple[MeasuredLR, ...]:
        return (self,)

    @property
    def probed(self) -> bool:
        """Whether it is measured on the model and batches, which the optimizer then needs."""
        return self.measures in ("probe", "directional")

    @property
    def probe_settings(self) -> Mapping[str, Any]:
        """What a probe is told beside the model, its blocks and batches."""
        return {}

    @property
    def after_warmup(self) -> bool:
        """Whether it waits until the learning rate no longer rises."""
        return False

    @property
    def waits(self) -> bool:
        """Whether it is measured at every step until all segments have a value."""
        return False

    @property
    def smooth(self) -> int:
        """Steps over which multipliers go where a measurement leads them; 0 or 1: at once."""
        return 0

    def due(self, taken: int, total_steps: int | None) -> bool:
        """Whether to measure after so many steps."""
        return False

    def check_length(self, total_steps: int | None) -> None:
        """Raise ValueError unless it is known when to measure in a training of so many steps (None: not known)."""

    def doubts(self, total_steps: int | None) -> str | None:
        """What a user should know before a training of so many steps."""
        return None

    def reads(self, segment: Segment) -> bool:
        """Whether this segment has a value; of matrices, where others are not even brought together."""
        return True

    def of_gradient(self, count: int, total: float, squares: float) -> float:
        """The value of a segment, from the number, the sum, and the sum of squares of the elements of its gradient.

        The unit of the gradient is any. NaN where there is no value.
        """
        raise NotImplementedError(f"block_lr {self.name!r} measures {self.measures!r}, and no gradients")

    def of_matrices(self, matrices: Iterable[Tensor]) -> float:
        """The value of a segment, from its matrices [rows, inputs], one per stacked copy; NaN where there is none."""
        raise NotImplementedError(f"block_lr {self.name!r} measures {self.measures!r}, and no matrices")

    def updated(self, before: float, now: float) -> float:
        """What to keep, of what was kept before and what has been found now; NaN where there is nothing."""
        return before if isnan(now) else now

    def settles(self, segments: Sequence[Segment], before: Sequence[float], now: Sequence[float]) -> list[bool]:
        """Of which segments multipliers may follow what is kept, from this measurement on.

        Args:
            before, now: what was kept before, and what has been found now; NaN where there is nothing.
        """
        return [True] * len(segments)

    def unusable(self, segments: Sequence[Segment], now: Sequence[float]) -> str | None:
        """What a user should know of values that were found and tell nothing; said once."""
        return None

    def remarks(self, segments: Sequence[Segment], values: Sequence[float]) -> str | None:
        """What a user should know of the values of what the optimizer moves, NaN where there is none; said once."""
        return None


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


def _same(value: Any) -> Any:
    return value


def is_number(value: object) -> bool:
    """Whether this is a real number, True and False being none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_choices(own: BlockLR, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError where a field is none of what it may be."""
    for key, values in allowed.items():
        if (value := getattr(own, key)) not in values:
            words = list(map(str, values))
            raise ValueError(f"{own.name}: {key} must be one of {', '.join(words)}, got {value!r}{meant(value, words)}")


def ratios_of(who: str, key: str, given: Any, example: str) -> tuple[tuple[str, float], ...]:
    """A mapping or pairs of names and numbers > 0, as pairs; of equal names the last one holds, in its place.

    Raises:
        ValueError: it is neither, or a number is none.
    """
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        found = tuple((name, value) for name, value in pairs)
    except (TypeError, ValueError):
        raise ValueError(f"{who}: {key} must be a mapping such as {example}, got {given!r}") from None
    last: dict[str, float] = {}
    for name, value in found:
        check_ratio(who, name, value)
        last.pop(name, None)
        last[name] = value
    return tuple(last.items())


def check_ratio(who: str, name: object, value: object) -> None:
    """Raise ValueError unless this is a name, and a finite number > 0."""
    if not isinstance(name, str) or not is_number(value) or not 0.0 < value < float("inf"):  # type: ignore[operator]
        raise ValueError(f"{who}: the ratio of {name!r} must be a finite number > 0, got {value!r}")


def spelled(value: Any) -> str:
    """A value in the shortest form that reads back as the same: 5, 1e-5, Emb, (Emb, QK), {Emb: 5}."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{spelled(key)}: {spelled(part)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple):
        parts = [spelled(part) for part in value]
        return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"
    if isinstance(value, str):
        # Python reads names beyond ASCII in their normal form, which may be another text.
        bare = value.isascii() and value.isidentifier() and not keyword.iskeyword(value)
        return value if bare else repr(str(value))
    if not is_number(value) or isinstance(value, Integral):
        return str(value)
    mantissa, e, exponent = repr(float(value)).removesuffix(".0").partition("e")
    return f"{mantissa}{e}{int(exponent)}" if e else mantissa
