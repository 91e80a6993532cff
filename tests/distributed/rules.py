"""Rules that use what no rule of the library does yet: a maximum, whole matrices, block state in parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Segment
from sharpwise.rules import SGD, AdamMini, Lion
from sharpwise.rules.base import Kind, MatrixRule, Reduction, Rule, Scalars, State


@dataclass(frozen=True)
class _OfMatrices(Rule):
    """Moves matrices; everything else is moved by SGD."""

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False
    hyperparameters: ClassVar[tuple[str, ...]] = SGD.hyperparameters

    def assign(self, segment: Segment) -> tuple[Rule, Cut]:
        return (self if len(segment.shape) == 2 else SGD(self.momentum), "element")

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        return {"momentum": group["momentum"]}


@dataclass(frozen=True)
class Orthogonal(_OfMatrices, MatrixRule):
    """Momentum made orthogonal, which takes the whole matrix, at a running mean of its rows' squares:

    m <- b m + g;   u = U V^T,  m = U S V^T;   v <- (v + mean(u^2)) / 2;   p <- p - lr u / (1 + v)
    """

    name: ClassVar[str] = "test-orthogonal"

    @property
    def state(self) -> dict[str, Kind]:
        return {"momentum_buffer": "element", "row_mean": "whole"}

    def shape_of(self, name: str, segments: Sequence[Segment]) -> tuple[int, ...]:
        return (sum(segment.rows for segment in segments),)

    def assign(self, segment: Segment) -> tuple[Rule, Cut]:
        rule, _ = super().assign(segment)
        return rule, "tensor" if rule is self else "element"

    def input(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        m = s["momentum"] * state["momentum_buffer"] + g
        return {"momentum_buffer": m}, m

    def owner(self, m: Tensor, small: State, s: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        u = _orthogonal(m)
        v = (small["row_mean"] + u.square().mean(-1)) / 2
        return u / (1 + v)[..., None], {"row_mean": v}


def _orthogonal(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ vt).to(matrix.dtype)


@dataclass(frozen=True)
class Largest(_OfMatrices):
    """The gradient over its largest element: p <- p - lr g / max|g|."""

    name: ClassVar[str] = "test-largest"

    @property
    def state(self) -> dict[str, Kind]:
        return {}

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        return (Reduction("largest", lambda g, state, hyper, part: _largest(g), "max"),)

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return {}, g, state["largest"]


def _largest(g: Tensor) -> Tensor:
    return g.abs().amax().view(1) if g.numel() else g.new_zeros(1)


@dataclass(frozen=True)
class Unit(_OfMatrices):
    """The gradient over its norm: p <- p - lr g / |g|."""

    name: ClassVar[str] = "test-unit"

    @property
    def state(self) -> dict[str, Kind]:
        return {}

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        return (Reduction("square", lambda g, state, hyper, part: g.double().square().sum().view(1), degree=2),)

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return {}, g, state["square"].sqrt().to(g.dtype)


@dataclass(frozen=True)
class Parted(Rule):
    """q and k by Lion, all else by Adam-mini: of a fused parameter v alone has block state. Both keep one momentum."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6

    name: ClassVar[str] = "test-parted"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps")

    @property
    def state(self) -> dict[str, Kind]:
        return {}

    def assign(self, segment: Segment) -> tuple[Rule, Cut]:
        if segment.bias:
            return Lion(self.betas), "element"
        return (Lion(self.betas), "element") if segment.role in ("q", "k") else (AdamMini(self.betas, self.eps), "row")


RULES: dict[str, Rule] = {
    "orthogonal": Orthogonal(),
    "largest": Largest(),
    "parted": Parted(),
}
