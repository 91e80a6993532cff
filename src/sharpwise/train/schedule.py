"""Learning rate against step: linear warm-up, then a cosine, a line, or a constant that may end in a line."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sharpwise.hints import nearest

Kind = Literal["cosine", "linear", "wsd", "constant"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Schedule:
    """The factor on the peak learning rate in every step.

        (step + 1) / warmup                       step < warmup
        floor + (1 - floor) shape                 after, with x = (step - warmup) / (total - warmup)

        shape = (1 + cos(pi x)) / 2               cosine
                1 - x                             linear
                min(1, (total - step) / decay)    wsd (warm-up, stable, decay)
                1                                 constant

    Steps are counted from 0. The first is taken at 1/warmup of the peak, not at 0; the first after the warm-up is at
    the peak, and so is the last of it. From `total` on the factor is `floor`, but for "constant", which stays at 1.

    Args:
        kind: "cosine", "linear", "wsd" or "constant".
        total: optimizer steps of the whole run.
        warmup: steps of linear warm-up.
        floor: what is left of the peak at the end, a fraction in [0, 1]; "constant" has none.
        decay: steps of the last part of "wsd"; the others have none.

    Raises:
        ValueError: an unknown kind, or a number outside its range.

    Example:
        >>> wsd = Schedule("wsd", total=8, warmup=2, floor=0.1, decay=3)
        >>> [round(wsd.factor(step), 3) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1, 0.1]
        >>> linear = Schedule("linear", total=5, warmup=1)
        >>> [linear.factor(step) for step in range(6)]
        [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    References: cosine, Loshchilov and Hutter, arXiv 1608.03983; wsd, Hu et al., arXiv 2404.06395.
    """

    kind: Kind
    total: int
    warmup: int = 0
    floor: float = 0.0
    decay: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"no schedule is called {self.kind!r}{nearest(str(self.kind), KINDS)}; there are {', '.join(KINDS)}"
            )
        if not 0 <= self.warmup <= self.total or self.total < 1:
            raise ValueError(
                f"need 0 <= warmup <= total and total >= 1, got warmup={self.warmup} and total={self.total}"
            )
        if self.kind == "wsd" and not 0 <= self.decay <= self.total - self.warmup:
            raise ValueError(
                "need decay >= 0 and warmup + decay <= total, "
                f"got warmup={self.warmup}, decay={self.decay} and total={self.total}"
            )
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a fraction of the peak learning rate, 0 <= floor <= 1, got {self.floor}")

    def factor(self, step: int) -> float:
        """The factor in step `step`, counted from 0; for `LambdaLR`, and for looking ahead."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "constant":
            return 1.0
        if step >= self.total:
            return self.floor
        return self.floor + (1 - self.floor) * self._shape(step)

    def _shape(self, step: int) -> float:
        """What falls from 1 to 0, for warmup <= step < total."""
        if self.kind == "wsd":
            return min(1.0, (self.total - step) / self.decay) if self.decay else 1.0
        done = step - self.warmup
        whole = self.total - self.warmup
        return 1 - done / whole if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done / whole))
