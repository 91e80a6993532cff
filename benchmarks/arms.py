"""What is timed: one literal list of optimizers, all built on the same parameters and gradients."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import sharpwise

LR, WEIGHT_DECAY = 1e-6, 0.1

# Bytes per element that a step cannot avoid, fp32: each of p, g and the moments is read, all but g are written.
ADAMW, MINI = 28, 20
CLIPPED = 4  # the gradient is read once more: its norm must be known before the first element is written


@dataclass(frozen=True)
class Arm:
    """An optimizer to time.

    Args:
        name: how tables and results call it.
        build: makes the optimizer from a model.
        bytes_per_element: what its step has to move, per parameter element.
        clip: norm that torch clips the gradients to before the step, None for no such pass.
        slow: takes part in every third round only.
        reads_gradients: how many times a step reads them: twice where their norm comes first.
    """

    name: str
    build: Callable[[nn.Module], torch.optim.Optimizer]
    bytes_per_element: int
    clip: float | None = None
    slow: bool = False
    reads_gradients: int = 1


def adam_mini_package(model: nn.Module) -> torch.optim.Optimizer:
    from adam_mini import Adam_mini

    config: Any = model.config
    with contextlib.redirect_stdout(io.StringIO()):  # it lists every parameter
        return Adam_mini(
            model.named_parameters(),
            lr=LR,
            weight_decay=WEIGHT_DECAY,
            dim=config.n_embd,
            n_heads=config.n_head,
            verbose=False,
        )


def pytorch_optimizer_mini(model: nn.Module) -> torch.optim.Optimizer:
    from pytorch_optimizer import AdamMini

    config: Any = model.config
    return AdamMini(model, lr=LR, weight_decay=WEIGHT_DECAY, num_embeds=config.n_embd, num_heads=config.n_head)


def torch_adamw(**kind: bool) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, **kind)


def sharpwise_adamw(**options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: sharpwise.AdamW(model, lr=LR, weight_decay=WEIGHT_DECAY, **options)


def sharpwise_rule(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: kind(model, lr=LR, weight_decay=WEIGHT_DECAY, **options)


BASE = "torch AdamW fused"
CLIPPED_BASE = "torch clip + AdamW fused"
GUARD: dict[str, Any] = {"max_grad_norm": 1.0, "on_nonfinite": "skip"}
ARMS = [
    Arm(BASE, torch_adamw(fused=True), ADAMW),
    Arm("torch AdamW foreach", torch_adamw(foreach=True), ADAMW, slow=True),
    Arm("sharpwise AdamW", sharpwise_adamw(), ADAMW),
    Arm("sharpwise AdamW BlockwiseLR", sharpwise_adamw(block_lr="blockwise"), ADAMW),
    Arm(CLIPPED_BASE, torch_adamw(fused=True), ADAMW + CLIPPED, clip=1.0),
    Arm("sharpwise AdamW clip skip", sharpwise_adamw(**GUARD), ADAMW + CLIPPED),
    Arm("sharpwise AdamMini", lambda model: sharpwise.AdamMini(model, lr=LR, weight_decay=WEIGHT_DECAY), MINI),
    Arm("adam-mini package", adam_mini_package, MINI, slow=True),
    Arm("pytorch_optimizer AdamMini", pytorch_optimizer_mini, MINI, slow=True),
]
# Rules that have a page of their own, and Lion under each control: `step_time.py --further`.
FURTHER = [
    Arm(BASE, torch_adamw(fused=True), ADAMW),
    Arm("sharpwise AdamMini", sharpwise_rule(sharpwise.AdamMini), MINI),
    Arm("sharpwise BlockwiseAdam rows", sharpwise_rule(sharpwise.BlockwiseAdam, cut="row"), MINI),
    Arm(
        "sharpwise AdaPM r=16, block v", sharpwise_rule(sharpwise.AdaPM, rank=16, second_moment="block"), 12, slow=True
    ),
    Arm("sharpwise Lion", sharpwise_rule(sharpwise.Lion), MINI),
    Arm("sharpwise Lion l2", sharpwise_rule(sharpwise.Lion, control="l2"), MINI),
    Arm("sharpwise Lion angular", sharpwise_rule(sharpwise.Lion, control="angular"), MINI),
    Arm("sharpwise Lion hyperball", sharpwise_rule(sharpwise.Lion, control="hyperball"), 32),
]
# Of these there are few bytes to move; what is timed is what a step does besides.
TINY_ARMS = [
    Arm(CLIPPED_BASE, torch_adamw(fused=True), ADAMW + CLIPPED, clip=1.0),
    Arm(BASE, torch_adamw(fused=True), ADAMW),
    Arm("sharpwise AdamW", sharpwise_adamw(), ADAMW),
    Arm("sharpwise AdamW clip skip", sharpwise_adamw(**GUARD), ADAMW + CLIPPED),
    Arm("sharpwise AdamW BlockwiseLR clip skip", sharpwise_adamw(block_lr="blockwise", **GUARD), ADAMW + CLIPPED),
    Arm("sharpwise AdamMini", lambda model: sharpwise.AdamMini(model, lr=LR, weight_decay=WEIGHT_DECAY), MINI),
]
# Further ratios, in the same rounds: an arm, and what else than the base it is to be held against.
PAIRS = [
    ("sharpwise AdamW clip skip", CLIPPED_BASE),
    ("adam-mini package", "sharpwise AdamMini"),
    ("pytorch_optimizer AdamMini", "sharpwise AdamMini"),
    ("sharpwise BlockwiseAdam rows", "sharpwise AdamMini"),
    *((f"sharpwise Lion {control}", "sharpwise Lion") for control in ("l2", "angular", "hyperball")),
]
# On a device; bytes are counted from the tensors there.
DEVICE_ARMS = [
    Arm(BASE, torch_adamw(fused=True), ADAMW),
    Arm("torch AdamW foreach", torch_adamw(foreach=True), ADAMW),
    Arm("sharpwise AdamW", sharpwise_adamw(), ADAMW),
    Arm("sharpwise AdamW BlockwiseLR", sharpwise_adamw(block_lr="blockwise"), ADAMW),
    Arm("sharpwise AdamW bf16 state", sharpwise_adamw(storage="bf16", stochastic_rounding=True), 20),
    Arm("sharpwise AdamW cautious decay", sharpwise_adamw(cautious_decay=True), ADAMW),
    Arm(CLIPPED_BASE, torch_adamw(fused=True), ADAMW + CLIPPED, clip=1.0, reads_gradients=2),
    Arm("sharpwise AdamW clip skip", sharpwise_adamw(**GUARD), ADAMW + CLIPPED, reads_gradients=2),
    Arm("sharpwise AdamMini", lambda model: sharpwise.AdamMini(model, lr=LR, weight_decay=WEIGHT_DECAY), MINI),
    Arm("sharpwise Lion", lambda model: sharpwise.Lion(model, lr=LR, weight_decay=WEIGHT_DECAY), 20),
    Arm("sharpwise SGD", lambda model: sharpwise.SGD(model, lr=LR, momentum=0.9, weight_decay=WEIGHT_DECAY), 20),
]
BY_NAME = {arm.name: arm for arm in (*ARMS, *FURTHER)}

# First-step time and memory are measured for these, each in processes of its own.
COLD = ["sharpwise AdamW", "sharpwise AdamW BlockwiseLR", "sharpwise AdamW clip skip", "sharpwise AdamMini", BASE]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors, each storage counted once (an optimizer may keep views of one buffer)."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
