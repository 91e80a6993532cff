"""AdaPM at its limits: AdamW, Adam-mini, momentum in a fixed subspace, an exact truncated SVD."""

import numpy as np
import pytest
import torch
from reference import driver, models
from reference.rig import ADAMW, bit_equal, every_path, named, near, same_state, steps, wide_gpt2
from torch import nn

import sharpwise
from sharpwise.rules.adapm import LowRank, sketch

FULL = {**ADAMW, "momentum": "full", "clip": None}


def _pair(make_one, make_two, build, n=12):
    first, second = build(), build()
    grads = driver.gradients(named(first), n)
    one, two = make_one(first), make_two(second)
    for optimizer, model in ((one, first), (two, second)):
        steps(optimizer, named(model), grads, lambda t: driver.schedule(2e-3, t))
    return first, second, one, two


@every_path
def test_all_momentum_in_full_is_adamw(compiled):
    """To the bit, and in every state."""
    first, second, one, two = _pair(
        lambda m: sharpwise.AdaPM(m, **FULL, compile=compiled),
        lambda m: sharpwise.AdamW(m, **ADAMW, compile=compiled),
        lambda: models.build("gpt2"),
    )
    bit_equal(first, second)
    same_state(one, two, first, second, ["exp_avg", "exp_avg_sq", "step"])


def test_all_momentum_in_full_with_blocks_is_adam_mini():
    first, second, one, two = _pair(
        lambda m: sharpwise.AdaPM(m, **FULL, second_moment="block", compile=False),
        lambda m: sharpwise.AdamMini(m, **ADAMW, compile=False),
        lambda: models.build("llama"),
    )
    bit_equal(first, second)
    same_state(one, two, first, second, ["exp_avg", "exp_avg_sq", "step"])


@every_path
def test_no_momentum_is_adamw_without_b1(compiled):
    hyper = {**ADAMW, "betas": (0.0, 0.963)}
    first, second, *_ = _pair(
        lambda m: sharpwise.AdaPM(m, **hyper, momentum="none", clip=None, compile=compiled),
        lambda m: sharpwise.AdamW(m, **hyper, compile=compiled),
        wide_gpt2,
        n=4,
    )
    near(first, second)


@pytest.mark.parametrize("kept_by", ["element", "block"])
def test_without_memory_low_rank_is_the_gradient(kept_by):
    """b1 = 0: what factors leave out is added back, whatever they hold."""
    hyper = {**ADAMW, "betas": (0.0, 0.963), "clip": None, "second_moment": kept_by}
    first, second, *_ = _pair(
        lambda m: sharpwise.AdaPM(m, **hyper, rank=2, momentum="low_rank", compile=False),
        lambda m: sharpwise.AdaPM(m, **hyper, momentum="none", compile=False),
        lambda: models.build("nanogpt"),
    )
    near(first, second, 1e-5)


class Matrix(nn.Module):
    def __init__(self, rows, columns, dtype=torch.float64):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(rows, columns, dtype=dtype))


def momentum_steps(grads, rank, **options):
    """The product of factors after every gradient."""
    model = Matrix(*grads[0].shape, dtype=grads[0].dtype)
    optimizer = sharpwise.AdaPM(model, lr=1e-3, rank=rank, blocks={"w": "up"}, **options)
    for g in grads:
        model.w.grad = g
        optimizer.step()
        own = optimizer.state[model.w]
        yield own["left"] @ own["right"], model.w.detach().clone()


def test_the_numerator_is_the_average_within_and_the_gradient_beside_a_fixed_subspace():
    """Of gradients within one subspace of rows and one of columns, and small noise beyond both that is orthogonal to
    them: factors span the subspace, P G Q is averaged, and all else stands as it is."""
    torch.manual_seed(0)
    b1, rows, columns, r = 0.9, 12, 20, 3
    u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64))
    grads, average, lr = [], torch.zeros(rows, columns, dtype=torch.float64), 1e-3
    for _ in range(30):
        inside = u[:, :r] @ torch.randn(r, r, dtype=torch.float64) @ v[:, :r].T
        grads.append(inside + 1e-4 * u[:, r:] @ torch.randn(rows - r, columns - r, dtype=torch.float64) @ v[:, r:].T)
    p = u[:, :r] @ u[:, :r].T
    options = {"betas": (b1, 0.0), "eps": 1e3, "weight_decay": 0.0, "clip": None}  # eps: the update is the numerator
    before = torch.zeros_like(average)
    for t, (g, (_, w)) in enumerate(zip(grads, momentum_steps(grads, r, **options), strict=True), start=1):
        average = b1 * average + (1 - b1) * (p @ g)
        wanted = average / (1 - b1**t) + (g - p @ g)
        found = (before - w) / lr * (g.abs() + 1e3)
        before = w
        assert (found - wanted).norm() <= 2e-3 * wanted.norm(), t


def drifting(seed, n=100):
    """384 x 512: a signal of rank 24 that turns and decays in its spectrum, and noise (the test of the facts)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    u, v = normal(384, 24), normal(512, 24)
    sizes = 10.0 * 0.85 ** torch.arange(24.0)
    for _ in range(n):
        u, v = u + 0.05 * normal(384, 24), v + 0.05 * normal(512, 24)
        left, right = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
        yield left @ torch.diag(sizes * (1 + 0.3 * normal(24))) @ right.T + 0.05 * normal(384, 512)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_factors_follow_full_momentum_as_an_exact_truncated_svd_does(dtype):
    """The distance to full momentum is at most 5% above that of an exact SVD of rank 16 of the same recursion."""
    grads = list(drifting(0, 60))
    full, exact, distances = torch.zeros(384, 512), torch.zeros(384, 512), []
    options = {"weight_decay": 0.0, "storage": dtype}
    for t, (g, (product, _)) in enumerate(zip(grads, momentum_steps(grads, 16, **options), strict=True)):
        full = 0.9 * full + 0.1 * g
        u, s, vh = torch.linalg.svd(0.9 * exact + 0.1 * g, full_matrices=False)
        exact = (u[:, :16] * s[:16]) @ vh[:16]
        if t >= 20:
            distances.append([float((own.float() - full).norm() / full.norm()) for own in (product, exact)])
    ours, theirs = np.mean(distances, axis=0)
    assert 0.1 < theirs < 0.9, "the test shows nothing"
    assert ours <= 1.05 * theirs, (ours, theirs)


def test_factors_stay_bounded_when_the_subspace_turns():
    """Gradients that have nothing in common turn it at every step: the columns of L stay orthonormal."""
    generator = torch.Generator().manual_seed(0)
    model = Matrix(24, 40, torch.float32)
    optimizer = sharpwise.AdaPM(model, lr=1e-3, rank=4, blocks={"w": "up"})
    for _ in range(400):
        model.w.grad = torch.randn(24, 40, generator=generator)
        optimizer.step()
    own = optimizer.state[model.w]
    assert torch.allclose(own["left"].T @ own["left"], torch.eye(4), atol=1e-3)
    assert 0.1 < own["right"].norm() < 100


def test_zero_gradients_leave_the_sketch_and_end_in_nothing():
    """Before the first real gradient the factors are as they began; a thousand zeros after it do no harm."""
    model = Matrix(24, 40, torch.float32)
    optimizer = sharpwise.AdaPM(model, lr=1e-3, rank=4, blocks={"w": "up"}, weight_decay=0.0)
    for g in (torch.zeros(24, 40), torch.zeros(24, 40), torch.randn(24, 40), *[torch.zeros(24, 40)] * 1000):
        if g.any():
            own = optimizer.state[model.w]
            assert torch.equal(own["right"], sketch(4, 40, torch.device("cpu"))) and not own["left"].any()
            assert not model.w.any()
        model.w.grad = g
        optimizer.step()
    assert own["right"].any() and not (own["left"] @ own["right"]).abs().max() > 1e-30
    model.w.grad = torch.randn(24, 40)
    optimizer.step()
    assert (own["left"] @ own["right"]).norm() > 0.02 * model.w.grad.norm()
    assert model.w.isfinite().all()


def test_scale_of_gradients_does_not_matter():
    """From the smallest to the largest gradients of fp32 products neither vanish nor overflow."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(24, 40, generator=generator) for _ in range(6)]
    found = []
    for scale in (2.0**-40, 1.0, 2.0**40):
        *_, (product, w) = momentum_steps([g * scale for g in grads], 4, eps=0.0, weight_decay=0.0)
        found.append((product / scale, w))
    for product, w in found:
        assert torch.allclose(product, found[1][0], rtol=1e-4, atol=1e-5) and torch.allclose(w, found[1][1], rtol=1e-4)


def test_a_rule_is_of_its_role():
    """Each of a fused parameter has factors of its own."""
    assert LowRank(role="q") != LowRank(role="k")
