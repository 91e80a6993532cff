"""Hyperball, the control of AdamH and MuonH: matrices stay on the sphere that they begin on ("Fantastic Pretraining
Optimizers and Where to Find Them 2.1: Hyperball Optimization", arXiv 2606.16899).

    W <- R normed(W - lr R normed(u)),    R = |W_0|

in Frobenius norms, of every hidden matrix: part of a fused parameter, and expert of a stack, each on its own. Nothing
of it decays. lr is about sqrt(lr wd) of AdamW's. Embeddings, head and vectors move, and decay, as without a control. So
does a matrix that begins at zero, until its root mean square is above 1e-3; that norm is held from then on.

| symbol | name | shape |
|---|---|---|
| R | held_norm | [matrices] |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharpwise.blocks import Segment
from sharpwise.controls.base import Control, Over, Sums, ratio


@dataclass(frozen=True)
class Hyperball(Control):
    """Hidden matrices of one norm, whose updates are lr of that norm."""

    name: ClassVar[str] = "hyperball"
    over: ClassVar[Over] = "matrix"
    holds: ClassVar[bool] = True

    def unit(self, segments: Sequence[Segment]) -> Over | None:
        return "matrix" if all(segment.is_hidden_matrix for segment in segments) else None

    def remark(self, weight_decay: float) -> str:
        held = "hidden matrices keep their norms and do not decay: weight_decay is for all else"
        return held if weight_decay else ""

    def factors(self, sums: Sums, s: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        radius, size = s["held"], sums.uu.sqrt()
        per_u = ratio(radius, size)
        k = s["lr"] * per_u
        square = sums.pp - 2 * k * sums.pu + k * k * sums.uu
        back = ratio(radius, torch.where(square < 0, 0.0, square).sqrt())
        holds = (radius > 0) & (s["lr"] > 0)
        one = torch.ones_like(radius)
        return torch.where(holds, per_u * back, one), torch.where(holds, back / s["decay"], one)
