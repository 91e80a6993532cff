"""What tests of identities share: models of any shapes, recorded gradients, equality of parameters and of state."""

import io

import pytest
import torch
from torch import nn

import sharpwise
from reference import driver

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


def both(make_first, make_second, *, build=Bag, n=100, lr=lambda t: driver.schedule(2e-3, t)):
    """Two optimizers on the same gradients; returns the two models and optimizers."""
    first, second = build(), build()
    grads = driver.gradients(named(first), n)
    one, two = make_first(first), make_second(second)
    steps(one, named(first), grads, lr)
    steps(two, named(second), grads, lr)
    return first, second, one, two


def same_state(one, two, first, second, keys):
    """Same bits in the named states."""
    for (name, p), (_, q) in zip(named(first), named(second), strict=True):
        for key in keys:
            got, want = one.state[p][key], two.state[q][key]
            assert torch.equal(got.reshape(-1).double(), want.reshape(-1).double()), (name, key)


# By kernels, which are nearly equal, and by the reference.
every_path = pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")

ADAMW = {"lr": 2e-3, "betas": (0.87, 0.963), "eps": 1e-6, "weight_decay": 0.17}
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


def wide_gpt2():
    """Matrices that several threads share (Conv1D and Linear layout, fused q, k, v)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_head=4, n_embd=152, n_positions=8, vocab_size=450, bos_token_id=0, eos_token_id=1)
    )


def through_disk(state_dict):
    """What a checkpoint does to it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
