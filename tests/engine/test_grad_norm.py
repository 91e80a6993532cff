"""The norm that the step measured is there to be logged: of the whole gradient, before clipping, skipped or not."""

import math

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.combinations import APART
from sharpwise.testing import TinyGPT, fill_gradients, run, same, tiny_model

OPTIONS = {
    "clip": {"max_grad_norm": 0.5},
    "clip, no clipping needed": {"max_grad_norm": 1e6},
    "skip": {"on_nonfinite": "skip"},
    "raise": {"on_nonfinite": "raise"},
    "both": {"max_grad_norm": 0.5, "on_nonfinite": "skip"},
    "both, eager": {"max_grad_norm": 0.5, "on_nonfinite": "skip", "compile": False},
    "both, by block": {"max_grad_norm": 0.5, "on_nonfinite": "skip", "block_lr": "blockwise"},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", [name for name in sharpwise.list_optimizers() if name not in APART])
def test_is_the_norm_before_clipping(name, options, dtype):
    model = tiny_model(dtype)
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-3, **options)
    assert optimizer.grad_norm is None
    for step in range(3):
        fill_gradients(model, step, skip=["transformer.wpe.weight"] if step == 1 else ())
        exact = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None))
        optimizer.step()
        assert optimizer.grad_norm.dim() == 0
        assert float(optimizer.grad_norm) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("compiles", [None, True], ids=["default", "compiled"])
@pytest.mark.parametrize("name", ["adamw", "adam-mini"])
def test_is_exact_where_state_is_narrow(name, compiles):
    """Its last bit would turn roundings of bf16, and may not depend on how a mesh cuts the gradients."""
    for storage, close in (("fp32", 1e-6), ("bf16", 1e-14)):
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(512, 256))  # large enough to be compiled
        rule = {"cut": "tensor"} if name == "adam-mini" else {}
        options = {"storage": storage, "max_grad_norm": 0.5, "compile": compiles, **rule}
        optimizer = sharpwise.create_optimizer(model, name, lr=1e-3, **options)
        fill_gradients(model, 0)
        optimizer.step()
        exact = math.sqrt(float((model.w.grad.double() ** 2).sum()))
        assert float(optimizer.grad_norm) == pytest.approx(exact, rel=close)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_a_step_left_out(bad):
    model = tiny_model()
    optimizer = sharpwise.AdamMini(model, lr=1e-3, on_nonfinite="skip", max_grad_norm=1.0)
    fill_gradients(model, 0)
    next(iter(model.parameters())).grad[0, 0] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not math.isfinite(optimizer.grad_norm)
    run(model, optimizer, range(1))
    assert math.isfinite(optimizer.grad_norm)


def test_is_there_when_a_step_raises():
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-3, on_nonfinite="raise")
    fill_gradients(model, 0)
    next(iter(model.parameters())).grad[0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert math.isnan(optimizer.grad_norm)


def test_is_not_there_unless_the_step_reads_it():
    model = tiny_model()
    optimizer = sharpwise.AdamW(model, lr=1e-3)
    run(model, optimizer, range(1))
    assert optimizer.grad_norm is None
    clipped = sharpwise.AdamW(model, lr=1e-3, max_grad_norm=1.0)
    run(model, clipped, range(1))
    assert clipped.grad_norm is not None
    clipped.zero_grad()
    clipped.step()  # nothing to step with
    assert clipped.grad_norm is None


@pytest.mark.parametrize("compiles", [None, False], ids=["default", "eager"])
def test_no_clipping_needed_is_no_clipping(compiles):
    """A factor of 1 leaves every bit."""
    models = [tiny_model() for _ in range(2)]
    for model, clip in zip(models, (1e9, None), strict=True):
        optimizer = sharpwise.AdamW(model, lr=1e-2, max_grad_norm=clip, compile=compiles)
        run(model, optimizer, range(3))
    assert same(*models)


@pytest.mark.parametrize("compiles", [None, False], ids=["default", "eager"])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("sizes", [[(0,), (1,)], [(1024,)], [(777,), (70, 500)], [(300, 1024), (5, 3000)]])
def test_norm_keeps_its_digits(sizes, constant, compiles):
    """fp32 squares are added in fp32 in short runs only: equal addends are the worst case."""
    model = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in sizes])
    optimizer = sharpwise.SGD(model, lr=0.0, max_grad_norm=1.0, compile=compiles)
    for p in model:
        p.grad = torch.full_like(p, 0.1237) if constant else torch.randn(p.shape)
    optimizer.step()
    exact = torch.cat([p.grad.double().view(-1) for p in model]).norm()
    assert abs(optimizer.grad_norm / exact - 1) <= 1e-6


@pytest.mark.parametrize(
    ("build", "options"),
    [(sharpwise.AdamW, {"max_grad_norm": 1.0}), (sharpwise.AdamMini, {}), (sharpwise.AdamMini, {"max_grad_norm": 1.0})],
    ids=["update", "one pass", "two passes"],
)
def test_autograd_notices_what_kernels_write(build, options):
    """They write what autograd may have saved; a backward pass through what was is an error."""
    model = TinyGPT(width=256, heads=16, vocabulary=300)
    optimizer = build(model, lr=1e-2, **options)
    for step in range(2):
        fill_gradients(model, step)
        with torch.enable_grad():
            losses = [p.square().sum() for p in model.parameters()]
        optimizer.step()
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
