"""Schedulers that write momentum, `OneCycleLR` and `CyclicLR`: every step takes what the group has, in float64."""

import copy

import numpy as np
import pytest
import torch

import sharpwise
from reference import adam_mini, adamw, driver, lion, muon, sgd
from reference.rig import Bag

STEPS = 12
SHAPES = [(5,), (6, 4), (3, 7)]
MATRICES = {"w.1": "up", "w.2": "down", "w.0": "other"}


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS, base_momentum=0.7)


def cyclic(optimizer):
    return torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3, base_momentum=0.6)


schedules = pytest.mark.parametrize("schedule", [one_cycle, cyclic])
ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.1}
CASES = {
    "adamw": (sharpwise.AdamW, ADAM, adamw, ("betas",)),
    "adam-mini": (sharpwise.AdamMini, {**ADAM, "cut": "tensor"}, adam_mini, ("betas",)),
    "lion": (sharpwise.Lion, ADAM, lion, ("betas",)),
    "sgd": (sharpwise.SGD, {"momentum": 0.9, "weight_decay": 0.1}, sgd, ("momentum",)),
    "sgd without momentum": (sharpwise.SGD, {"weight_decay": 0.1}, sgd, ("momentum",)),
    "muon": (sharpwise.Muon, {"weight_decay": 0.1, "blocks": MATRICES}, muon, ("momentum",)),
}


def written(schedule, key):
    """What the schedule writes before each step, into an optimizer of torch that has that number."""
    p = torch.nn.Parameter(torch.zeros(1))
    kind = {"betas": torch.optim.AdamW, "momentum": torch.optim.SGD}[key]
    optimizer = kind([p], lr=1e-3, **{key: {"betas": (0.9, 0.99), "momentum": 0.9}[key]})
    scheduler, found = schedule(optimizer), []
    for _ in range(STEPS):
        found.append({name: optimizer.param_groups[0][name] for name in ("lr", key)})
        optimizer.step()
        scheduler.step() if len(found) < STEPS else None
    return found


@schedules
@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("case", CASES)
def test_a_momentum_that_a_schedule_writes_is_that_of_the_step(case, compiled, schedule):
    constructor, options, rule, (key,) = CASES[case]
    model = Bag(SHAPES, dtype=torch.float64)
    optimizer = constructor(model, **options, compile=compiled)
    scheduler = schedule(optimizer)
    named = list(model.named_parameters())
    decay = {"weight_decay": 0.1}
    extra = {name: {} for name, _ in named}
    for name, p in named:
        index = np.arange(p.numel())
        if rule is adam_mini:
            extra[name] = {"blocks": [index]}
        elif rule is muon:
            extra[name] = {"blocks": [index.reshape(p.shape)] if p.ndim == 2 else []}
    p64 = {name: driver.as_array(p) for name, p in named}
    state = {name: rule.init(p, **extra[name]) for name, p in p64.items()}
    numbers = written(schedule, key)
    built = 0
    for i, (recorded, own) in enumerate(zip(driver.gradients(named, STEPS), numbers, strict=True)):
        for name, p in named:
            p.grad = recorded[name]
            if recorded[name] is not None:
                lr = own["lr"]
                hyper = {key: own[key], **decay, **({"eps": 1e-8} if rule in (adamw, adam_mini) else {}), **extra[name]}
                if rule is sgd:
                    hyper |= {"dampening": 0.0, "nesterov": False}
                g = driver.as_array(recorded[name])
                p64[name], state[name] = rule.step(p64[name], g, state[name], lr=lr, decay_lr=lr, **hyper)
        optimizer.step()
        assert optimizer.param_groups[0][key] == own[key]
        if i == 0:
            built = optimizer.compiled_graphs
        scheduler.step() if i < STEPS - 1 else None
    assert optimizer.compiled_graphs == built  # a number that changes is no reason to compile
    for name, p in named:
        assert driver.error(p, p64[name], 1e-3) <= (2e-5 if rule is muon else 1e-9), name


@schedules
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (sharpwise.AdamW, torch.optim.AdamW, {"betas": (0.9, 0.99)}),
        (sharpwise.SGD, torch.optim.SGD, {"momentum": 0.9}),
        (sharpwise.SGD, torch.optim.SGD, {}),
    ],
    ids=["adamw", "sgd", "sgd without momentum"],
)
def test_it_is_torchs_own_optimizer_under_the_same_schedule(ours, theirs, options, schedule):
    first = Bag(SHAPES, dtype=torch.float64)
    second = copy.deepcopy(first)
    pairs = [(first, ours(first, lr=1e-3, **options)), (second, theirs(second.parameters(), lr=1e-3, **options))]
    schedulers = [schedule(optimizer) for _, optimizer in pairs]
    for i, recorded in enumerate(driver.gradients(list(first.named_parameters()), STEPS)):
        for (model, optimizer), scheduler in zip(pairs, schedulers, strict=True):
            for name, p in model.named_parameters():
                p.grad = None if recorded[name] is None else recorded[name].clone()
            optimizer.step()
            scheduler.step() if i < STEPS - 1 else None
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["adamw", "adam-mini", "lion"])
def test_a_momentum_that_no_step_can_use_is_refused_as_it_is_used(name):
    model = Bag(SHAPES)
    optimizer = sharpwise.create_optimizer(model, name, **({"cut": "tensor"} if name == "adam-mini" else {}))
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS, max_momentum=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=rf"{name}: betas must .*\(1.0, 0.99"):
        optimizer.step()
