"""Clipping inside the optimizer is torch's `clip_grad_norm_` before the step, for every rule and on every path."""

import pytest
import torch
from distributed.rules import Unit
from reference import driver, models
from reference.rig import ADAMW, BARE, Bag, every_path, named, near, steps, wide_gpt2

import sharpwise
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.rules import AdaPM


def clipped_by_torch(model, optimizer, grads, max_norm):
    """Steps as a script takes them that clips by itself."""
    for recorded in grads:
        for name, p in named(model):
            p.grad = None if recorded[name] is None else recorded[name].clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_is_torchs(max_norm):
    first, second = Bag(), Bag()
    grads = driver.gradients(named(first), 20)
    one = sharpwise.AdamW(first, **{**ADAMW, "eps": 1.0}, max_grad_norm=max_norm)
    two = torch.optim.AdamW(second.parameters(), **{**ADAMW, "eps": 1.0}, foreach=False)
    steps(one, named(first), grads)
    clipped_by_torch(second, two, grads, max_norm)
    near(first, second)


@every_path
@pytest.mark.parametrize("rule", BARE)
def test_clipping_is_clipping_by_hand(rule, compiled):
    """Large matrices and small tensors; steps that are clipped, and others."""
    constructor, hyper = BARE[rule]
    first, second = wide_gpt2(), wide_gpt2()
    grads = driver.gradients(named(first), 4)
    one = constructor(first, **hyper, max_grad_norm=2e3, compile=compiled)
    two = constructor(second, **hyper, compile=False)
    steps(one, named(first), grads)
    clipped_by_torch(second, two, grads, 2e3)
    if rule == "lion":  # where the two terms cancel to the last bit, the sign is rounding's
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        assert sum(int((p - q).abs().gt(1e-6).sum()) for p, q in pairs) <= 3
    else:
        near(first, second)
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        for key, value in one.state[p].items():
            assert driver.error(value, driver.as_array(two.state[q][key])) <= 1e-6, (name, key)


@every_path
@pytest.mark.parametrize("rule", [AdaPM(rank=2), AdaPM(rank=2, kept_by="block"), Unit()], ids=["1", "1, blocks", "2"])
def test_clipping_of_sums_over_a_matrix(rule, compiled):
    """Sums that a rule asks for are taken of the gradient as it is; of degree 1 and 2 in the factor on it."""
    first, second = models.build("gpt2"), models.build("gpt2")
    grads = driver.gradients(named(first), 6)
    options = [Options(max_grad_norm=max_norm, compile=compiled) for max_norm in (250.0, None)]
    one, two = (
        BlockOptimizer(model, rule, lr=1e-2, weight_decay=0.1, options=own)
        for model, own in zip((first, second), options, strict=True)
    )
    steps(one, named(first), grads)
    clipped_by_torch(second, two, grads, 250.0)
    near(first, second)
