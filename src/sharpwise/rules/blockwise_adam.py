"""Adam with one second moment per block of any partition (Xie et al., arXiv 2410.08198).

    v_B <- b2 v_B + (1-b2) mean_B(g^2)        one number per block B
    m   <- b1 m + (1-b1) g
    p   <- p (1 - lr wd) - lr (m / (1-b1^t)) / (sqrt(v_B / (1-b2^t)) + eps)

| cut | blocks | |
|---|---|---|
| element | every element | AdamW |
| row | every output row; elements of norms and biases | |
| head | q, k and v by head, the rest as Adam-mini has it | Adam-mini, but for v |
| tensor | every part of a parameter with one role | Adam-mini with `cut="tensor"` |
| layer | every layer; outside of the layers as tensor | |
| role | every role, over all layers | |
| model | one | AdaSGD |

| symbol | name | shape |
|---|---|---|
| m | exp_avg | the parameter's |
| v_B | exp_avg_sq | [n_blocks]; of a block that spans parameters each has a copy, per part with one role |

A block that spans parameters is averaged over those that have a gradient in a step; the others stand still, their
copies of v_B too.

Departs: from the released code, whose AdaSGD has a block per parameter group; here it is the model, however grouped.
From the paper, which adds eps to the mean of squares: here it is added to the root, as in Adam.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sharpwise.blocks import Cut, Role, Segment
from sharpwise.blocks.segment import CUTS
from sharpwise.rules.adam_mini import AdamMini
from sharpwise.rules.adamw import AdamW
from sharpwise.rules.base import Kind, Rule, Scalars, State, check_betas, check_nonnegative


@dataclass(frozen=True)
class BlockwiseAdam(Rule):
    """Adam with one second moment per block of any partition.

    Args:
        betas, eps: as in AdamW.
        cut: into blocks: "element", "row", "head", "tensor", "layer", "role" or "model".
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    cut: Cut = "tensor"

    name: ClassVar[str] = "blockwise-adam"
    hyperparameters: ClassVar[tuple[str, ...]] = ("betas", "eps", "cut")
    second_moment: ClassVar[str | None] = "exp_avg_sq"
    hint: ClassVar[str] = "cut='element', 'row', 'tensor' or 'model', which need to know nothing of the model"

    def __post_init__(self) -> None:
        if self.cut not in CUTS:
            raise ValueError(f"{self.name}: cut must be one of {', '.join(CUTS)}, got {self.cut!r}")

    @property
    def momentum_state(self) -> str | None:
        return "exp_avg"

    @property
    def state(self) -> dict[str, Kind]:
        return AdamMini().state

    def validate(self, group: Mapping[str, Any]) -> None:
        check_betas(self.name, group["betas"])
        check_nonnegative(self.name, eps=group["eps"])

    def assign(self, segment: Segment) -> tuple[Rule, Cut]:
        cut = self.cut
        if cut == "head":
            _, cut = AdamMini().assign(segment)
            cut = "head" if segment.role == Role.V and cut == "row" and segment.heads else cut
        return (AdamW(self.betas, self.eps), "element") if cut == "element" else (self, cut)

    def second_moment_decay(self, group: Mapping[str, Any]) -> float:
        return float(group["betas"][1])

    def scalars(self, t: Any, group: Mapping[str, Any]) -> dict[str, Any]:
        return AdamW().scalars(t, group)

    def block_phase(self, blocks: State, mean_square: Tensor, s: Scalars) -> tuple[dict[str, Tensor], Tensor]:
        return AdamMini().block_phase(blocks, mean_square, s)

    def direction(self, g: Tensor, state: State, s: Scalars) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        return AdamMini().direction(g, state, s)
