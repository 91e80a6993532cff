"""What tests of bad input share: a typed error with the right words, after which nothing has changed."""

import copy

import pytest
import torch

import sharpwise
from reference import driver

RULES = {
    "adamw": (sharpwise.AdamW, {"lr": 1e-3}),
    "adam-mini": (sharpwise.AdamMini, {"lr": 1e-3}),
    "lion": (sharpwise.Lion, {"lr": 1e-3}),
    "sgd": (sharpwise.SGD, {"lr": 1e-3, "momentum": 0.9}),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def make(rule, first, **options):
    constructor, hyper = RULES[rule]
    return constructor(first, **{**hyper, **options})


def snapshot(model, optimizer=None):
    """Everything that may not change: parameters, and the optimizer's state and groups."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def unchanged(before, model, optimizer=None):
    weights, state = snapshot(model, optimizer)
    assert same(weights, before[0]), "parameters changed"
    if optimizer is not None:
        assert same(state, before[1]), "state changed"


def refuse(error, match, make_optimizer, model):
    """The constructor raises, and has touched no parameter."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        make_optimizer()
    unchanged(before, model)


def stepped(rule, model, **options):
    """An optimizer in the middle of a run."""
    optimizer = make(rule, model, **options)
    named = list(model.named_parameters())
    for recorded in driver.gradients(named, 2):
        for name, p in named:
            p.grad = recorded[name]
        optimizer.step()
    return optimizer
