"""Adam-mini: Use Fewer Learning Rates To Gain More (Zhang et al., arXiv 2406.16793).

    v_B <- b2 v_B + (1-b2) mean_B(g^2)        one number per block B
    m   <- b1 m + (1-b1) g
    p   <- p (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v_B / (1-b2^t)) + eps)

Blocks: token embedding and output head by token; q and k by head; v, o and MLP by output row; norms, position
embedding and the rest by tensor; biases by element (there it is AdamW).

| symbol | name | shape |
|---|---|---|
| m | exp_avg | the parameter's |
| v_B | exp_avg_sq | [n_blocks], in the order of the parameter's segments |

v_B is in fp32, as AdamW's v is. Where (1-b2) mean_B(g^2) is beyond it (at b2 = 0.999 above a root mean square of
5.8e20) it becomes infinite, and the block stands still from then on, as an element of AdamW does in torch. Clipping
prevents it: with `max_grad_norm` the mean is scaled before it is rounded.

Departs: from the authors' package, which finds blocks by substring and head sizes as dim/n_heads. Here a fused QKV is
cut by its heads, and q and k rows of a low-rank adapter, which hold no head, are one block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sharpwise.blocks import Cut, Role, Segment
from sharpwise.rules.adamw import AdamW
from sharpwise.rules.base import Kind, Rule, Scalars, State, divide, lerp

_BY_ROW = {Role.TOK_EMB, Role.PATCH_EMB, Role.HEAD, Role.V, Role.O, Role.O_GATE}
_BY_ROW |= {Role.GATE, Role.UP, Role.DOWN, Role.ROUTER}


@dataclass(frozen=True)
class AdamMini(Rule):
    """AdamW with one second moment per block.

    Args:
        betas, eps: as in AdamW.
        v_by: cut of the value projection; "tensor" for short runs (below 10k to 20k steps), as the authors advise.
        cut: "tensor" for models that are not transformers (one block per tensor), "element" for AdamW itself.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    v_by: Cut = "row"
    cut: Cut | None = None

    name: ClassVar[str] = "adam-mini"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps")
    second_moment: ClassVar[str | None] = "exp_avg_sq"
    first_moment: ClassVar[str | None] = "exp_avg"
    hint: ClassVar[str] = "cut='tensor' for a model that is no transformer: one block per tensor"

    def __post_init__(self) -> None:
        if self.v_by not in ("row", "tensor"):
            raise ValueError(f"{self.name}: v_by must be 'row' or 'tensor', got {self.v_by!r}")
        if self.cut not in (None, "tensor", "element"):
            raise ValueError(f"{self.name}: cut must be None (by role), 'tensor' or 'element', got {self.cut!r}")

    @property
    def state(self) -> dict[str, Kind]:
        return {"exp_avg": "element", "exp_avg_sq": "block"}

    def assign(self, segment: Segment) -> tuple[Rule, Cut]:
        cut = self.cut or self._cut_by_role(segment)
        return (AdamW(self.betas, self.eps), "element") if cut == "element" else (self, cut)

    def _cut_by_role(self, segment: Segment) -> Cut:
        if segment.bias:
            return "element"
        if segment.role in (Role.Q, Role.K):
            return "tensor" if segment.source.endswith("+lora") and segment.heads is None else "head"
        if segment.role == Role.V:
            return self.v_by
        return "row" if segment.role in _BY_ROW else "tensor"

    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][1])

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        return AdamW().scalars(t, group)

    def block_phase(self, blocks: State, mean_square: Tensor, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        v = blocks["exp_avg_sq"] * s["b2"] + s["one_minus_b2"] * mean_square
        return {"exp_avg_sq": v}, divide(v.sqrt(), s["root_correction2"]) + s["eps"]

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        m = lerp(state["exp_avg"], g, s["one_minus_b1"])
        return {"exp_avg": m}, m, None
