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
from torch import nn

import sharpwise

SHAPES = [(), (1,), (0,), (7,), (3, 0), (5, 3), (1, 1), (17, 31), (2, 3, 5), (64, 65), (3, 2, 1, 4)]


class Bag(nn.Module):
    """Parameters of any shapes."""

    def __init__(self, shapes=SHAPES, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.ParameterList([nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes])


def steps(optimizer, named, grads, lr=None):
    """Steps on recorded gradients; lr: function of t, or None to leave it."""
    for t, recorded in enumerate(grads):
        for group in optimizer.param_groups if lr else ():
            group["lr"] = lr(t)
        for name, p in named:
            p.grad = None if recorded[name] is None else recorded[name].clone()
        optimizer.step()


def named(model):
    return list(model.named_parameters())


def bit_equal(first, second):
    """Same bits in every parameter of two models."""
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        assert torch.equal(p, q), f"{name}: max |difference| {(p - q).abs().max().item():.2e}"


def near(first, second, tolerance=1e-6):
    """Norm-relative per tensor."""
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        assert driver.error(p, driver.as_array(q)) <= tolerance, name


def both(make_first, make_second, *, build=Bag, n=100, lr=lambda t: driver.schedule(2e-3, t), scale=None):
    """Two optimizers on the same gradients; returns the two models and optimizers."""
    first, second = build(), build()
    grads = driver.gradients(named(first), n)
    one, two = make_first(first), make_second(second)
    steps(one, named(first), grads, lr)
    if scale:
        grads = [{name: None if g is None else g * scale for name, g in recorded.items()} for recorded in grads]
    steps(two, named(second), grads, lr)
    return first, second, one, two


def same_state(one, two, first, second, keys):
    """Same bits in the named states."""
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        for key in keys:
            got, want = one.state[p][key], two.state[q][key]
            assert torch.equal(got.reshape(-1).double(), want.reshape(-1).double()), (name, key)


ADAMW = {"lr": 2e-3, "betas": (0.87, 0.963), "eps": 1e-6, "weight_decay": 0.17}


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


@pytest.mark.parametrize("model", ["llama", "gpt2", "gpt_neox"])
def test_adam_mini_by_element_is_adamw(model):
    first, second, one, two = both(
        lambda m: sharpwise.AdamMini(m, **ADAMW, cut="element", compile=False),
        lambda m: sharpwise.AdamW(m, **ADAMW, compile=False),
        build=lambda: models.build(model),
        n=30,
    )
    bit_equal(first, second)
    same_state(one, two, first, second, ["exp_avg", "exp_avg_sq"])


ONES = dict.fromkeys(["emb", "qk", "ffn", "vo", "norm", "head", "pos_emb", "other"], 1)
BARE = {
    "adamw": (sharpwise.AdamW, ADAMW),
    "adam-mini": (sharpwise.AdamMini, ADAMW),
    "lion": (sharpwise.Lion, {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.3}),
    "sgd": (sharpwise.SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "sgd, decoupled": (
        sharpwise.SGD,
        {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
}


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
@pytest.mark.parametrize("rule", BARE)
@pytest.mark.parametrize("model", ["gpt2", "gpt_neox", "llama"])
def test_multipliers_of_one_are_the_bare_rule(model, rule, block_lr):
    constructor, hyper = BARE[rule]
    first, second, _, _ = both(
        lambda m: constructor(m, **hyper, block_lr=block_lr(), compile=False),
        lambda m: constructor(m, **hyper, compile=False),
        build=lambda: models.build(model),
        n=12,
    )
    bit_equal(first, second)


@pytest.mark.parametrize("power", [-8, -1, 1, 5])
@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion"])
def test_gradient_scale_does_not_matter(rule, power):
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
        steps(constructor(model, **hyper, compile=False), named(model), grads)
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


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_clipping_is_torchs(max_norm):
    first, second = Bag(), Bag()
    grads = driver.gradients(named(first), 20)
    one = sharpwise.AdamW(first, **{**ADAMW, "eps": 1.0}, max_grad_norm=max_norm)
    two = torch.optim.AdamW(second.parameters(), **{**ADAMW, "eps": 1.0}, foreach=False)
    for recorded in grads:
        steps(one, named(first), [recorded])
        for name, q in named(second):
            q.grad = None if recorded[name] is None else recorded[name].clone()
        torch.nn.utils.clip_grad_norm_(second.parameters(), max_norm)
        two.step()
    near(first, second)


@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion", "sgd"])
def test_no_decay_is_a_group_without_decay(rule):
    constructor, hyper = BARE[rule]

    def by_hand(model):
        plain = [p for name, p in named(model) if name.endswith("bias") or ".ln_" in name]
        rest = [p for p in model.parameters() if all(p is not q for q in plain)]
        return constructor(
            [{"params": rest}, {"params": plain, "weight_decay": 0.0}], model=model, **hyper, compile=False
        )

    first, second, _, _ = both(
        lambda m: constructor(m, **hyper, no_decay=("norm", "bias"), compile=False),
        by_hand,
        build=lambda: models.build("gpt2"),
        n=5,
    )
    bit_equal(first, second)


def wide_gpt2():
    """Matrices beyond the size from which they are compiled one by one (Conv1D and Linear layout, fused q, k, v)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=4, n_embd=152, n_positions=8, vocab_size=450, bos_token_id=0, eos_token_id=1)
    )


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


@pytest.mark.parametrize(
    "compiled", [None, False, pytest.param(True, marks=pytest.mark.slow)], ids=lambda c: f"compile={c}"
)
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


RESUMABLE = {
    "adamw": (sharpwise.AdamW, ADAMW),
    "adam-mini": (sharpwise.AdamMini, ADAMW),
    "lion": BARE["lion"],
    "sgd": BARE["sgd"],
    "adamw, floor": (
        sharpwise.AdamW,
        {**ADAMW, "block_lr": sharpwise.BlockwiseLR(floor=1.5e-3)},
    ),
    "adam-mini, layers": (sharpwise.AdamMini, {**ADAMW, "block_lr": "layer_decay"}),
    "adamw, bf16 state": (sharpwise.AdamW, {**ADAMW, "storage": "bf16"}),
    "adamw, stochastic": (
        sharpwise.AdamW,
        {**ADAMW, "storage": "bf16", "stochastic_rounding": True, "seed": 5},
    ),
    "adam-mini, stochastic": (
        sharpwise.AdamMini,
        {**ADAMW, "storage": "bf16", "stochastic_rounding": True, "seed": 5},
    ),
    "lion, stochastic": (
        sharpwise.Lion,
        {"lr": 1e-3, "weight_decay": 0.3, "storage": "bf16", "stochastic_rounding": True},
    ),
}


def through_disk(state_dict):
    """What a checkpoint does to it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(case, dtype, reorder=False, switch=5, n=11):
    """A run, and the same run that is saved and loaded in the middle; asserts that they are bit-equal."""
    constructor, hyper = RESUMABLE[case]
    lr = lambda t: driver.schedule(2e-3, t)  # noqa: E731
    straight, stopped = models.build("gpt2", dtype), models.build("gpt2", dtype)
    grads = driver.gradients(named(straight), n)
    whole = constructor(straight, **hyper)
    steps(whole, named(straight), grads, lr)

    first = constructor(stopped, **hyper)
    steps(first, named(stopped), grads[:switch], lr)
    saved, weights = through_disk(first.state_dict()), through_disk(stopped.state_dict())
    resumed = models.build("gpt2", dtype, seed=9)
    resumed.load_state_dict(weights)
    order = named(resumed)[::-1] if reorder else named(resumed)
    second = constructor([p for _, p in order] if reorder else resumed, **hyper, model=resumed)
    second.load_state_dict(saved)
    steps(second, named(resumed), grads[switch:], lambda t: lr(t + switch))
    bit_equal(straight, resumed)
    for (name, p), (_, q) in zip(named(straight), named(resumed), strict=True):
        assert whole.state[p].keys() == second.state[q].keys(), name
        for key, value in whole.state[p].items():
            assert value.dtype == second.state[q][key].dtype, (name, key)
            assert torch.equal(value, second.state[q][key]), (name, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RESUMABLE)
def test_resumed_is_uninterrupted(case, dtype):
    resume(case, dtype)


@pytest.mark.parametrize("case", ["adamw", "adam-mini", "adamw, stochastic", "adam-mini, stochastic", "sgd"])
def test_resumed_in_another_order(case):
    """State dicts match by name: parameters given in reverse order."""
    resume(case, torch.bfloat16 if "stochastic" in case else torch.float32, reorder=True)


def test_resumed_before_the_first_step():
    """A state dict of an optimizer that has not stepped yet loads, and stands for a fresh start."""
    first, second = models.build("llama"), models.build("llama")
    fresh = sharpwise.AdamMini(first, **ADAMW)
    loaded = sharpwise.AdamMini(second, **ADAMW)
    loaded.load_state_dict(through_disk(fresh.state_dict()))
    grads = driver.gradients(named(first), 4)
    steps(fresh, named(first), grads)
    steps(loaded, named(second), grads)
    bit_equal(first, second)


@pytest.mark.parametrize("with_names", [False, True], ids=["by position", "param_names"])
@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
def test_switching_from_torch_in_mid_run(compiled, with_names):
    """A torch.optim.AdamW state dict loads; and ours loads into torch.optim.AdamW."""
    straight, switched = models.build("gpt2"), models.build("gpt2")
    grads = driver.gradients(named(straight), 18)

    def torchs(model):
        first = named(model) if with_names else model.parameters()
        return torch.optim.AdamW(first, **ADAMW, foreach=False, fused=False)

    whole = torchs(straight)
    steps(whole, named(straight), grads)

    one = torchs(switched)
    steps(one, named(switched), grads[:6])
    two = sharpwise.AdamW(switched, **{**ADAMW, "lr": 1.0}, compile=compiled)
    two.load_state_dict(through_disk(one.state_dict()))
    assert two.param_groups[0]["lr"] == ADAMW["lr"]
    steps(two, named(switched), grads[6:12])
    three = torchs(switched)
    three.load_state_dict(through_disk(two.state_dict()))
    steps(three, named(switched), grads[12:])
    if compiled is False:
        bit_equal(straight, switched)
        same_state(whole, three, straight, switched, ["step", "exp_avg", "exp_avg_sq"])
    else:
        near(straight, switched)


def test_switching_when_a_parameter_never_had_a_gradient():
    """Torch keeps no state for it; here its count stands at 0."""
    straight, switched = models.build("llama"), models.build("llama")
    grads = driver.gradients(named(straight), 6)
    for recorded in grads[:4]:
        recorded["model.norm.weight"] = None

    def torchs(model):
        return torch.optim.AdamW(model.parameters(), **ADAMW, foreach=False, fused=False)

    whole = torchs(straight)
    steps(whole, named(straight), grads)
    one = torchs(switched)
    steps(one, named(switched), grads[:2])
    two = sharpwise.AdamW(switched, **ADAMW, compile=False)
    two.load_state_dict(through_disk(one.state_dict()))
    steps(two, named(switched), grads[2:3])
    assert float(two.state[switched.model.norm.weight]["step"]) == 0
    three = torchs(switched)
    three.load_state_dict(through_disk(two.state_dict()))
    steps(three, named(switched), grads[3:])
    bit_equal(straight, switched)


def test_switching_with_two_groups():
    """By position also where a script has groups."""
    straight, switched = models.build("llama"), models.build("llama")
    grads = driver.gradients(named(straight), 10)

    def groups(model):
        matrices, vectors = driver.split_groups(named(model))
        tensors = dict(named(model))
        return [
            {"params": [tensors[n] for n in vectors], "weight_decay": 0.0},
            {"params": [tensors[n] for n in matrices], "lr": 1e-3},
        ]

    whole = torch.optim.AdamW(groups(straight), **ADAMW, foreach=False, fused=False)
    steps(whole, named(straight), grads)
    one = torch.optim.AdamW(groups(switched), **ADAMW, foreach=False, fused=False)
    steps(one, named(switched), grads[:5])
    two = sharpwise.AdamW(groups(switched), model=switched, **ADAMW, compile=False)
    two.load_state_dict(through_disk(one.state_dict()))
    steps(two, named(switched), grads[5:])
    bit_equal(straight, switched)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rule", ["adamw", "adam-mini", "lion", "sgd"])
def test_dummy_step_leaves_no_trace(rule):
    """`get_optimizer_state_dict` steps once with lr 0 and zero gradients to make the state: nothing may change."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    constructor, hyper = BARE[rule]
    plain, looked_at = models.build("gpt2"), models.build("gpt2")
    grads = driver.gradients(named(plain), 6)
    one = constructor(plain, **hyper, block_lr="blockwise")
    steps(one, named(plain), grads)
    two = constructor(looked_at, **hyper, block_lr="blockwise")
    get_optimizer_state_dict(looked_at, two)
    bit_equal(looked_at, models.build("gpt2"))
    assert two.param_groups[0]["lr"] == hyper["lr"]
    steps(two, named(looked_at), grads[:3])
    get_optimizer_state_dict(looked_at, two)
    steps(two, named(looked_at), grads[3:])
    bit_equal(plain, looked_at)
    for (name, p), (_, q) in zip(named(plain), named(looked_at), strict=True):
        for key, value in one.state[p].items():
            assert torch.equal(value, two.state[q][key]), (name, key)
    counts = {name: sum(g[name] is not None for g in grads) for name, _ in named(plain)}
    for name, q in named(looked_at):
        assert float(two.state[q]["step"]) == counts[name], name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", ["adamw", "adam-mini", "adamw, floor", "adamw, stochastic"])
def test_resumed_through_torchs_distributed_checkpoint(case):
    """get_optimizer_state_dict and set_optimizer_state_dict, one process."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    constructor, hyper = RESUMABLE[case]
    dtype = torch.bfloat16 if "stochastic" in case else torch.float32
    straight, stopped = models.build("gpt2", dtype), models.build("gpt2", dtype)
    grads = driver.gradients(named(straight), 8)
    whole = constructor(straight, **hyper)
    steps(whole, named(straight), grads[:4], lambda t: 2e-3)
    steps(whole, named(straight), grads[4:], lambda t: 1.6e-3)
    first = constructor(stopped, **hyper)
    steps(first, named(stopped), grads[:4], lambda t: 2e-3)
    second = constructor(stopped, **hyper)
    for p in stopped.parameters():
        p.grad = None
    saved = through_disk(get_optimizer_state_dict(stopped, first))
    set_optimizer_state_dict(stopped, second, saved)
    steps(second, named(stopped), grads[4:], lambda t: 1.6e-3)
    bit_equal(straight, stopped)


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
