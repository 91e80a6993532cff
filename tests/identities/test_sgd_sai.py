"""SGD-SaI: the paper's equations, the released package on inputs that it stands, and all those that it does not."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from reference import driver, gradient_snr, models
from reference.rig import bit_equal, named, near, steps, through_disk
from torch import nn

import sharpwise

HYPER = {"lr": 2e-3, "momentum": 0.9, "weight_decay": 0.3}


def one(values, dtype=torch.float32):
    """A model of one parameter."""
    model = nn.Module()
    model.w = nn.Parameter(torch.as_tensor(values, dtype=dtype))
    return model


def sai(model, **options):
    return sharpwise.SGDSaI(model, **{**HYPER, **options}, blocks={"*": "other"})


def step(optimizer, parameter, grad):
    """Steps, and returns the multiplier."""
    parameter.grad = None if grad is None else torch.as_tensor(grad).to(parameter.dtype).clone()
    optimizer.step()
    return multiplier(optimizer, parameter)


def multiplier(optimizer, parameter):
    found = optimizer.state[parameter]["lr_multiplier"].tolist()
    assert found[0] in [row["multiplier"] for row in optimizer.lr_multipliers()]
    return found[0]


def scale(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_equations(momentum):
    """m_1 = g, then m <- mu m + (1 - mu) g; p <- p (1 - lr wd) - lr s m, s of the first gradient."""
    model = one(scale(6, 5, seed=1), torch.float64)
    optimizer = sai(model, momentum=momentum)
    p, m, s = driver.as_array(model.w), None, None
    for t in range(6):
        g = scale(6, 5, seed=10 + t).numpy() * 3.0**t + 0.2
        lr = driver.schedule(2e-3, t)
        optimizer.param_groups[0]["lr"] = lr
        found = step(optimizer, model.w, g)
        s = gradient_snr.snr(g.ravel()) if s is None else s
        m = g if m is None else momentum * m + (1 - momentum) * g
        p = p * (1 - lr * 0.3) - lr * s * m
        assert math.isclose(found, s, rel_tol=1e-7)
        assert driver.error(model.w, p) <= 1e-7
    assert set(optimizer.state[model.w]) >= {"momentum_buffer"} or momentum == 0


def test_the_released_package():
    """sgd-sai 1.0.3 on unfused matrices and vectors of more than one element, with gradients from the first step on.

    It takes the deviation with n - 1, s' = s sqrt((n-1)/n): so per tensor its lr is larger by the inverse here, and its
    decay smaller. It adds an eps in the unit of the gradient, which is 0 here.
    """
    package = pytest.importorskip("sgd_sai")
    first, second = models.build("llama"), models.build("llama")
    grads = driver.gradients(named(first), 20)
    for recorded in grads:
        for number, (name, p) in enumerate(named(first)):
            recorded[name] = scale(*p.shape, seed=number).float() if recorded[name] is None else recorded[name]
    ours = sharpwise.SGDSaI(first, **HYPER)
    groups = []
    for _, q in named(second):
        c = math.sqrt(q.numel() / (q.numel() - 1))
        groups.append({"params": [q], "lr": 2e-3 * c, "weight_decay": 0.3 / c})
    theirs = package.SGD_sai(groups, momentum=0.9, eps=0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        for recorded in grads:
            steps(ours, named(first), [recorded])
            steps(theirs, named(second), [recorded])
    near(first, second)
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        n, s, own = p.numel(), ours.state[p]["lr_multiplier"].item(), theirs.state[q]
        assert math.isclose(s, own["gsnr"].item() * math.sqrt(n / (n - 1)), rel_tol=2e-6), name
        assert driver.error(ours.state[p]["momentum_buffer"], driver.as_array(own["momentum_buffer"])) <= 1e-6


def test_constant_s_is_sgd_at_a_scaled_lr():
    """First gradients of mean 0 and one magnitude: s = sqrt(n) = 8 for all; then anything."""

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.ParameterList([nn.Parameter(scale(*s).float()) for s in ((8, 8), (64,), (2, 32), (4, 4, 4))])

    first, second = Squares(), Squares()
    grads = driver.gradients(named(first), 8)
    grads[0] = {name: 1.0 - 2.0 * (torch.arange(64) % 2).float().view(p.shape) for name, p in named(first)}
    one = sharpwise.SGDSaI(first, **HYPER, blocks={"*": "other"}, compile=False)
    hyper = {"lr": 2e-3 * 8, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.3 / 8}
    two = sharpwise.SGD(second, **hyper, decoupled_weight_decay=True, compile=False)
    steps(one, named(first), grads)
    steps(two, named(second), grads)
    assert {multiplier(one, p) for _, p in named(first)} == {8.0}
    bit_equal(first, second)


# What makes the released code explode, freeze or crash


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_one_element(shape):
    """Released: |g| / 1e-8."""
    model = one(torch.full(shape, 2.0))
    assert step(sai(model), model.w, torch.full(shape, 1500.0)) == 1.0
    assert math.isclose(model.w.item(), 2.0 * (1 - 2e-3 * 0.3) - 2e-3 * 1500.0, rel_tol=1e-6)


def test_constant_gradient():
    """Released: 4.6e7. Here 10 sqrt(n), and what is nearly constant has no more."""
    model = one(torch.zeros(4, 9))
    assert step(sai(model), model.w, torch.full((4, 9), -0.125)) == 60.0
    model = one(torch.zeros(4, 9))
    assert step(sai(model), model.w, -0.125 + 1e-6 * scale(4, 9)) == 60.0
    model = one(torch.zeros(4, 9))
    assert step(sai(model, momentum=0.0), model.w, torch.full((4, 9), 3e38)) == 60.0


def test_nonzero_mean():
    """||g|| / std, not sqrt(n): a mean of 3 deviations gives sqrt(10 n)."""
    g = 3.0 + torch.tensor([1.0, -1.0]).repeat(8)
    model = one(torch.zeros(16))
    assert math.isclose(step(sai(model), model.w, g), math.sqrt(160), rel_tol=1e-7)


def test_zero_first_gradient_waits():
    """Released: s = 0, and frozen for ever. B of a LoRA is zero, and so is the first gradient of A."""
    model, g = one(torch.ones(8, 4)), scale(8, 4).float()
    optimizer = sai(model)
    for _ in range(3):
        assert step(optimizer, model.w, torch.zeros(8, 4)) == 1.0
    before = driver.as_array(model.w)
    assert np.allclose(before, (1 - 2e-3 * 0.3) ** 3)
    s = gradient_snr.snr(driver.as_array(g).ravel())
    assert math.isclose(step(optimizer, model.w, g), s, rel_tol=1e-7)
    want = before * (1 - 2e-3 * 0.3) - 2e-3 * s * 0.1 * driver.as_array(g)  # m was 0 so far
    assert driver.error(model.w, want) <= 1e-6
    assert math.isclose(step(optimizer, model.w, 1 + g), s, rel_tol=1e-7)


def test_zero_gradient_of_a_part_waits_for_that_part():
    """Fused q, k, v: each has its own s, at its own time."""
    model = models.build("gpt2")
    optimizer = sharpwise.SGDSaI(model, **HYPER)
    weight = model.transformer.h[0].attn.c_attn.weight
    g = scale(12, 36).float()
    first, second = g.clone(), scale(12, 36, seed=5).float() + 0.5
    first[:, 12:24] = 0.0
    for recorded, seen in ((first, 0), (second, 1), (g + 1, 1)):
        weight.grad = recorded
        optimizer.step()
        q, k, v = optimizer.state[weight]["lr_multiplier"].tolist()
        for found, part, at in ((q, first[:, :12], 0), (k, second[:, 12:24], 1), (v, first[:, 24:], 0)):
            want = gradient_snr.snr(driver.as_array(part).ravel()) if seen >= at else 1.0
            assert math.isclose(found, want, rel_tol=1e-7)


def test_late_parameters():
    """Released: KeyError. The first gradient that comes counts, and m starts from it."""
    model, g = one(torch.ones(8, 4)), scale(8, 4).float()
    model.v = nn.Parameter(torch.ones(5))
    optimizer = sai(model)
    for t in range(2):
        step(optimizer, model.v, scale(5, seed=t))
    assert multiplier(optimizer, model.w) == 1.0 and (model.w == 1).all()
    s = gradient_snr.snr(driver.as_array(g).ravel())
    assert math.isclose(step(optimizer, model.w, g), s, rel_tol=1e-7)
    assert driver.error(model.w, (1 - 2e-3 * 0.3) - 2e-3 * s * driver.as_array(g)) <= 1e-6


def test_add_param_group():
    """Released: KeyError."""
    model, g, h = one(torch.ones(8, 4)), scale(8, 4), scale(3, 7, seed=2)
    model.v = nn.Parameter(torch.ones(3, 7))
    optimizer = sharpwise.SGDSaI([model.w], **HYPER, model=model, blocks={"*": "other"})
    before = step(optimizer, model.w, g)
    optimizer.add_param_group({"params": [model.v], "lr": 1e-3})
    step(optimizer, model.w, 1 + g)
    step(optimizer, model.v, h)
    assert multiplier(optimizer, model.w) == before
    found = optimizer.state[model.v]["lr_multiplier"].item()
    assert math.isclose(found, gradient_snr.snr(driver.as_array(h.float()).ravel()), rel_tol=1e-7)


def test_resume():
    """Released: measured again (143.9 -> 64.1)."""
    model, twin = one(torch.ones(8, 4)), one(torch.ones(8, 4))
    optimizer = sai(model)
    before = step(optimizer, model.w, 0.5 + scale(8, 4))
    resumed = sai(twin)
    resumed.load_state_dict(through_disk(optimizer.state_dict()))
    twin.load_state_dict(model.state_dict())
    for t in range(3):
        assert step(optimizer, model.w, 7 + scale(8, 4, seed=t)) == before
        assert step(resumed, twin.w, 7 + scale(8, 4, seed=t)) == before
        bit_equal(model, twin)


def test_closure_runs_once():
    """Released: twice at the first step, which draws two batches."""
    model, calls = one(scale(8, 4)), []
    optimizer = sai(model)

    def closure():
        optimizer.zero_grad()
        calls.append(0)
        loss = (model.w * scale(8, 4, seed=len(calls)).float()).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(calls) == 1
    s = gradient_snr.snr(driver.as_array(scale(8, 4, seed=1).float()).ravel())
    assert math.isclose(multiplier(optimizer, model.w), s, rel_tol=1e-7)


def test_no_momentum():
    """Released: UnboundLocalError."""
    model, g = one(torch.ones(8, 4)), scale(8, 4).float()
    s = step(sai(model, momentum=0.0), model.w, g)
    assert driver.error(model.w, (1 - 2e-3 * 0.3) - 2e-3 * s * driver.as_array(g)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 2e4])
def test_half_precision(dtype, size):
    """Released: the norm of large fp16 gradients is infinite."""
    model, g = one(torch.ones(64, 32), dtype), (scale(64, 32) * size).clamp(-6e4, 6e4).to(dtype)
    found = step(sai(model, lr=1e-9), model.w, g)
    assert math.isclose(found, gradient_snr.snr(driver.as_array(g).ravel()), rel_tol=1e-7)
    assert model.w.isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "power"),
    [(torch.float32, p) for p in (-120, -60, 60, 125)] + [(torch.float64, p) for p in (-1000, -600, 600, 1020)],
    ids=str,
)
def test_tiny_and_huge_gradients(dtype, power):
    """s has no unit: a power of two changes no bit. Released: an eps of 1e-8 beside a deviation of 1e-9."""
    g = scale(8, 4).to(torch.float32).clamp(-4, 4).to(dtype)
    found = [step(sai(m, lr=0.0), m.w, g * k) for k in (1.0, 2.0**power) for m in [one(torch.ones(8, 4), dtype)]]
    assert found[0] == found[1]
    assert math.isclose(found[0], gradient_snr.snr(driver.as_array(g).ravel()), rel_tol=1e-7)


@pytest.mark.parametrize("power", [-300, -620, -1000])
def test_a_tiny_part_of_a_fused_matrix(power):
    """Keys beside values that have gradients 1e90 to 1e300 times as large."""
    model = models.build("gpt2", torch.float64)
    weight = model.transformer.h[0].attn.c_attn.weight
    weight.grad = scale(12, 36)
    weight.grad[:, 12:24] *= 2.0**power
    want = gradient_snr.snr(driver.as_array(scale(12, 36))[:, 12:24].ravel())
    optimizer = sharpwise.SGDSaI(model, lr=1e-6)
    optimizer.step()
    assert math.isclose(optimizer.state[weight]["lr_multiplier"][1], want, rel_tol=1e-7)


def test_the_largest_becomes_1_and_one_element_does_no_harm():
    """Released: 1.0.4, which divides by the largest, collapses all scales beside a parameter of one element."""
    model = one(torch.ones(8, 8))
    model.gate, model.v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(4))
    model.gate.grad, model.v.grad = torch.tensor([1e3]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    optimizer = sai(model, normalize="max")
    step(optimizer, model.w, 1.0 - 2.0 * (torch.arange(64) % 2).view(8, 8))
    assert [row["multiplier"] for row in optimizer.lr_multipliers()] == [1.0, 1 / 8, 2 / 8]


@pytest.mark.parametrize("block_lr", ["layer_decay", "llr(stop=4, every=2, soft=3, least=4)"])
def test_another_block_lr_is_a_factor(block_lr):
    """At every step the product of the two, in either order, and by `SGDSaI` itself; at lr 0, nothing moves."""

    def run(build):
        model = models.build("gpt2")
        optimizer, seen = build(model), []
        for recorded in driver.gradients(named(model), 6):
            steps(optimizer, named(model), [recorded])
            seen.append([row["multiplier"] for row in optimizer.lr_multipliers()])
        return np.array(seen)

    both = {"lr": 0.0, "momentum": 0.9, "dampening": 0.9, "decoupled_weight_decay": True}
    want = np.prod([run(lambda m, b=b: sharpwise.SGD(m, **both, block_lr=b)) for b in ("gradient_snr", block_lr)], 0)
    for build in (
        lambda m: sharpwise.SGD(m, **both, block_lr=f"{block_lr}*gradient_snr"),
        lambda m: sharpwise.SGD(m, **both, block_lr=f"gradient_snr*{block_lr}"),
        lambda m: sharpwise.SGDSaI(m, lr=0.0, block_lr=block_lr),
    ):
        found = run(build)
        bad = np.abs(found / want - 1).max(1)
        assert (bad < 1e-12).all(), bad


def test_an_empty_parameter_is_not_waited_for(monkeypatch):
    """It never has a gradient to go by: once all others have one, nothing is measured any more."""
    from sharpwise.engine import multipliers

    calls = []
    measure = multipliers.measure
    monkeypatch.setattr(multipliers, "measure", lambda *args: calls.append(0) or measure(*args))
    model = one(torch.ones(8, 4))
    model.empty = nn.Parameter(torch.empty(0, 4))
    model.empty.grad = torch.empty(0, 4)
    optimizer = sai(model)
    for t in range(4):
        step(optimizer, model.w, scale(8, 4, seed=t))
    assert len(calls) == 1


def test_state_is_one_number_per_element():
    """50% of AdamW's: beside it a count per tensor, and a few numbers per block."""
    model = models.build("gpt2")
    optimizer = sharpwise.SGDSaI(model)
    optimizer.init_state()
    buffers = sum(own["momentum_buffer"].numel() * 4 for own in optimizer.state.values())
    assert buffers == 4 * sum(p.numel() for p in model.parameters())
    segments = len(optimizer.blocks.segments)
    assert optimizer.state_bytes() == buffers + 4 * len(optimizer.state) + 5 * 8 * segments
