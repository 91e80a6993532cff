"""How far, per block: a multiplier of the learning rate for every segment."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sharpwise.blocks import Segment
from sharpwise.hints import kind_of

if TYPE_CHECKING:
    from sharpwise.block_lr.measured import MeasuredLR

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
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, BlockLR):
                said.append(str(value))
            elif field.init and value != field.default:
                said.append(f"{field.name}={spelled(value)}")
        return f"{self.name}({', '.join(said)})" if said else self.name

    def __mul__(self, other: object) -> BlockLR:
        """Both: the product of their multipliers."""
        from sharpwise.block_lr.product import Product

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


def is_number(value: object) -> bool:
    """Whether this is a real number, True and False being none."""
    return isinstance(value, Real) and not isinstance(value, bool)


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
