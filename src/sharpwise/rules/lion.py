"""Lion: Symbolic Discovery of Optimization Algorithms (Chen et al., arXiv 2302.06675).

    u <- sign(b1 m + (1-b1) g)
    p <- p (1 - lr wd) - lr u
    m <- b2 m + (1-b2) g

With `nesterov` u is of the new m, a step ahead. With b1 = b2 it is the rule of LionA and LionAR (arXiv 2410.23922).

sign(NaN) is NaN, so that an element whose gradient was NaN shows it, as under every other rule. torch's sign is 0
there: the element would stand still for good, its momentum NaN, unnoticed.

| symbol | name | shape |
|---|---|---|
| m | exp_avg | the parameter's |
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sharpwise.rules.base import Kind, Rule, Scalars, State, lerp, sign


@dataclass(frozen=True)
class Lion(Rule):
    """Steps of one size, along the sign of the momentum mixed with the gradient.

    Args:
        betas: b1 of the update, b2 of the momentum, in [0, 1).
        nesterov: the update is of the momentum after the step; fixed, and not saved.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    nesterov: bool = False

    name: ClassVar[str] = "lion"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas",)
    first_moment: ClassVar[str | None] = "exp_avg"
    turn: ClassVar[float] = math.sqrt(math.pi / 2)

    @property
    def state(self) -> dict[str, Kind]:
        return {"exp_avg": "element"}

    def __post_init__(self) -> None:
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"{self.name}: nesterov must be True or False, got {self.nesterov!r}")

    def momentum_of(self, group: Mapping[str, Any]) -> Any:
        return group["betas"][1]

    def mean_square(self, group: Mapping[str, Any]) -> Any:
        """(1-b1)^2 + b1^2 (1-b2) / (1+b2), of what the sign is taken of, without `nesterov`."""
        b1, b2 = group["betas"]
        return (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {"one_minus_b1": 1 - b1, "one_minus_b2": 1 - b2}

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        old = state["exp_avg"]
        m = lerp(old, g, s["one_minus_b2"])
        return {"exp_avg": m}, sign(lerp(m if self.nesterov else old, g, s["one_minus_b1"])), None
