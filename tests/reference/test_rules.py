"""AdamW, Lion and SGD against the equations in float64: every step, every parameter, every state tensor."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sharpwise
from reference import adamw, driver, lion, models, sgd

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
COMPILE = [None, False]
MAX_NORM = 250.0  # the recorded gradients have norms of 130 to 550

# Lion's betas are not round: 0.88 m + 0.12 g cancels exactly for bf16 m = 3, g = -22, and its sign is then rounding's.
CASES = {
    "adamw": (
        adamw,
        sharpwise.AdamW,
        {"lr": 3e-3, "betas": (0.83, 0.961), "eps": 1e-4, "weight_decay": 0.23},
    ),
    "adamw, no decay, tiny eps": (
        adamw,
        sharpwise.AdamW,
        {"lr": 2e-3, "betas": (0.0, 0.999), "eps": 1e-30, "weight_decay": 0.0},
    ),
    "lion": (lion, sharpwise.Lion, {"lr": 7e-4, "betas": (0.8837, 0.9713), "weight_decay": 0.9}),
    "sgd, plain": (sgd, sharpwise.SGD, {"lr": 0.03, "weight_decay": 0.12}),
    "sgd, momentum": (
        sgd,
        sharpwise.SGD,
        {"lr": 0.02, "momentum": 0.83, "dampening": 0.37, "weight_decay": 0.21},
    ),
    "sgd, nesterov": (
        sgd,
        sharpwise.SGD,
        {"lr": 0.02, "momentum": 0.77, "nesterov": True, "weight_decay": 0.08},
    ),
    "sgd, decoupled": (
        sgd,
        sharpwise.SGD,
        {"lr": 0.02, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.4, "decoupled_weight_decay": True},
    ),
}
CASES |= {
    f"{case}, cautious": (rule, constructor, {**hyper, "cautious_decay": True})
    for case, (rule, constructor, hyper) in CASES.items()
    if case in ("adamw", "lion", "sgd, decoupled")
}


@pytest.mark.parametrize("compiled", COMPILE, ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rule(case, dtype, compiled):
    rule, constructor, hyper = CASES[case]
    model = models.build("nanogpt", dtype)
    named = list(model.named_parameters())
    optimizer = constructor(model, **hyper, compile=compiled)
    twin = driver.Twin(rule, named, [(driver.names_of(named), hyper)])
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(hyper["lr"], t)], steps=13)


@pytest.mark.parametrize("compiled", COMPILE, ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["adamw", "lion", "sgd, momentum", "sgd, decoupled"])
def test_clipping(case, dtype, compiled):
    """Some steps are clipped, each by a factor of its own, and some are not."""
    rule, constructor, hyper = CASES[case]
    model = models.build("nanogpt", dtype)
    named = list(model.named_parameters())
    optimizer = constructor(model, **hyper, max_grad_norm=MAX_NORM, compile=compiled)
    twin = driver.Twin(rule, named, [(driver.names_of(named), hyper)])
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(hyper["lr"], t)], max_norm=MAX_NORM)


@pytest.mark.parametrize("case", ["adamw", "lion", "sgd, momentum", "sgd, decoupled"])
def test_parameter_groups(case):
    """The groups of a script keep their own learning rate, weight decay and betas."""
    rule, constructor, hyper = CASES[case]
    model = models.build("gpt2")
    named = list(model.named_parameters())
    tensors = dict(named)
    matrices, vectors = driver.split_groups(named)
    second = {"lr": hyper["lr"] * 3.3, "weight_decay": 0.017}
    if "betas" in hyper:
        second["betas"] = (0.71, 0.93)
    groups = [
        {"params": [tensors[name] for name in matrices]},
        {"params": [tensors[name] for name in vectors], **second},
    ]
    optimizer = constructor(groups, model=model, **hyper)
    twin = driver.Twin(rule, named, [(matrices, hyper), (vectors, {**hyper, **second})])
    driver.run(
        optimizer,
        named,
        twin,
        lambda t: [driver.schedule(hyper["lr"], t), driver.schedule(second["lr"], t + 5)],
    )


@pytest.mark.parametrize("compiled", COMPILE, ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["adamw", "lion", "sgd, momentum", "sgd, decoupled"])
def test_bf16_state(case, dtype, compiled):
    """The step uses the new moments as they are; what is stored is their nearest bf16."""
    rule, constructor, hyper = CASES[case]
    model = models.build("nanogpt", dtype)
    named = list(model.named_parameters())
    optimizer = constructor(model, **hyper, storage="bf16", compile=compiled)
    optimizer.init_state()
    twin = driver.Twin(rule, named, [(driver.names_of(named), hyper)])
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(hyper["lr"], t)], steps=12)
    state = optimizer.state[named[0][1]]
    assert {key for key, value in state.items() if value.dtype is torch.bfloat16} == {*rule.STATE}


@pytest.mark.parametrize("case", ["adamw", "lion", "sgd, momentum"])
def test_live_weight_decay_and_tensor_lr(case):
    """lr and weight_decay may be 0-d tensors, and are read at every step."""
    rule, constructor, hyper = CASES[case]
    model = models.build("llama")
    named = list(model.named_parameters())
    optimizer = constructor(model, **{**hyper, "lr": torch.tensor(hyper["lr"], dtype=torch.float64)})
    twin = driver.Twin(rule, named, [(driver.names_of(named), hyper)])
    for t, grads in enumerate(driver.gradients(named, 12)):
        lr, decay = driver.schedule(hyper["lr"], t), 0.05 * (t + 1)
        optimizer.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float64) if t % 2 else lr
        optimizer.param_groups[0]["weight_decay"] = decay
        twin.groups[0][1]["weight_decay"] = decay
        for name, p in named:
            p.grad = grads[name]
        optimizer.step()
        twin.step(grads, [lr])
        driver.compare(optimizer, named, twin, f"step {t + 1}", 1e-6)


def test_long_run_keeps_its_bias_correction():
    """1 - 0.9999^t in float32 would be wrong in the fourth digit at t = 1."""
    model = models.build("llama")
    named = list(model.named_parameters())
    hyper = {"lr": 1e-2, "betas": (0.99, 0.9999), "eps": 1e-12, "weight_decay": 0.0}
    optimizer = sharpwise.AdamW(model, **hyper)
    twin = driver.Twin(adamw, named, [(driver.names_of(named), hyper)])
    driver.run(optimizer, named, twin, lambda t: [hyper["lr"]], steps=40)


class Bag(nn.Module):
    """Parameters of any shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])


SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(
    shapes=SHAPES,
    seed=st.integers(0, 2**16),
    case=st.sampled_from(["adamw", "lion", "sgd, momentum", "sgd, nesterov"]),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    exponent=st.integers(-6, 4),
)
def test_any_shape_any_gradient(shapes, seed, case, zeros, exponent):
    """Scalars, empty tensors, zero gradients, gradients of any scale."""
    rule, constructor, hyper = CASES[case]
    model = Bag(shapes)
    named = list(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    grads = [
        {
            name: torch.randn(p.shape, generator=generator)
            * 10.0**exponent
            * (torch.rand(p.shape, generator=generator) >= zeros)
            for name, p in named
        }
        for _ in range(4)
    ]
    optimizer = constructor(model, **hyper)
    twin = driver.Twin(rule, named, [(driver.names_of(named), hyper)])
    driver.run(optimizer, named, twin, lambda t: [hyper["lr"]], grads=grads)


def test_references_at_their_limits():
    """The references themselves, against numbers worked out by hand, and torch's."""
    p, g = np.array([2.0, -1.0]), np.array([0.5, -4.0])
    rates = {"lr": 0.1, "decay_lr": 0.1}
    got, _ = adamw.step(p, g, adamw.init(p), **rates, betas=(0.9, 0.99), eps=0.0, weight_decay=0.5)
    assert np.allclose(got, p * 0.95 - 0.1 * np.sign(g), atol=1e-15)  # the first step of Adam is the sign
    got, state = lion.step(p, g, lion.init(p), **rates, betas=(0.9, 0.99), weight_decay=0.5)
    assert np.allclose(got, p * 0.95 - 0.1 * np.sign(g)) and np.allclose(state["exp_avg"], 0.01 * g)
    for max_norm in (2.0, 50.0):
        parameters = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
        grads = {str(i): torch.arange(3.0, dtype=torch.float64) - 4 * i for i in range(2)}
        for parameter, own in zip(parameters, grads.values(), strict=True):
            parameter.grad = own.clone()
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        got = driver.clipped({**grads, "none": None}, max_norm)
        assert got["none"] is None
        assert all(torch.allclose(got[str(i)], q.grad, rtol=1e-12) for i, q in enumerate(parameters))
    state = sgd.init(p)
    for t in range(3):
        p, state = sgd.step(p, g, state, **rates, momentum=0.5)
        assert math.isclose(state["momentum_buffer"][0], 0.5 * (2 - 0.5**t))
