"""Torch's fused kernel under clipping, and the sums of small models, against the eager reference."""

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.engine import backends
from sharpwise.engine.backends import fused
from sharpwise.engine.norms import RUN, quick_row_squares, row_squares
from sharpwise.testing import TinyGPT, fill_gradients, same, tiny_model


def model_of(sizes):
    model = nn.Module()
    generator = torch.Generator().manual_seed(0)
    for i, size in enumerate(sizes):
        model.register_parameter(f"w{i}", nn.Parameter(torch.randn(size, generator=generator)))
    return model


@pytest.mark.parametrize("scratch", [1, 100, 1 << 19], ids=lambda n: f"scratch of {n}")
@pytest.mark.parametrize("block_lr", [None, "blockwise"])
def test_clipped_in_batches_is_eager(scratch, block_lr, monkeypatch):
    """Tensors cut, several to a batch, or all in one; the gradients stay as they are."""
    monkeypatch.setattr(fused, "SCRATCH", scratch)
    monkeypatch.setitem(backends.ORDER, "cpu", ("torch",))  # a device's, tried where there is one
    models = [tiny_model() for _ in range(2)]
    options = {"lr": 1e-2, "weight_decay": 0.1, "block_lr": block_lr, "max_grad_norm": 0.3, "on_nonfinite": "skip"}
    first, second = (sharpwise.AdamW(m, **options, compile=c) for m, c in zip(models, (None, False), strict=True))
    for step in range(4):
        skip = ["transformer.wpe.weight"] if step == 1 else []
        for model, optimizer in zip(models, (first, second), strict=True):
            fill_gradients(model, step, skip)
            before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            optimizer.step()
            for p, g in zip(model.parameters(), before, strict=True):
                assert (p.grad is None and g is None) or torch.equal(p.grad, g)
    assert {row["backend"] for row in first.explain()} == {"torch"}
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()
        for key, value in first.state[p].items():
            assert (value - second.state[q][key]).norm() <= 1e-6 * value.norm(), key


def test_no_clipping_needed_is_no_clipping():
    """A factor of 1 is no reason to copy: the same bits."""
    models = [tiny_model() for _ in range(2)]
    first, second = (sharpwise.AdamW(m, lr=1e-2, max_grad_norm=c) for m, c in zip(models, (1e9, None), strict=True))
    for step in range(3):
        for model, optimizer in zip(models, (first, second), strict=True):
            fill_gradients(model, step)
            optimizer.step()
    assert same(*models)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("sizes", [[(0,), (1,)], [(RUN,)], [(777,), (70, 500)], [(300, 1024), (5, 3000)]])
def test_norm_keeps_its_digits(sizes, constant):
    """fp32 squares are added in fp32 in short runs only: equal addends are the worst case."""
    model = model_of(sizes)
    optimizer = sharpwise.SGD(model, lr=0.0, max_grad_norm=1.0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1237) if constant else torch.randn(p.shape, generator=generator)
    optimizer.step()
    exact = torch.cat([p.grad.double().view(-1) for p in model.parameters()]).norm()
    assert abs(optimizer.grad_norm / exact - 1) <= 1e-6


@pytest.mark.parametrize("shape", [(5, 7), (200, 96), (300, 3000), (2000, 768), (64, 2**12 + 1), (0, 64), (64, 0)])
@pytest.mark.parametrize("dim", [0, 1])
def test_quick_sums_are_the_exact_ones(shape, dim):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = row_squares(g, dim)
    assert ((quick_row_squares(g, dim) - exact).abs() <= 1e-6 * exact).all()


@pytest.mark.parametrize(
    ("build", "options"),
    [(sharpwise.AdamW, {"max_grad_norm": 1.0}), (sharpwise.AdamMini, {}), (sharpwise.AdamMini, {"max_grad_norm": 1.0})],
    ids=["update", "one pass", "two passes"],
)
def test_autograd_notices_compiled_steps(build, options):
    """Graphs and torch's kernel write what autograd may have saved; a backward pass through what was is an error."""
    model = TinyGPT(width=256, heads=16, vocabulary=300)
    optimizer = build(model, lr=1e-2, compile=True, **options)
    for step in range(2):
        fill_gradients(model, step)
        with torch.enable_grad():
            losses = [p.square().sum() for p in model.parameters()]
        optimizer.step()
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    assert optimizer.compiled_graphs > 0
