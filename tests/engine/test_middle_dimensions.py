"""Parameters whose output dimension lies in the middle: [width, heads, size]."""

import numpy as np
import pytest
import torch
from blocks.hand_made import HEAD, HEADS, IDS, LM, SIZE, Attention, Block
from torch import Tensor, nn

import sharpwise
from sharpwise.block_lr import PerRole
from sharpwise.blocks import Role
from sharpwise.blocks.trace.rows import Ledger
from sharpwise.combinations import APART


class Kernels(Attention):
    """Queries, keys and values by einsum."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkv":
            setattr(self, name, nn.Parameter(torch.randn(SIZE, HEADS, HEAD) / 5))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bhtk", x, getattr(self, name)) for name in "qkv")
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def stepped(name: str, **options: object) -> tuple[Tensor, Tensor]:
    """The queries and their gradient; the queries after a step of 0.1."""
    torch.manual_seed(0)
    model = LM(Block(Kernels()))
    optimizer = sharpwise.create_optimizer(model, name, lr=0.1, compile=False, **options)
    model(IDS).square().mean().backward()
    q = model.layers[0].mixer.q
    before, grad = q.detach().clone(), q.grad.clone()
    optimizer.step()
    return grad, q.detach() - before


def test_roles_have_their_rates() -> None:
    grad, moved = stepped("adamw", block_lr=PerRole({"q": 3.0}), weight_decay=0.0, eps=0.0)
    torch.testing.assert_close(moved, -0.3 * grad.sign())


def test_adam_mini_takes_them_for_one_block() -> None:
    grad, moved = stepped("adam-mini", cut="tensor", weight_decay=0.0, eps=0.0)
    torch.testing.assert_close(moved, -0.1 * grad / grad.square().mean().sqrt())


@pytest.mark.parametrize("name", [n for n in sharpwise.list_optimizers() if n not in ("adam-mini", "lionar", *APART)])
def test_every_optimizer_moves_them(name: str) -> None:
    assert stepped(name, block_lr=PerRole({"q": 3.0}))[1].abs().sum() > 0


def test_what_goes_by_rows_refuses_them() -> None:
    with pytest.raises(ValueError, match=r"output dimension 1 of shape \(24, 4, 6\) .*cut='tensor'"):
        stepped("adam-mini")
    with pytest.raises(ValueError, match=r"bounds every row of layers.0.mixer.q.*'dim': 0"):
        stepped("lionar")


def test_a_kernel_of_one_output_has_its_outputs_first() -> None:
    ledger, none = Ledger((1, 3, 1)), np.zeros(1, dtype=np.int64)
    ledger.assign((none, None, none), Role.CONV, "a convolution")
    assert [(s.role, s.dim) for s in ledger.segments("mix")] == [(Role.CONV, 0)]
