"""The C++ back end against the reference: pairs of types, coupled decay, stochastic rounding, every kind of layout."""

import logging

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine.backends import loops
from sharpwise.engine.backends.base import compiler_present
from sharpwise.testing import fill_gradients

pytestmark = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")

SEGMENTS = [
    Segment("rows", (37, 50), role=Role.UP, source="said"),
    Segment("columns", (50, 37), role=Role.DOWN, dim=1, source="said"),
    Segment("wide", (300, 260), role=Role.DOWN, dim=1, source="said"),
    Segment("heads", (64, 30), role=Role.Q, heads=4, source="said"),
    Segment("heads_of_columns", (30, 64), role=Role.K, heads=4, dim=1, source="said"),
    Segment("fused", (96, 20), role=Role.Q, heads=4, length=32, source="said"),
    Segment("fused", (96, 20), role=Role.V, start=32, length=64, source="said"),
    Segment("fused_columns", (20, 96), role=Role.Q, dim=1, heads=4, length=32, source="said"),
    Segment("fused_columns", (20, 96), role=Role.V, dim=1, start=32, length=64, source="said"),
    Segment("fused_bias", (96,), role=Role.Q, bias=True, length=32, source="said"),
    Segment("fused_bias", (96,), role=Role.V, bias=True, start=32, length=64, source="said"),
    Segment("experts", (3, 24, 10), role=Role.UP, dim=1, stacked=True, source="said"),
    Segment("experts_of_columns", (3, 10, 24), role=Role.DOWN, dim=2, stacked=True, source="said"),
    Segment("norm", (60,), role=Role.NORM, source="said"),
    Segment("long", (20_001,), role=Role.NORM, source="said"),
    Segment("scalar", (), role=Role.OTHER, source="said"),
]
BF16, FP32 = torch.bfloat16, torch.float32
RULES = {
    "adamw": {},
    "adam-mini": {},
    "lion": {},
    "sgd": {"momentum": 0.9},
    "coupled": {"momentum": 0.9, "nesterov": True, "decoupled_weight_decay": False},
}


def model_of(dtype):
    model = nn.Module()
    for i, (name, shape) in enumerate({s.name: s.shape for s in SEGMENTS}.items()):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        model.register_parameter(name, nn.Parameter(numbers.to(dtype)))
    return model


def trained(name, dtype, grad, compile, steps=4, **options):
    """A model and its optimizer after some steps."""
    model = model_of(dtype)
    optimizer = sharpwise.create_optimizer(
        model,
        {"coupled": "sgd"}.get(name, name),
        blocks=BlockMap(SEGMENTS),
        **{"lr": 1e-2, "weight_decay": 0.1, "compile": compile, **RULES[name], **options},
    )
    for step in range(steps):
        fill_gradients(model, step)
        for p in model.parameters():
            if grad != dtype:
                p.grad_dtype = None
                p.grad = p.grad.to(grad)
        optimizer.step()
    return model, optimizer


def assert_alike(one, two, bound):
    for (name, p), q in zip(one[0].named_parameters(), two[0].parameters(), strict=True):
        tensors = {"the parameter": (p.detach(), q.detach())}
        tensors |= {key: (value, two[1].state[q][key]) for key, value in one[1].state[p].items()}
        for key, (mine, other) in tensors.items():
            rounds = bound if BF16 in (mine.dtype, p.dtype) or "bf16" in str(two[1].options.storage.format) else 1e-6
            assert (mine.double() - other.double()).norm() <= rounds * other.double().norm() + 1e-7, (name, key)


@pytest.mark.parametrize("options", [{}, {"block_lr": "blockwise", "max_grad_norm": 1.0}], ids=["bare", "by block"])
@pytest.mark.parametrize(
    ("dtype", "grad", "storage"),
    [(FP32, FP32, "fp32"), (FP32, BF16, "fp32"), (BF16, BF16, "fp32"), (BF16, FP32, "bf16"), (FP32, FP32, "bf16")],
    ids=str,
)
@pytest.mark.parametrize("name", RULES)
def test_is_the_reference(name, dtype, grad, storage, options):
    if grad != dtype and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has gradients of the parameter's type only")
    settings = {"storage": storage, **options}
    one, two = (trained(name, dtype, grad, compile, **settings) for compile in (True, False))
    assert {row["backend"].split()[0] for row in one[1].explain()} == {"cpp"}
    # A bf16 number may round to the other side.
    assert_alike(one, two, 1e-3)


@pytest.mark.parametrize("name", ["sgd", "coupled"])
def test_stochastic_rounding_is_the_reference_to_the_bit(name):
    """Of numbers that both work out exactly, so that only rounding is left."""
    options = {"lr": 0.5, "weight_decay": 0.0, "momentum": 0.5, "storage": "bf16", "stochastic_rounding": True}
    one, two = (trained(name, BF16, BF16, compile, steps=3, **options) for compile in (True, False))
    nearest = trained(name, BF16, BF16, True, steps=3, **{**options, "stochastic_rounding": False})
    for (key, p), q, r in zip(one[0].named_parameters(), two[0].parameters(), nearest[0].parameters(), strict=True):
        assert torch.equal(p, q), key
        assert torch.equal(one[1].state[p]["momentum_buffer"], two[1].state[q]["momentum_buffer"]), key
        assert p.numel() == 1 or not torch.equal(p, r)


@pytest.mark.parametrize("name", ["adamw", "adam-mini", "lion"])
def test_stochastic_rounding_of_other_rules(name):
    """The same noise: but for the last digit of fp32 nothing turns otherwise."""
    options = {"storage": "bf16", "stochastic_rounding": True, "block_lr": "blockwise"}
    one, two = (trained(name, BF16, BF16, compile, steps=1, **options) for compile in (True, False))
    differ = sum(int((p != q).sum()) for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True))
    assert differ <= 1e-3 * sum(p.numel() for p in one[0].parameters())


def test_rates_follow_a_schedule_and_gradients_their_addresses():
    """Argument tables are kept: what changes from step to step is written anew, also where some have no gradient."""
    pairs = []
    for compile in (True, False):
        model, optimizer = trained("adam-mini", FP32, FP32, compile, block_lr="blockwise", max_grad_norm=0.5)
        built, kept = optimizer.compiled_graphs, []
        for step in range(4, 10):
            optimizer.param_groups[0] |= {"lr": 1e-2 / step, "weight_decay": 0.1 * step, "betas": (0.9, 1 - 0.1 / step)}
            optimizer.zero_grad()
            kept.append(torch.empty(1000 * step))  # so that gradients come to lie elsewhere
            fill_gradients(model, step, skip=["rows", "norm"] if step == 6 else [])
            optimizer.step()
        assert optimizer.compiled_graphs == built
        pairs.append((model, optimizer))
    assert_alike(*pairs, 1e-6)


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, caplog):
    def broken(source):
        raise RuntimeError("the compiler is ill\nin many lines")

    monkeypatch.setattr(loops, "library", broken)
    with caplog.at_level(logging.WARNING, "sharpwise"):
        one, two = (trained("adam-mini", FP32, FP32, compile, storage="fp32") for compile in (None, False))
    assert [record.message for record in caplog.records] == [
        "building a kernel failed: the compiler is ill; going on without"
    ]
    assert {row["backend"] for row in one[1].explain()} == {"reference"}
    assert all("the compiler is ill" in row["why"] for row in one[1].explain())
    assert_alike(one, two, 1e-6)
