"""Stochastic gradient descent with momentum, as `torch.optim.SGD` defines it.

    m <- g                       at the first step with mu > 0
    m <- mu m + (1-damp) g       later
    u <- m,  or  g + mu m  (Nesterov),  or  g  (mu = 0)
    p <- p - lr u

Weight decay is coupled (g + wd p, before everything) as in torch, or decoupled (`decoupled_weight_decay=True`).

| symbol | name | shape |
|---|---|---|
| m | momentum_buffer | the parameter's |
| mu, damp | momentum, dampening | |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sharpwise.rules.base import Kind, Rule, Scalars, State, add


@dataclass(frozen=True)
class SGD(Rule):
    """Steps along the gradient, or with momentum along its running sum.

    Args:
        momentum: mu, 0 for none and then no state. A schedule may change it: raised from 0 it begins with m <- g, and
            `step` counts from there; at 0 the state is kept as it is and not used, as in torch.
        dampening: damp, in [0, 1]; None for mu, whatever a schedule makes of it: m is an average (SGD-SaI).
        nesterov: look ahead; needs momentum > 0 and dampening 0.
    """

    momentum: float = 0.0
    dampening: float | None = 0.0
    nesterov: bool = False

    name: ClassVar[str] = "sgd"
    hyperparameters: ClassVar[tuple[str, ...]] = ("momentum", "dampening", "nesterov")

    @property
    def state(self) -> dict[str, Kind]:
        return self.all_state if self.momentum else {}

    @property
    def momentum_state(self) -> str | None:
        return next(iter(self.state), None)

    @property
    def all_state(self) -> dict[str, Kind]:
        return {"momentum_buffer": "element"}

    def validate(self, group: Mapping[str, Any]) -> None:
        super().validate(group if group["dampening"] is not None else {**group, "dampening": 0.0})
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{self.name}: nesterov needs momentum > 0 and dampening 0, "
                f"got momentum={group['momentum']} dampening={group['dampening']}"
            )

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        mu = group["momentum"]
        damp = mu if group["dampening"] is None else group["dampening"]
        first = 1.0 * (t == 1)  # works for a float and for a tensor of steps
        return {
            "mu": mu * (1 - first),
            "gain": (1 - damp) * (1 - first) + first,
            "of_m": mu,
        }

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        if not state:
            return {}, g, None
        m = add(state["momentum_buffer"] * s["mu"], g, s["gain"])
        return {"momentum_buffer": m}, add(g, m, s["of_m"]) if self.nesterov else m, None
