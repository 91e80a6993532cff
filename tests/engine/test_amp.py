"""Under a GradScaler: the run without it, less the steps that were not finite. What torch's fused AdamW does is the
measure."""

import pytest
import torch
from reference import adamw, driver, lion, models, sgd
from torch import nn

import sharpwise
from sharpwise.optim import COMBINES, create_optimizer
from sharpwise.testing import TinyGPT, fill_gradients, tiny_model

HOW = {
    "plain": {},
    "clip": {"max_grad_norm": 0.5},
    "skip": {"on_nonfinite": "skip"},
    "raise": {"on_nonfinite": "raise"},
    "clip, skip": {"max_grad_norm": 0.5, "on_nonfinite": "skip"},
    "blockwise": {"block_lr": "blockwise"},
    "gradient_snr": {"block_lr": "gradient_snr"},
    "sharpness": {"block_lr": "sharpness(start=1, every=2, by=module)"},
    "stochastic": {"storage": "bf16", "stochastic_rounding": True},
}
COMPILED = {
    "plain, compiled": {"compile": True},
    "clip, compiled": {"compile": True, "max_grad_norm": 0.5},
    "skip, compiled": {"compile": True, "on_nonfinite": "skip"},
    "sharpness, compiled": {"compile": True, "block_lr": "sharpness(start=1, every=2, by=module)"},
    "stochastic, compiled": {"compile": True, "storage": "bf16", "stochastic_rounding": True},
}
MORE = {"sgd": {"momentum": 0.9}}
CASES = [
    (name, how)
    for name, (block_lrs, _) in COMBINES.items()
    for how, options in (HOW | COMPILED).items()
    if options.get("block_lr", "blockwise").split("(")[0] in block_lrs
]
BAD = 3
"""The step whose gradients are not finite."""


def large_model():
    """Matrices that are large enough for compiled kernels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyGPT(width=256, heads=4, vocabulary=300)


def made(name, how, model):
    options = {"compile": False, **(HOW | COMPILED)[how], **MORE.get(name, {})}
    return create_optimizer(model, name, lr=1e-2, weight_decay=0.1, **options)


def scaler(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 2, **options})


def multiply(model, scale):
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(scale)


def spoil(model, value=float("inf")):
    next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = value


def held(model, optimizer):
    """Weights, state, and what groups count."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    saved = optimizer.state_dict()
    state = {(i, k): v for i, own in saved["state"].items() for k, v in own.items()}
    counts = [{k: g.get(k) for k in ("block_lr_step", "multiplier_ramp", "peak_lr")} for g in saved["param_groups"]]
    return weights, state, counts


def assert_same(some, others):
    for mine, theirs in zip(some[:2], others[:2], strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), (key, (value - theirs[key]).abs().max())
    assert some[2] == others[2]


def scaled_and_not(name, how, before=lambda scale, optimizer: None):
    """Models and optimizers after steps with a scaler, one of which has an infinite gradient, and without both."""
    build = large_model if how in COMPILED else tiny_model
    scaled, plain = build(), build()
    mine, other = made(name, how, scaled), made(name, how, plain)
    scale = scaler()
    scale.scale(torch.ones(()))  # makes its tensors
    norms = []
    for t in range(6):
        fill_gradients(scaled, t)
        fill_gradients(plain, t)
        multiply(scaled, scale.get_scale())
        if t == BAD:
            spoil(scaled)
        else:
            other.step()
        before(scale, mine)
        scale.step(mine)
        scale.update()
        if t != BAD and mine.grad_norm is not None:
            norms.append((float(mine.grad_norm), float(other.grad_norm)))
    assert scale.get_scale() == 1024.0 * 2 / 2 * 2  # grew, shrank, grew
    return scaled, mine, plain, other, norms


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_scaled_run_is_the_run_without_its_bad_step(name, how):
    scaled, mine, plain, other, norms = scaled_and_not(name, how)
    assert_same(held(scaled, mine), held(plain, other))
    assert {float(own["step"]) for own in mine.state.values()} == {5.0}
    assert all(a == b for a, b in norms)
    assert bool(norms) == ("clip" in how or "skip" in how or "raise" in how)
    assert mine.skipped_steps == ("skip" in how)
    if how in COMPILED:
        whole = {"adapm": {"thin"}, "muon": {"matrices"}}.get(name, set())
        assert {row["backend"].split()[0] for row in mine.explain()} == {"cpp"} | whole


@pytest.mark.parametrize(
    ("name", "how"), [case for case in CASES if case[1] in ("plain", "clip, skip", "gradient_snr")]
)
def test_unscaled_before_the_step(name, how):
    """As where a loop clips or logs by itself: gradients are unscaled, and only what is not finite is left to say."""
    scales = []

    def unscale(scale, optimizer):
        scale.unscale_(optimizer)
        optimizer.register_step_pre_hook(lambda own, *_: scales.append(own.grad_scale)) if not scales else None

    scaled, mine, plain, other, norms = scaled_and_not(name, how, unscale)
    assert_same(held(scaled, mine), held(plain, other))
    assert scales == [None] * 6
    assert all(a == b for a, b in norms)


@pytest.mark.parametrize("unscaled", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_as_torchs_own_fused_adamw(unscaled, value):
    """Steps, weights and moments after steps of which several are not finite, the first among them."""
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    pairs = []
    for make in (sharpwise.AdamW, lambda model, **own: torch.optim.AdamW(model.parameters(), fused=True, **own)):
        model = tiny_model()
        optimizer, scale = make(model, **options), scaler(init_scale=3000.0)
        scale.scale(torch.ones(()))
        for t in range(7):
            fill_gradients(model, t)
            multiply(model, scale.get_scale())
            if t in (0, 4, 5):
                spoil(model, value)
            if unscaled:
                scale.unscale_(optimizer)
            scale.step(optimizer)
            scale.update()
        pairs.append((model, optimizer, scale.get_scale()))
    (model, mine, scale), (theirs, torchs, their_scale) = pairs
    assert scale == their_scale
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert driver.error(p, driver.as_array(q)) <= 1e-6
        assert mine.state[p]["step"] == torchs.state[q]["step"] == 4
        for key in ("exp_avg", "exp_avg_sq"):
            assert driver.error(mine.state[p][key], driver.as_array(torchs.state[q][key])) <= 1e-6


def test_a_scale_that_the_user_set_counts_too():
    """As in torch: `grad_scale` that is set is a factor of the scaler's."""
    scaled, plain = tiny_model(), tiny_model()
    mine, other = (sharpwise.AdamW(m, lr=1e-2, compile=False) for m in (scaled, plain))
    scale = scaler()
    scale.scale(torch.ones(()))
    fill_gradients(plain, 0)
    fill_gradients(scaled, 0)
    multiply(scaled, 4096.0)
    mine.grad_scale = torch.tensor(4.0)
    other.step()
    scale.step(mine)
    assert_same(held(scaled, mine), held(plain, other))
    assert not hasattr(mine, "grad_scale")


def test_raise_says_nothing_of_what_the_scaler_leaves_out():
    """The scaler takes care of it, as it searches for a scale; without one it is an error."""
    model = tiny_model()
    optimizer, scale = sharpwise.AdamW(model, lr=1e-2, on_nonfinite="raise"), scaler()
    scale.scale(torch.ones(()))
    fill_gradients(model, 0)
    spoil(model)
    scale.step(optimizer)
    with pytest.raises(FloatingPointError):
        optimizer.step()


# Weights in fp16

HALF = {
    "adamw": (adamw, sharpwise.AdamW, {"lr": 3e-3, "betas": (0.83, 0.961), "eps": 1e-4, "weight_decay": 0.23}),
    "lion": (lion, sharpwise.Lion, {"lr": 7e-4, "betas": (0.8837, 0.9713), "weight_decay": 0.9}),
    "sgd": (sgd, sharpwise.SGD, {"lr": 0.02, "momentum": 0.83, "dampening": 0.37, "weight_decay": 0.21}),
}


def half_ulps(got, want):
    """Largest distance of an fp16 tensor from an array, in units in the last place of fp16.

    Below that, a millionth of the largest element is forgiven: sums cancel in fp64, and almost in fp32.
    """
    want = torch.from_numpy(want)
    ulp = 2.0 ** (want.abs().clamp(min=2.0**-14).log2().floor() - 10)
    return float((((got.detach().double() - want).abs() - 1e-6 * want.abs().max()) / ulp).max())


@pytest.mark.parametrize("scale", [None, 64.0], ids=["", "scaled"])
@pytest.mark.parametrize("compile", [False, None], ids=["reference", "default"])
@pytest.mark.parametrize("case", HALF)
def test_half_precision_weights(case, compile, scale):
    """The reference starts each step from the stored weights, and rounds to fp16: half a unit in the last place."""
    rule, constructor, hyper = HALF[case]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ParameterDict({"large": torch.randn(300, 301), "small": torch.randn(7, 5), "bias": torch.randn(9)})
    model = model.half()
    named = list(model.named_parameters())
    blocks = {"large": "up", "small": "down", "bias": "norm"}
    optimizer = constructor(model, compile=compile, blocks=blocks, **hyper)
    twin = driver.Twin(rule, named, [(driver.names_of(named), hyper)])
    amp = None if scale is None else scaler(init_scale=scale)
    if amp is not None:
        amp.scale(torch.ones(()))
    for t in range(6):
        grads = {n: (torch.randn(p.shape, generator=torch.Generator().manual_seed(t)) * 3).half() for n, p in named}
        for name, p in named:
            twin.p[name] = driver.as_array(p)
            p.grad = grads[name] * (1.0 if amp is None else amp.get_scale())
        optimizer.step() if amp is None else amp.step(optimizer)
        if amp is not None:
            amp.update()
        twin.step(grads, [hyper["lr"]])
        for name, p in named:
            assert p.dtype == torch.float16
            assert half_ulps(p, twin.p[name]) <= 0.5 + 1e-2, (name, t)
            for key in rule.STATE:
                own = optimizer.state[p][key]
                assert own.dtype == torch.float32
                assert driver.error(own, twin.state[name][key]) <= 1e-6, (name, key, t)


@pytest.mark.parametrize("how", ["plain", "clip, skip"])
def test_half_precision_weights_of_blocks(how):
    """Adam-mini: the run in fp32 on the same numbers, rounded to fp16 after each step."""
    model, wide = models.build("gpt2", torch.float16), models.build("gpt2", torch.float16).float()
    mine, other = made("adam-mini", how, model), made("adam-mini", how, wide)
    scale = scaler(init_scale=8.0, growth_interval=100)
    scale.scale(torch.ones(()))
    for t in range(5):
        fill_gradients(model, t)
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            q.grad = p.grad.float()
            q.data = p.detach().float()
        multiply(model, 8.0)
        scale.step(mine)
        scale.update()
        other.step()
        for p, q in zip(model.parameters(), wide.parameters(), strict=True):
            assert torch.equal(p, q.half())
            assert torch.equal(mine.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"])
