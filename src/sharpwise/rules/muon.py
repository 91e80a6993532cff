"""Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982), with NorMuon's rows (Li et al., arXiv 2510.05491).

    M <- mu M + (1-mu) g          or  mu M + g  (heavy ball)
    X <- (1-mu) g + mu M          or  g + mu M  (Nesterov);  else M
    O <- the orthogonal factor U V^T of X = U S V^T, nearly: see `orthogonalize`
    v <- b2 v + (1-b2) mean(O^2) over each row;   O <- O / (sqrt(v) + 1e-10), back at its old norm      (NorMuon)
    p <- p (1 - lr wd) - lr s O

s = 0.2 sqrt(max(rows, columns)) gives updates the root mean square of AdamW's (`match_rms_adamw`); the older one is
sqrt(max(1, rows / columns)) (`original`). Rows are outputs, however the parameter lies.

Matrices are the projections of attention and MLP: each part of a fused one, each expert, on request each head of q, k
and v. Everything else is moved by AdamW, at lr times `aux_lr_ratio`, so that a schedule of lr moves both.

| symbol | name | shape |
|---|---|---|
| M | momentum_buffer | the parameter's |
| v | row_second_moment | [output rows of the parameter] |
| mu, b2 | momentum, beta2 | |

Departs: from torch's Muon in that a matrix is what the model multiplies by, where that takes tensors; in that its
products are in fp32 on the CPU.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Role, Segment
from sharpwise.blocks.roles import HIDDEN
from sharpwise.rules.adamw import AdamW
from sharpwise.rules.base import (
    Kind,
    MatrixRule,
    Rule,
    Scalars,
    State,
    add,
    check_betas,
    check_nonnegative,
    lerp,
    lr_ratio,
)
from sharpwise.rules.orthogonalize import newton_schulz, normalize_rows, polar_express

Scale = Literal["match_rms_adamw", "original"]
Method = Literal["newton_schulz", "polar_express"]
SCALES: dict[str, Any] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}


ORIGINAL_FROM, MATCHED_UP_TO = 2e-3, 1.5e-2
"""Below and above which an lr looks like one for the other scale."""
FIXED = {
    "scale": "scale", "adjust_lr_fn": "scale", "heavy_ball": "heavy_ball", "method": "method", "ns_steps": "steps",
    "normalize_rows": "rows", "per_head": "per_head", "precision": "precision", "bf16_exchange": "bf16_wire",
}  # fmt: skip
"""Keys that a group may bring, from a user or a file, and the fields of the rule that they have to agree with."""
logger = logging.getLogger(__name__)


class _AuxSettings(Mapping[str, Any]):
    """A group as AdamW reads it: what begins with `aux_` is its own."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.group = group

    def __getitem__(self, key: str) -> Any:
        if key == "lr":
            return self.group["lr"] * self.group["aux_lr_ratio"]
        if key == "weight_decay":
            own = self.group["aux_weight_decay"]
            return self.group["weight_decay"] if own is None else own
        return self.group[f"aux_{key}" if f"aux_{key}" in self.group else key]

    def __iter__(self) -> Iterator[str]:
        return iter({*(key.removeprefix("aux_") for key in self.group)} - {"lr_ratio"})

    def __len__(self) -> int:
        return len(set(self))


@dataclass(frozen=True)
class Aux(AdamW):
    """AdamW for what is no hidden matrix, with hyperparameters of its own."""

    def settings(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        return _AuxSettings(group)


@dataclass(frozen=True)
class Muon(MatrixRule):
    """Momentum made orthogonal for hidden matrices, and AdamW for the rest.

    Args:
        momentum, nesterov: mu, in [0, 1), and whether to look ahead by a step of it.
        aux_lr_ratio: lr of the AdamW half, in units of lr; aux_betas, aux_eps: as in AdamW; aux_weight_decay: None for
            that of the matrices.
        beta2: of the second moment of rows, in [0, 1); used with `rows`.
        heavy_ball: momentum sums up gradients, in place of averaging them.
        scale: of the update; method, steps: how the orthogonal factor is found.
        rows: normalize the rows of updates (NorMuon).
        per_head: each head of q, k and v is a matrix of its own.
        precision: "fp32" or "bf16" products; None for bf16 on CUDA, fp32 elsewhere.
        bf16_wire: matrices travel to their owner and back in bf16.
    """

    momentum: float = 0.95
    nesterov: bool = True
    aux_lr_ratio: float = 1.0
    aux_betas: tuple[float, float] = (0.9, 0.95)
    aux_eps: float = 1e-8
    aux_weight_decay: float | None = None
    beta2: float = 0.95
    heavy_ball: bool = False
    scale: Scale = "match_rms_adamw"
    method: Method = "newton_schulz"
    steps: int = 5
    rows: bool = False
    per_head: bool = False
    precision: Literal["fp32", "bf16"] | None = None
    bf16_wire: bool = False

    name: ClassVar[str] = "muon"
    hyperparameters: ClassVar[tuple[str, ...]] = (
        "momentum", "nesterov", "aux_lr_ratio", "aux_betas", "aux_eps", "aux_weight_decay", "beta2",
        "scale", "heavy_ball",  # fixed; saved, as the meaning of lr and of the momentum depends on them
    )  # fmt: skip
    hint: ClassVar[str] = "AdamW, for a model that is no transformer"

    def __post_init__(self) -> None:
        for key, allowed in (("scale", SCALES), ("method", ("newton_schulz", "polar_express"))):
            if (got := getattr(self, key)) not in allowed:
                raise ValueError(f"{self.name}: {key} must be one of {', '.join(map(repr, allowed))}, got {got!r}")
        if self.precision not in (None, "fp32", "bf16"):
            raise ValueError(f"{self.name}: precision must be None, 'fp32' or 'bf16', got {self.precision!r}")
        if type(self.steps) is not int or self.steps < 1:
            raise ValueError(f"{self.name}: steps must be a whole number >= 1, got {self.steps!r}")
        for key in ("heavy_ball", "normalize_rows", "per_head", "bf16_exchange"):
            if not isinstance(got := getattr(self, FIXED[key]), bool):
                raise TypeError(f"{self.name}: {key} must be True or False, got {got!r}")

    @property
    def wire(self) -> torch.dtype | None:  # type: ignore[override]
        return torch.bfloat16 if self.bf16_wire else None

    @property
    def state(self) -> dict[str, Kind]:
        return {"momentum_buffer": "element", **({"row_second_moment": "whole"} if self.rows else {})}

    @property
    def momentum_state(self) -> str | None:
        return "momentum_buffer"

    def shape_of(self, name: str, segments: Sequence[Segment]) -> tuple[int, ...]:
        return (sum(segment.copies * segment.rows for segment in segments),)

    def validate(self, group: Mapping[str, Any]) -> None:
        check_betas(f"{self.name}: aux", group["aux_betas"])
        own = group["aux_weight_decay"]
        check_nonnegative(self.name, **{k: group[k] for k in ("momentum", "aux_lr_ratio", "aux_eps", "beta2")})
        check_nonnegative(self.name, **({} if own is None else {"aux_weight_decay": own}))
        for key in ("momentum", "beta2"):
            if not isinstance(group[key], Tensor) and not group[key] < 1:
                raise ValueError(f"{self.name}: {key} must be in [0, 1), got {group[key]!r}")
        if not isinstance(group["nesterov"], bool):
            raise TypeError(f"{self.name}: nesterov must be True or False, got {group['nesterov']!r}")
        if "aux_lr" in group:
            raise ValueError(f"{self.name}: a group takes aux_lr_ratio, aux_lr over lr, in place of aux_lr")
        for key in (key for key in FIXED if key in group):
            own, got = getattr(self, FIXED[key]), group[key]
            got = "original" if key == "adjust_lr_fn" and got is None else got  # torch's None
            if own != got:
                raise ValueError(
                    f"{self.name}: {key} is fixed when the optimizer is built, here as {own!r}; a group has {got!r}. "
                    f"Build the optimizer with that"
                )

    def assign(self, segment: Segment) -> tuple[Rule, Cut]:
        if not segment.is_hidden_matrix:
            return Aux(self.aux_betas, self.aux_eps), "element"
        return self, "head" if self.per_head and segment.role in (Role.Q, Role.K, Role.V) else "tensor"

    def place(self, segments: Sequence[Segment]) -> list[tuple[Rule, Cut]]:
        """A parameter is moved by one of the two: by AdamW, unless all of it are hidden matrices."""
        if all(segment.is_hidden_matrix for segment in segments):
            return super().place(segments)
        return [(Aux(self.aux_betas, self.aux_eps), "element") for _ in segments]

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        mu = group["momentum"]
        return {"mu": mu, "one_minus_mu": 1 - mu, "b2": group["beta2"]}

    def input(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        old, mu = state["momentum_buffer"], s["mu"]
        m = old * mu + g if self.heavy_ball else lerp(old, g, s["one_minus_mu"])
        ahead = add(g, m, mu) if self.heavy_ball else lerp(g, m, mu)
        return {"momentum_buffer": m}, ahead if self.nesterov else m

    def owner(self, m: Tensor, small: State, s: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        scale = SCALES[self.scale](*m.shape[-2:])
        how: dict[str, Any] = {"precision": self.precision, "scale": 1.0 if self.rows else scale, "out": m}
        u = newton_schulz(m, self.steps, **how) if self.method == "newton_schulz" else polar_express(m, **how)
        new = {}
        if self.rows:
            u, v = normalize_rows(u, small["row_second_moment"], s["b2"])
            u, new = u.mul_(scale), {"row_second_moment": v}
        return u, new


def aux_lr_ratio(who: str, lr: Any, aux_lr: Any, scale: Scale) -> float:
    """lr of the AdamW half in units of lr; says where lr looks like one for the other scale.

    Raises:
        TypeError, ValueError: as `lr_ratio`; for no `aux_lr` where scales differ.
    """
    ratio, own = lr_ratio(who, lr, aux_lr), float(lr)
    if scale == "original" and 0 < own < ORIGINAL_FROM:
        logger.warning(
            "%s: lr=%g looks like one for scale='match_rms_adamw': with scale='original' it is in units of the "
            "spectral norm, about 0.02",
            who,
            own,
        )
    if scale == "match_rms_adamw" and own > MATCHED_UP_TO:
        logger.warning(
            "%s: lr=%g looks like one for scale='original': with scale='match_rms_adamw' it is AdamW's, about 1e-3",
            who,
            own,
        )
    if aux_lr is None and scale == "original":
        raise ValueError(f"{who}: scale='original' measures lr in other units than AdamW; give aux_lr, say 1e-3")
    return ratio


def list_left_out(who: str, segments: Sequence[Segment]) -> None:
    """Say which parameters of attention and MLP are no matrices."""
    names = [s.name for s in segments if s.role in HIDDEN and not s.bias and not s.is_hidden_matrix]
    if names:
        logger.warning(
            "%s: no matrices with two sides above 1, moved by AdamW: %s", who, ", ".join(dict.fromkeys(names))
        )
