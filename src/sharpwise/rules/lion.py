"""Lion: Symbolic Discovery of Optimization Algorithms (Chen et al., arXiv 2302.06675).

    u <- sign(b1 m + (1-b1) g)
    p <- p (1 - lr wd) - lr u
    m <- b2 m + (1-b2) g

sign(NaN) is NaN, so that an element whose gradient was NaN shows it, as under every other rule. torch's sign is 0
there: the element would stand still for good, its momentum NaN, unnoticed.

| symbol | name | shape |
|---|---|---|
| m | exp_avg | the parameter's |
"""

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
    """

    betas: tuple[float, float] = (0.9, 0.99)

    name: ClassVar[str] = "lion"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas",)

    @property
    def state(self) -> dict[str, Kind]:
        return {"exp_avg": "element"}

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {"one_minus_b1": 1 - b1, "one_minus_b2": 1 - b2}

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        m = state["exp_avg"]
        return {"exp_avg": lerp(m, g, s["one_minus_b2"])}, sign(lerp(m, g, s["one_minus_b1"])), None
