"""AdamW (Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101).

    m <- b1 m + (1-b1) g
    v <- b2 v + (1-b2) g^2
    p <- p (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

| symbol | name | shape |
|---|---|---|
| m | exp_avg | the parameter's |
| v | exp_avg_sq | the parameter's |
| b1, b2, eps | betas, eps | |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sharpwise.rules.base import Kind, Rule, Scalars, State, add_square, divide, lerp


@dataclass(frozen=True)
class AdamW(Rule):
    """Adam with decoupled weight decay, as torch's AdamW.

    The rule is Adam's direction; the engine applies lr, decay and multipliers.

    Args:
        betas: decay rates of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment after its bias correction, in units of the gradient.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    name: ClassVar[str] = "adamw"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps")
    second_moment: ClassVar[str | None] = "exp_avg_sq"
    first_moment: ClassVar[str | None] = "exp_avg"

    @property
    def state(self) -> dict[str, Kind]:
        return {"exp_avg": "element", "exp_avg_sq": "element"}

    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][1])

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        b1, b2 = group["betas"]
        return {
            "one_minus_b1": 1 - b1,
            "b2": b2,
            "one_minus_b2": 1 - b2,
            "root_correction2": (1 - b2**t) ** 0.5,
            "eps": group["eps"],
            "bias_correction": 1 - b1**t,
        }

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        m = lerp(state["exp_avg"], g, s["one_minus_b1"])
        v = add_square(state["exp_avg_sq"] * s["b2"], g, s["one_minus_b2"])
        return {"exp_avg": m, "exp_avg_sq": v}, m, divide(v.sqrt(), s["root_correction2"]) + s["eps"]
