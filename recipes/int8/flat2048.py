"""AdamW with its state in flat blocks of 2,048 and linear codes, a reference arm for `sharpwise compare`.

sharpwise cuts blocks within lines, and lines are as short as rows are: 128 elements in the model of this recipe. The
paper on 8-bit Muon (arXiv 2509.23106), which says that linear codes of the second moment fail, has 2,048 elements in a
block, whatever rows these are of. This is that, from its definition, in plain torch operations:

    m <- b1 m + (1 - b1) g          v <- b2 v + (1 - b2) g^2          p <- p (1 - lr wd)
    p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

in fp32, then, for each block of the flat tensor with a its largest absolute value,

    m -> round(127 m / a), int8     v -> round(255 v / a), uint8     a in fp32; where a = 0 codes are 0

Tensors of fewer than 4,096 elements keep fp32 state, as in bitsandbytes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

BLOCK, SMALLEST = 2048, 4096
LEVELS = {"exp_avg": 127, "exp_avg_sq": 255}
CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}


class FlatLinearAdamW8bit(torch.optim.Optimizer):
    """AdamW of fp32 parameters, decay decoupled; state per parameter: `step`, and codes and `_absmax` of both moments.

    Args:
        params: tensors or groups of them, fp32.
        lr: step size, in units of the parameter per step.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: an element shrinks by lr * weight_decay per step.

    Raises:
        ValueError: for parameters of another type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            if other := {str(p.dtype) for p in group["params"]} - {"torch.float32"}:
                raise ValueError(f"FlatLinearAdamW8bit: parameters must be fp32, got {', '.join(sorted(other))}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, p.grad, group)

    def _move(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        t = state["step"] = state.get("step", 0) + 1
        (b1, b2), lr = group["betas"], group["lr"]
        m = b1 * _read(state, "exp_avg", p) + (1 - b1) * g
        v = b2 * _read(state, "exp_avg_sq", p) + (1 - b2) * g * g
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + group["eps"]))
        _write(state, "exp_avg", m)
        _write(state, "exp_avg_sq", v)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts state to the type of the parameter: codes, whole numbers up to 255, are cast back."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            for name, dtype in CODES.items():
                if name in state and p.numel() >= SMALLEST:
                    state[name] = state[name].to(dtype)


def _read(state: dict[str, Any], name: str, p: Tensor) -> Tensor:
    """A moment in fp32, zeros before the first step."""
    if name not in state:
        return torch.zeros_like(p)
    if p.numel() < SMALLEST:
        return state[name]  # type: ignore[no-any-return]
    scale = state[f"{name}_absmax"] / LEVELS[name]
    return (_blocks(state[name].float()) * scale[:, None]).flatten()[: p.numel()].view_as(p)


def _write(state: dict[str, Any], name: str, x: Tensor) -> None:
    """Keep a moment: in codes, or as it is where the tensor is small."""
    if x.numel() < SMALLEST:
        state[name] = x
        return
    blocks = _blocks(x)
    absmax = blocks.abs().amax(1)
    codes = torch.round(LEVELS[name] * (blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]))
    state[name] = codes.to(CODES[name]).flatten()[: x.numel()].view_as(x)
    state[f"{name}_absmax"] = absmax


def _blocks(x: Tensor) -> Tensor:
    """The flat tensor, [blocks, 2048], zeros behind its end."""
    flat = x.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
