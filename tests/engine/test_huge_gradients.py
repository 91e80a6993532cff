"""Gradients that are huge but finite, their squares beyond their type: the step is what it is for small ones."""

import math

import pytest
import torch
from torch import nn

from sharpwise import AdamMini, create_optimizer
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.optim import COMBINES

SEGMENTS = {
    "rows": Segment("rows", (300, 260), role=Role.UP, source="said"),
    "columns": Segment("columns", (260, 300), role=Role.DOWN, dim=1, source="said"),
    "heads": Segment("heads", (256, 300), role=Role.Q, heads=4, source="said"),
    "heads_of_columns": Segment("heads_of_columns", (300, 256), role=Role.K, heads=4, dim=1, source="said"),
    "small": Segment("small", (9, 40), role=Role.O, source="said"),
    "small_columns": Segment("small_columns", (40, 64), role=Role.V, dim=1, source="said"),
    "long": Segment("long", (20_001,), role=Role.NORM, source="said"),
    "norm": Segment("norm", (60,), role=Role.NORM, source="said"),
    "other_norm": Segment("other_norm", (33,), role=Role.NORM, source="said"),
    "bias": Segment("bias", (60,), role=Role.UP, bias=True, source="said"),
    "scalar": Segment("scalar", (), role=Role.OTHER, source="said"),
}
"""Rows and columns, large and small."""


def model_of(dtype, device):
    model = nn.Module()
    for i, (name, segment) in enumerate(SEGMENTS.items()):
        numbers = torch.randn(segment.shape, generator=torch.Generator().manual_seed(i))
        model.register_parameter(name, nn.Parameter(numbers.to(device, dtype)))
    return model


def run(name, dtype, device, exponents, **options):
    """Parameters and state after steps on fixed gradients, those of step t times 2 ** exponents[t]."""
    model = model_of(dtype, device)
    extra = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = create_optimizer(model, name, lr=1e-2, blocks=BlockMap(SEGMENTS.values()), **extra, **options)
    for t, exponent in enumerate(exponents):
        for i, p in enumerate(model.parameters()):
            numbers = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)).to(device, dtype)
            p.grad = torch.ldexp(numbers, torch.tensor(exponent))
        optimizer.step()
        norm = optimizer.grad_norm
        assert norm is None or math.isfinite(norm)
    assert optimizer.skipped_steps == 0
    return {n: [p.detach(), *optimizer.state[p].values()] for n, p in model.named_parameters()}


def assert_alike(found, expected, tolerance):
    for name, tensors in expected.items():
        for mine, other in zip(found[name], tensors, strict=True):
            assert mine.isfinite().all(), name
            assert (mine.double() - other.double()).norm() <= tolerance * other.double().norm(), name


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = {
    "fp32": (torch.float32, [0, 66, 120, 0], 1e-6),
    "bf16": (torch.bfloat16, [0, 66, 120, 0], 1e-2),
    "fp64": (torch.float64, [66, 520, 1010, 0], 1e-8),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compile", [None, False], ids=["default", "eager"])
@pytest.mark.parametrize(("dtype", "exponents", "tolerance"), TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("name", COMBINES)
def test_clipped_they_are_as_any(name, dtype, exponents, tolerance, compile, device):
    """Clipping takes out the scale, but for the 1e-6 that it adds to the norm."""
    options = {"max_grad_norm": 0.5, "on_nonfinite": "skip", "compile": compile}
    expected = run(name, dtype, device, [0] * 4, **options)
    assert_alike(run(name, dtype, device, exponents, **options), expected, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compile", [None, False], ids=["default", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_not_clipped_adam_mini_is_free_of_scale(dtype, tolerance, compile, device):
    """As long as (1-b2) times a mean of squares is in range, which the mean itself is not."""
    options = {"eps": 0.0, "compile": compile}
    small, huge = (run("adam-mini", dtype, device, [exponent] * 4, **options) for exponent in (0, 66))
    for name, tensors in huge.items():
        scales = [1, 1, 2.0**-66, 2.0**-132]  # parameter, step, m, v
        huge[name] = [t.double() * scale for t, scale in zip(tensors, scales, strict=True)]
    assert_alike(huge, small, tolerance)


@pytest.mark.parametrize("compile", [None, False], ids=["default", "eager"])
@pytest.mark.parametrize("size", [1e19, 1e20, 5e20, 7e20, 1e22])
def test_not_clipped_adam_mini_is_out_of_range_where_adamw_is(size, compile):
    """A block of equal gradients is AdamW's element; and once v is infinite, nothing moves any more."""
    models = [nn.Linear(300, 301, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mine = AdamMini(models[0], lr=1e-2, weight_decay=0.0, cut="tensor", compile=compile)
    torchs = torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.0)
    for scale in (1.0, size, 1.0):
        before = models[0].weight.detach().clone()
        for model, optimizer in zip(models, (mine, torchs), strict=True):
            model.weight.grad = torch.full_like(model.weight, scale)
            optimizer.step()
    states = [optimizer.state[model.weight] for model, optimizer in zip(models, (mine, torchs), strict=True)]
    v, expected = (own["exp_avg_sq"].flatten()[0] for own in states)
    assert v.isinf() == expected.isinf() == (size > 6e20)
    if v.isinf():
        assert torch.equal(models[0].weight, before)
    else:
        assert abs(v / expected - 1) <= 1e-6
        assert (models[0].weight - models[1].weight).norm() <= 1e-6 * models[1].weight.norm()


@pytest.mark.parametrize("compile", [None, False], ids=["default", "eager"])
def test_one_huge_element(compile):
    """The largest number of the type: nothing but its block feels it, and that goes on."""
    model = nn.Linear(300, 301, bias=False)
    optimizer = AdamMini(
        model, lr=1e-2, max_grad_norm=1.0, on_nonfinite="raise", blocks={"weight": "up"}, compile=compile
    )
    for t in range(4):
        model.weight.grad = torch.randn(301, 300)
        if t == 2:
            model.weight.grad[7, 5] = torch.finfo(torch.float32).max
        before = model.weight.detach().clone()
        optimizer.step()
        moved = (model.weight.detach() - before).abs()
        assert moved.isfinite().all() and (moved.amax(1) > 0).all()
    assert optimizer.state[model.weight]["exp_avg_sq"].isfinite().all()


def test_second_moments_that_sum_up_beyond_fp32():
    """A multiplier that follows the second moment: scaled, it is what it was."""
    tables = []
    for exponent in (0, 64):
        model = model_of(torch.float32, "cpu")
        optimizer = create_optimizer(
            model, "adamw", lr=1e-3, blocks=BlockMap(SEGMENTS.values()), block_lr="sharpness(start=1, every=1)"
        )
        for t in range(3):
            for i, p in enumerate(model.parameters()):
                g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)) * (
                    2 if p.ndim == 2 else 3
                )
                p.grad = torch.ldexp(g, torch.tensor(exponent))
            optimizer.step()
        tables.append([row["multiplier"] for row in optimizer.lr_multipliers()])
    assert len(set(tables[0])) > 1
    assert tables[1] == pytest.approx(tables[0], rel=1e-5)
