"""Every number of `param_groups` is read at every step: changed at random, around a save too, against float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sharpwise
from reference import adam_mini, adamw, driver, lion, sgd
from reference.rig import Bag, through_disk

SHAPES = [(5,), (6, 4), (3, 7)]
NUMBERS = {
    "lr": st.sampled_from([0.0, 1e-3, 3e-2]),
    "weight_decay": st.sampled_from([0.0, 0.1, 0.7]),
    "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.3, 0.95, 0.999])),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "momentum": st.sampled_from([0.0, 0.0, 0.5, 0.93]),
    "dampening": st.sampled_from([0.0, 0.4, 0.9]),
    "nesterov": st.booleans(),
}
ADAM = ("lr", "weight_decay", "betas", "eps")
OPTIMIZERS = {
    "adamw": (adamw, sharpwise.AdamW, {}, ADAM),
    "adam-mini": (adam_mini, sharpwise.AdamMini, {"cut": "tensor"}, ADAM),
    "lion": (lion, sharpwise.Lion, {}, ("lr", "weight_decay", "betas")),
    "sgd": (sgd, sharpwise.SGD, {}, ("lr", "weight_decay", "momentum", "dampening", "nesterov")),
    "sgd, decoupled": (
        sgd,
        sharpwise.SGD,
        {"decoupled_weight_decay": True, "momentum": 0.9},
        ("lr", "weight_decay", "momentum", "dampening"),
    ),
}


@st.composite
def changes(draw, names):
    """Per step what is written into the group before it, and whether the optimizer is saved and loaded there."""
    steps = []
    for _ in range(8):
        changed = {name: draw(NUMBERS[name]) for name in names if draw(st.integers(0, 2)) == 0}
        steps.append((changed, draw(st.integers(0, 3)) == 0))
    return steps


def legal(group, changed):
    """Nesterov needs a momentum without dampening."""
    new = {**group, **changed}
    if new.get("nesterov") and not (new["momentum"] > 0 and new["dampening"] == 0):
        changed = {**changed, "nesterov": False}
    return changed


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("case", OPTIMIZERS)
@settings(max_examples=25)
@given(data=st.data())
def test_numbers_of_groups_are_read_at_every_step(case, compiled, data):
    rule, constructor, options, names = OPTIMIZERS[case]
    model = Bag(SHAPES)
    optimizer = constructor(model, **options, compile=compiled)
    blocks = {name: [np.arange(p.numel())] for name, p in model.named_parameters()}
    extra = (lambda name: {"blocks": blocks[name]}) if rule is adam_mini else (lambda name: {})
    p64 = {name: driver.as_array(p) for name, p in model.named_parameters()}
    state = {name: rule.init(p, **extra(name)) for name, p in p64.items()}
    grads = driver.gradients(list(model.named_parameters()), 8)
    for (changed, saved), recorded in zip(data.draw(changes(names)), grads, strict=True):
        group = optimizer.param_groups[0]
        group.update(legal(group, changed))
        if saved:
            kept = through_disk(optimizer.state_dict())
            optimizer = constructor(model, **options, compile=compiled)
            optimizer.load_state_dict(kept)
            group = optimizer.param_groups[0]
        fixed = {"decoupled_weight_decay": True} if "decoupled" in case else {}
        hyper = {name: group[name] for name in (*names, *(("momentum",) if "momentum" in options else ()))} | fixed
        lr = hyper.pop("lr")
        for name, p in model.named_parameters():
            g = recorded[name]
            p.grad = g
            if g is not None:
                p64[name], state[name] = rule.step(
                    p64[name], driver.as_array(g), state[name], lr=lr, decay_lr=lr, **extra(name), **hyper
                )
        optimizer.step()
    for name, p in model.named_parameters():
        assert driver.error(p, p64[name], 1e-3) <= 2e-6, name
        for key in rule.STATE:
            if key in state[name]:
                want = np.asarray(state[name][key])
                assert driver.error(optimizer.state[p][key].reshape(want.shape), want, 1e-6) <= 2e-6, (name, key)


@pytest.mark.parametrize("order", ["scheduler first", "state first"])
def test_sgd_under_cyclic_lr_is_resumed_in_either_order(order):
    """The scheduler writes a momentum into groups that were built without."""

    def scheduled(optimizer):
        return torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3, base_momentum=0.6)

    def run(model, optimizer, scheduler, steps):
        for i in steps:
            model.weight.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(i))
            optimizer.step()
            scheduler.step()

    def start(library):
        torch.manual_seed(0)
        model = nn.Linear(4, 4, bias=False)
        return model, library(list(model.named_parameters()), lr=1e-2)

    ends = []
    for library in (torch.optim.SGD, sharpwise.SGD):
        model, optimizer = start(library)
        scheduler = scheduled(optimizer)
        run(model, optimizer, scheduler, range(5))
        saved = through_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        kept = scheduler.state_dict()
        again, second = start(library)
        again.load_state_dict(saved["model"])
        if order == "state first":
            second.load_state_dict(saved["optimizer"])
            following = scheduled(second)
        else:
            following = scheduled(second)
            second.load_state_dict(saved["optimizer"])
        following.load_state_dict(kept)
        for one, other in zip(second.param_groups, optimizer.param_groups, strict=True):
            one.update({key: other[key] for key in ("lr", "momentum")})
        run(model, optimizer, scheduler, range(5, 9))
        run(again, second, following, range(5, 9))
        assert torch.equal(model.weight, again.weight)
        ends.append(model.weight.detach())
    assert torch.allclose(*ends, rtol=1e-6, atol=1e-7)


def test_sgd_sai_averages_whatever_the_momentum_is():
    """The momentum of a group, and one that a schedule cycles: m <- mu m + (1 - mu) g, never amplified."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.load_state_dict(first.state_dict())
    one = sharpwise.SGDSaI(first, lr=1e-2, momentum=0.5)
    two = sharpwise.SGDSaI([{"params": list(second.parameters()), "momentum": 0.5}], model=second, lr=1e-2)
    for model, optimizer in ((first, one), (second, two)):
        for i in range(5):
            for j, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + j))
            optimizer.step()
    assert torch.equal(first.weight, second.weight)

    model = nn.Linear(4, 4, bias=False)
    optimizer = sharpwise.SGDSaI(model, lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    gradient = torch.randn(4, 4)
    multiplier = None
    for _ in range(8):
        before, lr = model.weight.detach().clone(), optimizer.param_groups[0]["lr"]
        model.weight.grad = gradient.clone()
        optimizer.step()
        scheduler.step()
        multiplier = multiplier or optimizer.lr_multipliers()[0]["multiplier"]
        # the average of a constant is that constant, whatever the weights
        torch.testing.assert_close(before - model.weight.detach(), lr * multiplier * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block_lr", [None, "blockwise", "sharpness(start=1, every=2, power=2)"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw", {}),
        ("adamw", {"compile": False}),
        ("adamw", {"storage": "bf16"}),
        ("adam-mini", {}),
        ("adam-mini", {"max_grad_norm": 1.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "default",
)
def test_state_restored_in_place_is_what_the_next_step_uses(name, options, block_lr):
    """A rollback, or torch.distributed.checkpoint, which loads into the tensors that are there."""
    from sharpwise.testing import fill_gradients, tiny_model

    model = tiny_model()
    sharpness = {"total_steps": 100} if block_lr and block_lr.startswith("sharpness") else {}
    optimizer = sharpwise.create_optimizer(model, name, lr=1e-2, block_lr=block_lr, **sharpness, **options)

    def run(steps):
        for step in steps:
            fill_gradients(model, step)
            optimizer.step()

    def tensors():
        return [*model.parameters(), *(t for own in optimizer.state.values() for t in own.values())]

    run(range(2))
    kept = [t.detach().clone() for t in tensors()]
    plain = [{k: v for k, v in group.items() if not k.startswith("param")} for group in optimizer.param_groups]
    ends = []
    for _ in range(2):
        run(range(2, 5))
        ends.append([p.detach().clone() for p in model.parameters()])
        with torch.no_grad():
            for tensor, value in zip(tensors(), kept, strict=True):
                tensor.copy_(value)
        for group, values in zip(optimizer.param_groups, plain, strict=True):
            group.update(values)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
