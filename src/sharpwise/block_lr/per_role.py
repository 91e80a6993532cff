"""PerRole: any ratios, by what the blocks are or how they are called."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from sharpwise.block_lr.base import NOTHING, BlockLR, Measured, check_ratio, ratios_of, spelled
from sharpwise.blocks import Segment
from sharpwise.blocks.naming import by_role, check_named, matches


@dataclass(frozen=True)
class PerRole(BlockLR):
    """Multipliers by role ("q"), block type ("FFN") or glob on names of parameters ("*.mlp.*").

    Args:
        ratios: multipliers > 0, as a mapping or pairs; of several that match a block, the last one holds.
        default: where none matches, > 0.
        decay: see `BlockLR`.

    >>> print(PerRole({"FFN": 6, "*.0.mlp.*": 3}))
    per_role(ratios={FFN: 6, '*.0.mlp.*': 3})
    """

    decay: Literal["scaled", "base"] = field(default="scaled", kw_only=True)
    ratios: Mapping[str, float] | Iterable[tuple[str, float]] = ()
    default: float = field(default=1.0, kw_only=True)

    name: ClassVar[str] = "per_role"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ratios", ratios_of(self.name, "ratios", self.ratios, "{'FFN': 6, '*.mlp.*': 3}"))
        check_ratio(self.name, "default", self.default)

    def __str__(self) -> str:
        said = [f"ratios={spelled(dict(self.ratios))}"]
        others = [f for f in fields(self) if f.name != "ratios" and getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(said + [f'{f.name}={spelled(getattr(self, f.name))}' for f in others])})"

    def multipliers(self, segments: Sequence[Segment], measured: Measured = NOTHING) -> list[float]:
        return [self._ratio(segment) for segment in segments]

    def _ratio(self, segment: Segment) -> float:
        found = self.default
        for name, value in dict(self.ratios).items():
            found = value if matches(segment, name) else found
        return float(found)

    @property
    def by_role(self) -> bool:
        return by_role(dict(self.ratios))

    def check(self, segments: Sequence[Segment]) -> None:
        check_named(self.name, dict(self.ratios), segments)
