"""A method with its knob at a limit is a known method, exactly: torch's, the authors' package, or another of ours."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import driver, models
from reference.rig import (
    ADAMW,
    BARE,
    Bag,
    bit_equal,
    both,
    every_path,
    named,
    near,
    same_state,
    steps,
    wide_gpt2,
)
from torch import nn

import sharpwise
from sharpwise.storage.dense import mix


@pytest.mark.parametrize("hyper", [ADAMW, {}, {**ADAMW, "betas": (0.0, 0.0)}], ids=["set", "default", "no memory"])
def test_adamw_is_torchs_bit_for_bit(hyper):
    first, second, one, two = both(
        lambda m: sharpwise.AdamW(m, **hyper, compile=False),
        lambda m: torch.optim.AdamW(m.parameters(), **hyper, foreach=False, fused=False),
    )
    bit_equal(first, second)
    same_state(one, two, first, second, ["exp_avg", "exp_avg_sq", "step"])


@pytest.mark.parametrize("foreach", [False, True])
def test_adamw_is_torchs_on_the_default_path(foreach):
    first, second, _, _ = both(
        lambda m: sharpwise.AdamW(m, **ADAMW), lambda m: torch.optim.AdamW(m.parameters(), **ADAMW, foreach=foreach)
    )
    near(first, second)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_adamw_is_torchs_in_float64(dtype):
    first, second, _, _ = both(
        lambda m: sharpwise.AdamW(m, **ADAMW),
        lambda m: torch.optim.AdamW(m.parameters(), **ADAMW, foreach=False),
        build=lambda: Bag(dtype=dtype),
        n=30,
    )
    near(first, second, 1e-13)


SGD = [
    {"lr": 0.01},
    {"lr": 0.01, "weight_decay": 0.13},
    {"lr": 0.01, "momentum": 0.83},
    {"lr": 0.01, "momentum": 0.83, "dampening": 0.3, "weight_decay": 0.13},
    {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02},
]


@pytest.mark.parametrize("hyper", SGD, ids=lambda h: ", ".join(h))
def test_sgd_is_torchs(hyper):
    lr = lambda t: driver.schedule(0.01, t)  # noqa: E731
    first, second, one, two = both(
        lambda m: sharpwise.SGD(m, **hyper, compile=False),
        lambda m: torch.optim.SGD(m.parameters(), **hyper, foreach=False, fused=False),
        lr=lr,
    )
    bit_equal(first, second)
    if "momentum" in hyper:
        same_state(one, two, first, second, ["momentum_buffer"])
    first, second, _, _ = both(
        lambda m: sharpwise.SGD(m, **hyper), lambda m: torch.optim.SGD(m.parameters(), **hyper), lr=lr
    )
    near(first, second)


def equal(first, second, compiled):
    """Same bits on the eager path."""
    (near if compiled is None else bit_equal)(first, second)


@every_path
@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
def test_adam_mini_by_element_is_adamw(model, compiled):
    first, second, one, two = both(
        lambda m: sharpwise.AdamMini(m, **ADAMW, cut="element", compile=compiled),
        lambda m: sharpwise.AdamW(m, **ADAMW, compile=compiled),
        build=lambda: models.build(model),
        n=30,
    )
    bit_equal(first, second)
    same_state(one, two, first, second, ["exp_avg", "exp_avg_sq"])


ONES = dict.fromkeys(["emb", "qk", "ffn", "vo", "norm", "head", "pos_emb", "other"], 1)


@pytest.mark.parametrize(
    "block_lr",
    [
        lambda: sharpwise.BlockwiseLR(**ONES),
        lambda: sharpwise.BlockwiseLR(**ONES, decay="base"),
        lambda: sharpwise.BlockwiseLR(**ONES, floor=0.0),
        lambda: sharpwise.LayerDecay(rate=1),
    ],
    ids=["ratios", "base decay", "floor", "layer decay"],
)
@every_path
@pytest.mark.parametrize("rule", BARE)
@pytest.mark.parametrize("model", ["gpt2", "gpt_neox", "llama"])
def test_multipliers_of_one_are_the_bare_rule(model, rule, block_lr, compiled):
    constructor, hyper = BARE[rule]
    first, second, _, _ = both(
        lambda m: constructor(m, **hyper, block_lr=block_lr(), compile=compiled),
        lambda m: constructor(m, **hyper, compile=compiled),
        build=lambda: models.build(model),
        n=12,
    )
    equal(first, second, compiled)


@every_path
@pytest.mark.parametrize("rule", BARE)
def test_a_tensor_is_its_number(rule, compiled):
    """A learning rate and a decay that are 0-d tensors round as numbers do."""
    constructor, hyper = BARE[rule]
    tensors = {key: torch.tensor(hyper[key], dtype=torch.float64) for key in ("lr", "weight_decay")}
    first, second, _, _ = both(
        lambda m: constructor(m, **{**hyper, **tensors}, compile=compiled),
        lambda m: constructor(m, **hyper, compile=compiled),
        build=lambda: models.build("gpt2"),
        n=6,
        lr=None,
    )
    bit_equal(first, second)


@every_path
@pytest.mark.parametrize("power", [-8, -1, 1, 5])
@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion"])
def test_gradient_scale_does_not_matter(rule, power, compiled):
    """Powers of two scale every float exactly: with eps = 0 Adam's m/sqrt(v) and Lion's sign keep their bits."""
    constructor, hyper = BARE[rule]
    hyper = {**hyper, "eps": 0.0} if "eps" in hyper else hyper

    def dense(model):  # 0/0 where eps = 0 and an element never had a gradient
        return driver.gradients(named(model), 10)

    first, second = models.build("llama"), models.build("llama")
    for model, scale in ((first, 1.0), (second, 2.0**power)):
        grads = [
            {
                name: (torch.full_like(p, 0.01) if g is None else torch.where(g == 0, 0.01, g)) * scale
                for (name, p), g in zip(named(model), recorded.values(), strict=True)
            }
            for recorded in dense(model)
        ]
        steps(constructor(model, **hyper, compile=compiled), named(model), grads)
    bit_equal(first, second)
    assert all(torch.isfinite(p).all() for p in first.parameters())


def test_adam_mini_is_the_authors_package():
    """adam-mini 1.1.1 on the layout that it gets right: unfused, untied, no biases, head_dim = d / heads.

    The package does not decay norms and asks for lower-case names; so the norms get a group of their own here.
    """
    from adam_mini import Adam_mini

    head_dim = models.LLAMA["d"] // models.LLAMA["heads"]

    def build():
        model = models.llama(head_dim=head_dim, kv_heads=2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        return model

    def ours(model):
        norms = [p for name, p in named(model) if "norm" in name]
        others = [p for name, p in named(model) if "norm" not in name]
        return sharpwise.AdamMini([{"params": others}, {"params": norms, "weight_decay": 0.0}], model=model, **ADAMW)

    def package(model):
        with contextlib.redirect_stdout(io.StringIO()):
            return Adam_mini(
                named(model),
                **ADAMW,
                dim=models.LLAMA["d"],
                n_heads=models.LLAMA["heads"],
                n_kv_heads=2,
                verbose=False,
            )

    first, second, one, two = both(ours, package, build=build, n=20)
    near(first, second)
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        v = one.state[p]["exp_avg_sq"].reshape(-1)
        assert driver.error(v, driver.as_array(two.state[q]["vmean"]).reshape(-1)) <= 1e-6, name


@every_path
@pytest.mark.parametrize("block_lr", [None, "blockwise"], ids=["", "by block"])
@pytest.mark.parametrize("rule", BARE)
def test_no_decay_is_a_group_without_decay(rule, block_lr, compiled):
    constructor, hyper = BARE[rule]
    hyper = {**hyper, "block_lr": block_lr, "compile": compiled}

    def by_hand(model):
        plain = [p for name, p in named(model) if name.endswith("bias") or ".ln_" in name]
        rest = [p for p in model.parameters() if all(p is not q for q in plain)]
        return constructor([{"params": rest}, {"params": plain, "weight_decay": 0.0}], model=model, **hyper)

    first, second, _, _ = both(
        lambda m: constructor(m, **hyper, no_decay=("norm", "bias")),
        by_hand,
        build=lambda: models.build("gpt2"),
        n=5,
    )
    equal(first, second, compiled)


GUARD = {"max_grad_norm": 1.0, "on_nonfinite": "skip"}


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("adamw", {}),
        ("adam-mini", GUARD),
        pytest.param("adamw", GUARD, marks=pytest.mark.slow),
        pytest.param("adam-mini", {}, marks=pytest.mark.slow),
        *(
            pytest.param(rule, o, marks=pytest.mark.slow)
            for rule in ("lion", "sgd", "sgd, decoupled")
            for o in ({}, GUARD)
        ),
    ],
    ids=lambda value: "" if value == {} else "guarded" if isinstance(value, dict) else value,
)
def test_compiled_is_eager(rule, options):
    constructor, hyper = BARE[rule]
    first, second, one, two = both(
        lambda m: constructor(m, **hyper, **options, block_lr="blockwise", compile=True),
        lambda m: constructor(m, **hyper, **options, block_lr="blockwise", compile=False),
        build=wide_gpt2,
        n=5,
    )
    near(first, second)
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        for key, value in one.state[p].items():
            assert driver.error(value, driver.as_array(two.state[q][key])) <= 1e-6, (name, key)


@every_path
def test_huge_is_finite(compiled):
    """Squares that overflow float32 are no reason to skip a step; infinity is."""
    first, second = wide_gpt2(), wide_gpt2()
    one = sharpwise.Lion(first, lr=1e-3, on_nonfinite="skip", compile=compiled)
    two = sharpwise.Lion(second, lr=1e-3, compile=False)
    for optimizer, model in ((one, first), (two, second)):
        for p in model.parameters():
            p.grad = torch.full_like(p, 1e30)
        optimizer.step()
    near(first, second)
    assert not torch.equal(first.lm_head.weight, wide_gpt2().lm_head.weight)


def test_a_zero_step_is_only_zero_if_everything_is():
    """lr 0 with real gradients feeds the moments, as in torch; zero gradients with a real lr decay the weights."""
    first, second = Bag(), Bag()
    grads = driver.gradients(named(first), 4)
    one = sharpwise.AdamW(first, **ADAMW, compile=False)
    two = torch.optim.AdamW(second.parameters(), **ADAMW, foreach=False)
    rates = [0.0, 1e-3, 0.0, 2e-3]
    grads[1] = {name: torch.zeros_like(p) for name, p in named(first)}
    for optimizer, model in ((one, first), (two, second)):
        steps(optimizer, named(model), grads, lambda t: rates[t])
    bit_equal(first, second)
    same_state(one, two, first, second, ["exp_avg", "exp_avg_sq", "step"])


@settings(max_examples=20, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    zeros=st.sampled_from([0.0, 0.7, 1.0]),
    exponent=st.integers(-30, 8),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.99, 0.5)]),
)
def test_adamw_is_torchs_whatever_comes(shapes, seed, zeros, exponent, betas):
    """Underflowing squares, huge gradients, zeros: the same bits as torch's for-loop."""
    first, second = Bag(shapes, seed=seed), Bag(shapes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    grads = [
        {
            name: torch.randn(p.shape, generator=generator)
            * math.ldexp(1.0, exponent * 2)
            * (torch.rand(p.shape, generator=generator) >= zeros)
            for name, p in named(first)
        }
        for _ in range(3)
    ]
    steps(sharpwise.AdamW(first, betas=betas, compile=False), named(first), grads)
    steps(torch.optim.AdamW(second.parameters(), betas=betas, foreach=False), named(second), grads)
    bit_equal(first, second)


def test_stochastic_rounding_is_unbiased():
    """bf16 parameters under updates far below half a unit in the last place: rounded to nearest they never move."""
    start = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    moved = {}
    for stochastic in (False, True):
        model = nn.Module()
        model.w = nn.Parameter(start.clone())
        optimizer = sharpwise.SGD(model, lr=1e-4, stochastic_rounding=stochastic)
        for _ in range(20):
            model.w.grad = torch.ones_like(model.w)
            optimizer.step()
        moved[stochastic] = 1.0 - model.w.double().mean().item()
    assert moved[False] == 0.0
    deviation = np.sqrt(20 * 1e-4 * 2.0**-8 / 4096)  # of the mean of 4096 sums of 20 roundings
    assert abs(moved[True] - 20e-4) < 6 * deviation


def test_the_hash_of_rounding_loses_nothing():
    """Different numbers of 32 bits have different hashes, half of whose bits are ones, in every place."""
    numbers = torch.from_numpy(np.random.default_rng(0).choice(2**32, 2**20, replace=False))
    hashes = mix(numbers)
    assert len(hashes.unique()) == len(numbers) and hashes.min() >= 0 and hashes.max() < 2**32
    ones = torch.stack([(mix(torch.arange(2**16)) >> bit & 1).double().mean() for bit in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / 2**8


@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion", "sgd"])
def test_stochastic_rounding_does_not_depend_on_the_path(rule):
    """The hash is of seed, step and element: an element is rounded alike, whoever moves it.

    The paths differ in the last fp32 bit, which decides about one rounding in 2^16.
    """
    constructor, hyper = BARE[rule]
    options = {"storage": "bf16", "stochastic_rounding": True, "seed": 3}
    first, second, _, _ = both(
        lambda m: constructor(m, **hyper, **options),
        lambda m: constructor(m, **hyper, **options, compile=False),
        build=lambda: models.build("gpt2", torch.bfloat16),
        n=3,
    )
    differ = sum(int((p != q).sum()) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert differ <= 3e-3 * sum(p.numel() for p in first.parameters())
    seeds = models.build("gpt2", torch.bfloat16), models.build("gpt2", torch.bfloat16)
    for seed, model in enumerate(seeds):
        steps(constructor(model, **hyper, **{**options, "seed": seed}), named(model), driver.gradients(named(model), 3))
    assert not all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in seeds), strict=True))


class Layouts(nn.Module):
    """A transposed matrix, and a convolution in channels_last."""

    def __init__(self, channels_last):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(5, 7, generator=generator).t())
        self.b = nn.Parameter(torch.randn(6, generator=generator))
        if channels_last:
            conv = torch.randn(4, 3, 2, 2, generator=generator)
            self.c = nn.Parameter(conv.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rule", BARE)
def test_memory_layout_does_not_matter(rule, channels_last):
    """Parameters that are not contiguous, and a gradient that is one number expanded."""
    constructor, hyper = BARE[rule]
    hyper = {**hyper, "cut": "tensor"} if rule == "adam-mini" else hyper
    first, second = Layouts(channels_last), Layouts(channels_last)
    for name, p in named(second):
        setattr(second, name, nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)))
    one, two = constructor(first, **hyper), constructor(second, **hyper)
    for recorded in driver.gradients(named(first), 4):
        recorded["b"] = torch.full((6,), 0.5) if recorded["b"] is not None else None
        for (name, p), (_, q) in zip(named(first), named(second), strict=True):
            g = recorded[name]
            q.grad = None if g is None else g.contiguous().clone()
            p.grad = None if g is None else torch.tensor(0.5).expand(6) if name == "b" else torch.empty_like(p).copy_(g)
        one.step()
        two.step()
    near(first, second)
