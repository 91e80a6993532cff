"""AdaPM: a Partial Momentum Algorithm for LLM Training (Zhang, Liu, Fang, arXiv 2510.09103).

Momentum by role: none (m = g) for embeddings, head and o; in full for v, norms, biases and what is not named here; of
low rank for q, k and the MLP. There it is a product of thin factors, moved by one step of alternating least squares
from where they were, and what they leave out is added back:

    M = b1 L R + (1-b1) g                                    never formed
    L <- M R^T (R R^T)^-1, its columns made orthonormal;     R <- (L^T L)^-1 L^T M
    m = L R / (1-b1^t) + c (M - L R)                         c = 1 / (1-b1): unbiased; 1: M itself; 0: L R alone
    u = m / (sqrt(v / (1-b2^t)) + eps),  v that of Adam, or one number per block, that of Adam-mini
    p <- p (1 - lr wd) - lr min(1, clip / rms(u)) u          rms over a matrix

Of a matrix g this takes two sums, g R^T and L^T g, and one product of rank 2r, m = A B + c (1-b1) g.

| symbol | name | shape |
|---|---|---|
| L | left | [output rows, r], of stacked experts [experts, output rows, r] |
| R | right | [r, columns], likewise |
| v | exp_avg_sq | as AdamW's or Adam-mini's |

R begins as a random sketch, a hash of the place of each number, and L as 0: the first gradient that is not 0 makes
L R the projection of M on the range of g R^T. Both inverses are ridged by 1e-6 of the mean of the diagonal.

Departs: the paper leaves open how the factors move (its "gradient descent" tracks badly: one sweep of least squares is
within 2 points of an exact truncated SVD), c, what is clipped, and all but five roles. Columns of L are made
orthonormal, as else L shrinks and R grows with every turn of the subspace. A matrix whose factors would not be smaller
than itself keeps its momentum in full.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Role, Segment
from sharpwise.blocks.roles import meant
from sharpwise.rules.adam_mini import AdamMini
from sharpwise.rules.adamw import AdamW
from sharpwise.rules.base import (
    Kind,
    Product,
    Rule,
    Scalars,
    State,
    ThinRule,
    add_square,
    check_betas,
    check_nonnegative,
    divide,
)
from sharpwise.storage.dense import mix

Momentum = Literal["none", "full", "low_rank"]
MOMENTUM: tuple[Momentum, ...] = get_args(Momentum)
BY_ROLE: dict[str, Momentum] = {
    **dict.fromkeys((Role.TOK_EMB, Role.POS_EMB, Role.HEAD, Role.O), "none"),
    **dict.fromkeys((Role.Q, Role.K, Role.UP, Role.GATE, Role.DOWN), "low_rank"),
}
"""Of matrices; what is not here keeps it in full, and so do vectors whatever their role."""
SecondMoment = Literal["element", "block"]
RIDGE = 1e-6
"""Of the mean of the diagonal."""
SMALLEST = 1e-30
"""A right factor below it is not moved: products with it would be 0."""
logger = logging.getLogger(__name__)


def momentum_scalars(t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars of AdamW that concern its second moment alone."""
    own = AdamW().scalars(t, group)
    return {name: own[name] for name in ("b2", "one_minus_b2", "root_correction2", "eps")}


@dataclass(frozen=True)
class _Partial(Rule):
    """Numerator over the denominator of Adam or Adam-mini."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    kept_by: SecondMoment = "element"

    second_moment: ClassVar[str | None] = "exp_avg_sq"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps")

    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][1])

    def block_phase(self, blocks: State, mean_square: Tensor, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        return AdamMini().block_phase(blocks, mean_square, s)

    def _over(self, m: Tensor, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        if self.kept_by == "block":
            return {}, m, None
        v = add_square(state["exp_avg_sq"] * s["b2"], g, s["one_minus_b2"])
        return {"exp_avg_sq": v}, m, divide(v.sqrt(), s["root_correction2"]) + s["eps"]


@dataclass(frozen=True)
class NoMomentum(_Partial):
    """The gradient itself."""

    name: ClassVar[str] = "adapm-none"
    plain: ClassVar[bool] = True

    @property
    def state(self) -> dict[str, Kind]:
        return {"exp_avg_sq": self.kept_by}

    def momentum_of(self, group: Mapping[str, Any]) -> Any:
        return 0.0

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        return momentum_scalars(t, group)

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return self._over(g, g, state, s)


@dataclass(frozen=True)
class LowRank(_Partial, ThinRule):
    """Momentum as a product of thin factors; role: of the matrix, as each of a fused parameter has its own."""

    debias: float | None = None
    rank: int = 16
    role: str = ""

    name: ClassVar[str] = "adapm-low-rank"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps", "debias")

    @property
    def state(self) -> dict[str, Kind]:
        return {"left": "whole", "right": "whole", "exp_avg_sq": self.kept_by}

    def shape_of(self, name: str, segments: Sequence[Segment]) -> tuple[int, ...]:
        first = segments[0]
        rows, columns = sum(segment.rows for segment in segments), first.shape[first.inputs[0]]
        own = (rows, self.rank) if name == "left" else (self.rank, columns)
        return (first.copies, *own) if first.stacked else own

    def initial(self, name: str, segments: Sequence[Segment], device: torch.device) -> Tensor:
        if name == "left":
            return super().initial(name, segments, device)
        shape = self.shape_of(name, segments)
        return sketch(self.rank, shape[-1], device).expand(shape)

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        b1, c = group["betas"][0], group["debias"]
        raw = 1.0 if c is None else c * (1 - b1)
        c = 1 / (1 - b1) if c is None else c
        return {**momentum_scalars(t, group), "of_new": 1 / (1 - b1**t) - c, "of_old": c * b1, "of_gradient": raw}

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return self._over(state["x"], g, state, s)

    # -- the factors -----------------------------------------------------------------------------------------------

    @property
    def reductions(self) -> tuple[Product, ...]:
        return (
            Product("g_right", "right", lambda state: _unit(state["right"]).mT, then=_new_left),
            Product("left_g", "left", lambda state: state["new_left"], then=_new_right),
        )

    def finish(self, state: State, s: Scalars) -> dict[str, Tensor]:
        return {"left": state["new_left"], "right": state["new_right"]}

    def thin(self, found: State, s: Scalars) -> tuple[Tensor, Tensor, Any]:
        left, right = found["left"], found["right"]
        a = torch.cat([found["new_left"].to(left.dtype) * s["of_new"], left * s["of_old"]], -1)
        return a, torch.cat([found["new_right"].to(right.dtype), right], -2), s["of_gradient"]


def sketch(rank: int, columns: int, device: torch.device) -> Tensor:
    """Numbers in [-1, 1) [rank, columns], each a hash of its place."""
    places = torch.arange(rank * columns, device=device, dtype=torch.int64)
    return (mix(places).double() * 2.0**-31 - 1).float().view(rank, columns)


def _unit(right: Tensor) -> Tensor:
    """A right factor whose largest number is 1: products with it neither vanish nor overflow."""
    return right / _largest(right)


def _largest(right: Tensor) -> Tensor:
    """The largest number of each, 1 where all are 0."""
    largest = _size(right)
    return torch.where(largest > 0, largest, 1.0)


def _size(matrix: Tensor) -> Tensor:
    return matrix.abs().amax((-2, -1), keepdim=True)  # torch's infinity norm takes six times as long


def _new_left(state: State, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
    """fp64: it is thin, and inverses magnify the last bits."""
    b1 = hyper["betas"][0]
    left, right, g_right = (state[name].double() for name in ("left", "right", "g_right"))
    scale = _largest(right)
    gram = right @ right.mT / scale
    m_right = torch.baddbmm(g_right * (1 - b1), left, gram * b1)
    left = m_right @ torch.cholesky_inverse(_root(gram / scale))
    return {"new_left": left @ _inverse(_root(left.mT @ left)).mT}


def _new_right(state: State, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
    b1, new = hyper["betas"][0], state["new_left"]
    left, right, left_g = (state[name].double() for name in ("left", "right", "left_g"))
    left_m = torch.baddbmm(left_g * (1 - b1), new.mT @ left * b1, right)
    found = torch.cholesky_inverse(_root(new.mT @ new)) @ left_m
    # NaN moves on: only what is known to be small does not.
    stays = _size(found) < SMALLEST
    return {"new_left": torch.where(stays, 0.0, new), "new_right": torch.where(stays, right, found)}


def _root(gram: Tensor) -> Tensor:
    """The Cholesky factor of a ridged Gram matrix; of zeros that of the unit matrix."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root: Tensor = torch.linalg.cholesky_ex(gram + unit * torch.where(mean == 0, 1.0, RIDGE * mean))[0]
    return root


def _inverse(root: Tensor) -> Tensor:
    unit = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, unit.expand_as(root), upper=False)


# -- which matrix keeps what -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaPM(Rule):
    """AdamW with the momentum of each role in full, of low rank or left out.

    Args:
        betas, eps: as in AdamW.
        rank: r of the factors.
        momentum: pairs of a role and its momentum, where it is not that of `BY_ROLE`.
        debias: c; None for 1 / (1-b1).
        kept_by: second moments by "element" (Adam's) or "block" (Adam-mini's).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    rank: int = 16
    momentum: tuple[tuple[str, Momentum], ...] = ()
    debias: float | None = None
    kept_by: SecondMoment = "element"

    name: ClassVar[str] = "adapm"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps", "debias")
    second_moment: ClassVar[str | None] = "exp_avg_sq"
    hint: ClassVar[str] = "AdamW, for a model that is no transformer"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"{self.name}: rank must be a whole number >= 1, got {self.rank!r}")
        if self.kept_by not in get_args(SecondMoment):
            raise ValueError(f"{self.name}: second_moment must be 'element' or 'block', got {self.kept_by!r}")

    @property
    def state(self) -> dict[str, Kind]:
        return {"exp_avg": "element", "exp_avg_sq": self.kept_by}

    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][1])

    def validate(self, group: Mapping[str, Any]) -> None:
        check_betas(self.name, group["betas"])
        check_nonnegative(self.name, eps=group["eps"])
        if group["debias"] is not None:
            check_nonnegative(self.name, debias=group["debias"])

    def kind_of(self, segment: Segment) -> Momentum:
        """The momentum that it keeps."""
        asked = dict(self.momentum).get(str(segment.role), BY_ROLE.get(str(segment.role), "full"))
        return "full" if not segment.is_matrix or (asked == "low_rank" and not self.fits(segment)) else asked

    def fits(self, segment: Segment) -> bool:
        """Whether the factors of its matrices are smaller than these."""
        if len(segment.inputs) != 1:
            return False
        rows, columns = segment.rows, segment.shape[segment.inputs[0]]
        return self.rank * (rows + columns) < rows * columns

    def assign(self, segment: Segment) -> tuple[Rule, Cut]:
        full: tuple[Rule, Cut] = AdamW(self.betas, self.eps), "element"
        if self.kept_by == "block":
            full = AdamMini(self.betas, self.eps).assign(segment)
        kind = self.kind_of(segment)
        if kind == "full":
            return full
        if kind == "none":
            return NoMomentum(self.betas, self.eps, self.kept_by), full[1]
        own = LowRank(self.betas, self.eps, self.kept_by, self.debias, self.rank, str(segment.role))
        return own, full[1]


def momentum_of(who: str, given: Any) -> tuple[tuple[str, Momentum], ...]:
    """What `momentum=` says, as pairs of a role and its momentum.

    Raises:
        TypeError, ValueError: for anything but a table of roles, or one word for all.
    """
    roles = sorted(str(role) for role in Role)
    if given is not None and given not in MOMENTUM and not isinstance(given, Mapping):
        kind = ValueError if isinstance(given, str) else TypeError
        raise kind(
            f"{who}: momentum must be a table of roles, such as {{'o': 'full'}}, or one of "
            f"{', '.join(map(repr, MOMENTUM))} for all, got {given!r}"
        )
    given = {} if given is None else dict.fromkeys(roles, given) if isinstance(given, str) else given
    for role, word in given.items():
        if role not in roles:
            raise ValueError(
                f"{who}: momentum is by role, and {role!r} is none{meant(role, roles)}; roles are {', '.join(roles)}"
            )
        if word not in MOMENTUM:
            raise ValueError(f"{who}: momentum of {role} must be one of {', '.join(map(repr, MOMENTUM))}, got {word!r}")
    return tuple(sorted((str(role), word) for role, word in given.items()))


def list_kept_in_full(who: str, rule: AdaPM, segments: Sequence[Segment]) -> None:
    """Say which matrices are too small for the rank."""
    asked = dict(rule.momentum)
    names = [
        s.name
        for s in segments
        if s.is_matrix and asked.get(str(s.role), BY_ROLE.get(str(s.role))) == "low_rank" and not rule.fits(s)
    ]
    if names:
        logger.warning(
            "%s: factors of rank %d would not be smaller than the matrix, whose momentum is kept in full: %s",
            who,
            rule.rank,
            ", ".join(dict.fromkeys(names)),
        )


__all__ = ["BY_ROLE", "MOMENTUM", "AdaPM", "LowRank", "NoMomentum"]
