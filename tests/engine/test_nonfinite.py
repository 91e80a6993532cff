"""NaN and infinite gradients that are not looked for: as in torch, and the same on every path."""

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.optim import COMBINES, create_optimizer

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}
bad = pytest.mark.parametrize("bad", BAD.values(), ids=BAD)


def after(build, bad, dtype=torch.float32, n=2):
    """Weights, and their state, after steps of which the second has a bad element."""
    torch.manual_seed(0)
    models = {"large": nn.Linear(300, 301, dtype=dtype), "small": nn.Linear(7, 5, dtype=dtype)}
    model = nn.ModuleDict(models)
    optimizer = build(model)
    for t in range(n):
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(dtype)
            if t == 1:
                p.grad.view(-1)[3] = bad
        optimizer.step()
    own = [{k: t for k, t in optimizer.state[p].items() if k != "step"} for p in model.parameters()]
    return [
        t
        for p, state in zip(model.parameters(), own, strict=True)
        for t in (p.detach(), *state.values())
        if t is not None
    ]


def assert_alike(some, others, tolerance):
    for mine, other in zip(some, others, strict=True):
        assert torch.equal(mine.isnan(), other.isnan())
        assert torch.equal(mine.isposinf(), other.isposinf())
        assert torch.equal(mine.isneginf(), other.isneginf())
        x, y = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (mine, other))
        assert (x - y).norm() <= tolerance * y.norm()


OPTIONS = {"bare": {}, "clipped": {"max_grad_norm": 1.0}, "by block": {"block_lr": "layer_decay"}, "bf16": {}}


@pytest.mark.pairwise
@bad
@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("name", COMBINES)
def test_every_path_does_the_same(name, how, bad):
    dtype = torch.bfloat16 if how == "bf16" else torch.float32

    def build(compile):
        blocks = {"large.weight": "up", "small.weight": "down", "*.bias": "norm"}
        options = {"lr": 1e-2, "blocks": blocks, **OPTIONS[how], **({"momentum": 0.9} if name == "sgd" else {})}
        if options.get("block_lr"):
            blocks |= {"large.*": {"role": "up", "layer": 0}, "small.*": {"role": "down", "layer": 1}}
        return lambda model: create_optimizer(model, name, compile=compile, **options)

    eager, default, compiled = (after(build(compile), bad, dtype) for compile in (False, None, True))
    assert any(not t.isfinite().all() for t in eager)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert_alike(default, eager, tolerance)
    assert_alike(compiled, eager, tolerance)


TORCHS = {
    "adamw": (sharpwise.AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (sharpwise.SGD, torch.optim.SGD, {}),
    "momentum": (sharpwise.SGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (sharpwise.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
}


@bad
@pytest.mark.parametrize("compile", [None, False], ids=["default", "eager"])
@pytest.mark.parametrize(("mine", "torchs", "options"), TORCHS.values(), ids=TORCHS)
def test_where_torch_has_the_rule_it_does_as_torch(mine, torchs, options, compile, bad):
    found = after(lambda model: mine(model, lr=1e-2, compile=compile, **options), bad)
    expected = after(lambda model: torchs(model.parameters(), lr=1e-2, **options), bad)
    assert_alike(found, expected, 1e-6)


@pytest.mark.parametrize("compile", [None, False], ids=["default", "eager"])
def test_lion_shows_a_nan(compile):
    """An element that stood still for good, its momentum NaN, would go unnoticed."""
    weight, *_ = after(lambda model: sharpwise.Lion(model, lr=1e-2, compile=compile), float("nan"))
    assert weight.view(-1)[3].isnan()
    assert weight.isnan().sum() == 1
