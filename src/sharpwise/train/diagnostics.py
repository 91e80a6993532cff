"""How far each role moves in a step, and by which multiplier: what a run notes down at a cadence."""

from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.blocks import BlockMap, canonical_name
from sharpwise.engine.mesh import is_dtensor


class UpdateSizes:
    """The size of one update per role. Make it before the optimizer's step; it keeps a copy of the parameters.

    Where processes hold parts of them, each process gathers one parameter at a time.
    """

    def __init__(self, model: nn.Module, blocks: BlockMap) -> None:
        self.blocks = blocks
        self.after = {canonical_name(n): p for n, p in model.named_parameters() if canonical_name(n) in blocks}
        self.before = {name: p.detach().clone() for name, p in self.after.items()}

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], dict[str, float]]:
        """After the step, per role: the root mean square of the update in units of the parameter, and the norm of the
        update over that of the parameters before it."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for name, before in self.before.items():
            whole = whole_of(before)
            moved = (whole_of(self.after[name].detach()) - whole).float()
            for segment in self.blocks[name]:
                both = [moved, whole.float()]
                if not (segment.whole and segment.count == 1):
                    rows = segment.row_index(moved.device)
                    both = [t.index_select(segment.dim, rows) for t in both]
                squares = torch.stack([t.square().sum(dtype=torch.float64) for t in both])
                role = str(segment.role)
                sums[role] = sums[role] + squares if role in sums else squares
                counts[role] = counts.get(role, 0) + segment.numel
        if not sums:
            return {}, {}
        values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        rms = {role: (update / counts[role]) ** 0.5 for role, (update, _) in values.items()}
        relative = {role: (update / size) ** 0.5 for role, (update, size) in values.items() if size > 0}
        return rms, relative


def whole_of(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if they hold parts of it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def multipliers_by_role(optimizer: Any) -> dict[str, float | list[float]]:
    """The multiplier of the learning rate of each role; a list where layers differ, in their order, the rest last."""
    found: dict[str, dict[float, float]] = {}
    for row in optimizer.lr_multipliers():
        layer = float("inf") if row["layer"] is None else row["layer"]
        found.setdefault(str(row["role"]), {})[layer] = float(row["multiplier"])
    result: dict[str, float | list[float]] = {}
    for role, by_layer in found.items():
        values = [by_layer[layer] for layer in sorted(by_layer)]
        result[role] = values[0] if len(set(values)) == 1 else values
    return result
