"""Resumed = uninterrupted, bit for bit, however the state travels; and switching from torch's AdamW and back."""

import pytest
import torch
from reference import driver, models
from reference.rig import ADAMW, BARE, bit_equal, named, near, same_state, steps, through_disk

import sharpwise

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RESUMABLE)
def test_an_empty_state_is_a_fresh_one(case, dtype):
    """As in torch: what an optimizer has kept so far goes when a state dict is loaded that has nothing of it."""
    constructor, hyper = RESUMABLE[case]
    first, second = models.build("gpt2", dtype), models.build("gpt2", dtype)
    grads = driver.gradients(named(first), 8)
    fresh, stepped = constructor(first, **hyper), constructor(second, **hyper)
    groups = through_disk(stepped.state_dict())["param_groups"]
    steps(stepped, named(second), grads[:3])
    second.load_state_dict(first.state_dict())
    stepped.load_state_dict({"state": {}, "param_groups": groups})
    steps(fresh, named(first), grads[3:])
    steps(stepped, named(second), grads[3:])
    bit_equal(first, second)
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        assert all(torch.equal(value, stepped.state[q][key]) for key, value in fresh.state[p].items()), name


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
