"""Rules that use what no rule of the library does yet: two reductions of sums, a maximum, whole matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Segment
from sharpwise.rules import SGD, AdamMini, Lion
from sharpwise.rules.base import Kind, MatrixRule, Reduction, Rule, Scalars, State
from sharpwise.shards import Part

RANK = 2


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
class LowRank(_OfMatrices):
    """Momentum as a product of two thin matrices, brought up to date by one step of power iteration:

    M = b L R + g;   L <- orthonormal basis of M R^T;   R <- L^T M;   p <- p - lr L R

    In fp64: an orthonormal basis magnifies the last bits.
    """

    name: ClassVar[str] = "test-low-rank"

    @property
    def state(self) -> dict[str, Kind]:
        return {"left": "whole", "right": "whole"}

    def shape_of(self, name: str, segments: Sequence[Segment]) -> tuple[int, ...]:
        shape = segments[0].shape
        return (shape[0], RANK) if name == "left" else (RANK, shape[1])

    @property
    def reductions(self) -> tuple[Reduction, ...]:
        return (Reduction("g_right", self._times_right), Reduction("basis_g", self._times_basis))

    def _start(self, right: Tensor) -> Tensor:
        """The right factor, or where there is none yet anything that is the same everywhere."""
        anything = torch.cos(torch.arange(right.numel(), dtype=right.dtype)).view_as(right)
        return torch.where(right.any(), right, anything)

    def _times_right(self, g: Tensor, state: State, hyper: Mapping[str, Any], part: Part) -> Tensor:
        rows, columns = part.region
        whole = g.new_zeros(part.shape[0], RANK, dtype=torch.float64)
        whole[rows] = g.double() @ self._start(state["right"])[:, columns].double().mT
        return whole

    def _basis(self, state: State, momentum: float) -> Tensor:
        left, right, start = (t.double() for t in (state["left"], state["right"], self._start(state["right"])))
        return torch.linalg.qr(momentum * left @ (right @ start.mT) + state["g_right"])[0]

    def _times_basis(self, g: Tensor, state: State, hyper: Mapping[str, Any], part: Part) -> Tensor:
        rows, columns = part.region
        whole = g.new_zeros(RANK, part.shape[1], dtype=torch.float64)
        whole[:, columns] = self._basis(state, hyper["momentum"])[rows].mT @ g.double()
        return whole

    def finish(self, state: State, s: Scalars) -> dict[str, Tensor]:
        basis, left, right = self._basis(state, s["momentum"]), state["left"].double(), state["right"].double()
        right = s["momentum"] * (basis.mT @ left) @ right + state["basis_g"]
        return {"left": basis.to(state["left"].dtype), "right": right.to(state["left"].dtype)}

    def local_slice(self, state: State, part: Part) -> dict[str, Tensor]:
        rows, columns = part.region
        return {"left": state["left"][rows], "right": state["right"][:, columns]}

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return {}, state["left"] @ state["right"], None


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
    "low rank": LowRank(),
    "orthogonal": Orthogonal(),
    "largest": Largest(),
    "parted": Parted(),
}
