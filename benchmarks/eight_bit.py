"""AdamW with 8-bit state, ours and that of other libraries: how each is built, and how far its steps are from fp32."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import sharpwise

LR, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1
Build = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Arm:
    """An optimizer to time or to compare.

    Args:
        name: how tables and results call it.
        build: makes the optimizer of a model at a learning rate.
        package: that it needs, "" for none.
    """

    name: str
    build: Build
    package: str = ""

    @property
    def missing(self) -> str:
        """Why it cannot be built here, "" where it can."""
        there = not self.package or importlib.util.find_spec(self.package) is not None
        return "" if there else f"{self.package} is not installed"


def adamw(**options: Any) -> Build:
    return lambda model, lr=LR: sharpwise.AdamW(model, lr, BETAS, weight_decay=WEIGHT_DECAY, **options)


def bitsandbytes(model: nn.Module, lr: float = LR) -> torch.optim.Optimizer:
    """Blocks of 256 over the flat tensor, dynamic codes; tensors below 4096 elements stay in fp32."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)  # type: ignore[no-any-return]


def torchao(model: nn.Module, lr: float = LR) -> torch.optim.Optimizer:
    """The same format; its first step compiles the step of a tensor once for every shape."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)  # type: ignore[no-any-return]


def torch_adamw(model: nn.Module, lr: float = LR) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


FP32 = Arm("sharpwise AdamW", adamw())
DYNAMIC = Arm("sharpwise AdamW int8-dynamic", adamw(storage="int8-dynamic", keep_fp32=()))
PEERS = [
    Arm("bitsandbytes AdamW8bit", bitsandbytes, package="bitsandbytes"),
    Arm("torchao AdamW8bit compiled", torchao, package="torchao"),
]
TORCH = Arm("torch AdamW fused", torch_adamw)
ARMS = [FP32, DYNAMIC, *PEERS, TORCH]


# --- the part of Muon that goes element by element -------------------------------------------------------------------


def muon(**options: Any) -> Build:
    """Muon as it is; what is made orthogonal is left out within `elements_alone`."""
    return lambda model, lr=LR: sharpwise.Muon(model, lr, weight_decay=WEIGHT_DECAY, blocks=MATRICES, **options)


MATRICES = {f"*.{name}": name for name in ("q", "k", "v", "o", "up", "down")}
MUON_FP32 = Arm("sharpwise Muon, elements", muon())
MUON_LINEAR = Arm("sharpwise Muon int8-linear, elements", muon(storage="int8-linear"))
MATRIX_ARMS = [MUON_FP32, MUON_LINEAR, *PEERS, TORCH]


@contextmanager
def elements_alone() -> Iterator[None]:
    """Matrices stay what their momentum made of them: a step of Muon is then all but Newton-Schulz."""

    def as_it_is(m: Tensor, *_: Any, **__: Any) -> Tensor:
        return m

    with patch("sharpwise.rules.muon.newton_schulz", as_it_is):
        yield


# --- distance from fp32 ----------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Matrices whose rows have very different gradients, as those of models do, and a vector.

    A block of 256 is a part of one row of `wide`, and two rows of `narrow`. Of `table`, an embedding, nine in ten rows
    have no gradient at a step: a second moment that was rounded to 0 stays there, and what is left of the momentum is
    divided by eps.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"wide": (128, 1024), "narrow": (1024, 128), "table": (512, 256), "vector": (768,)}.items():
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(shape, generator=generator)))


def gradients(model: nn.Module, steps: int, seed: int = 0) -> Iterator[list[Tensor]]:
    """Of every parameter at every step: means and noise in rows whose sizes spread over three decades."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    sizes = {name: 1e-3 * 10 ** (0.75 * normal(shape[0], *[1] * (len(shape) - 1))) for name, shape in shapes.items()}
    means = {name: 0.3 * normal(*shape) for name, shape in shapes.items()}
    for _ in range(steps):
        found = {name: sizes[name] * (means[name] + normal(*shape)) for name, shape in shapes.items()}
        found["table"] *= torch.rand(shapes["table"][0], 1, generator=generator) < 0.1
        yield [*found.values()]


def distance(arm: Arm, steps: int = 20, seed: int = 0) -> dict[str, dict[str, float]]:
    """How far parameters are from those of torch's AdamW in fp32, after so many steps on the same gradients.

    Returns:
        By name of the parameter, with q that of fp32 and s where both began: `largest`, max |p - q| / max |q|; `norm`,
        |p - q| / |q|; `of_way`, |p - q| / |q - s|.
    """
    ours, theirs, start = Parts(), Parts(), Parts()
    pairs = [(ours, arm.build(ours)), (theirs, torch_adamw(theirs))]
    for found in gradients(ours, steps, seed):
        for model, optimizer in pairs:
            for p, g in zip(model.parameters(), found, strict=True):
                p.grad = g.clone()
            optimizer.step()
    rows = {}
    for (name, p), q, s in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        apart = (p.detach() - q.detach()).double()
        size = float(apart.norm())
        rows[name] = {
            "largest": float(apart.abs().max() / q.detach().abs().max()),
            "norm": size / float(q.detach().norm()),
            "of_way": size / float((q - s).detach().norm()),
        }
    return rows
