"""Adam-mini's matrices in one pass over memory against the eager reference, and what of a model goes that way."""

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise import rules
from sharpwise.engine.backends import loops
from sharpwise.engine.layout import Layouts, Rectangle
from sharpwise.engine.views import views_of
from sharpwise.testing import TinyGPT, fill_gradients, same


def model_of(seed=0):
    """Wide, of fused qkv of 16 heads, rows, tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyGPT(width=256, heads=16, vocabulary=300)


def run(model, optimizer, steps, skip=()):
    for step in steps:
        fill_gradients(model, step, skip)
        optimizer.step()


def one_pass(optimizer):
    """How many parameters the C++ back end moves in one pass."""
    return len({row["name"] for row in optimizer.explain() if row["backend"] == "cpp (one pass)"})


OPTIONS = {
    "bare": {},
    "by block": {"block_lr": "blockwise"},
    "by block, decay of the base": {"block_lr": sharpwise.BlockwiseLR(decay="base")},
    "decay of a part": {"no_decay": ("v", "bias")},
    "bf16 state": {"storage": "bf16"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_is_eager(options, dtype):
    models = [model_of().to(dtype) for _ in range(2)]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), **options}
    first, second = (sharpwise.AdamMini(m, **settings, compile=c) for m, c in zip(models, (True, False), strict=True))
    run(models[0], first, range(1))
    run(models[1], second, range(1))
    built = first.compiled_graphs
    # Tokens, positions, the last norm; qkv, o, up, down and two norms of two layers.
    assert one_pass(first) == 15 and one_pass(second) == 0
    name = "transformer.h.0.attn.c_attn.weight"
    for model, optimizer in zip(models, (first, second), strict=True):
        run(model, optimizer, [1], skip=[name])
        run(model, optimizer, [2, 3])
    assert first.compiled_graphs == built
    # A bf16 number may round to the other side.
    bound = 1e-6 if dtype is torch.float32 and "storage" not in options else 1e-3
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p.double() - q.double()).norm() <= bound * q.double().norm(), name
        for key, value in first.state[p].items():
            other = second.state[q][key].double()
            of_block = key == "exp_avg_sq" and value.shape != p.shape
            assert (value.double() - other).norm() <= (1e-6 if of_block else bound) * other.norm(), (name, key)


def test_a_resumed_run_is_the_same():
    models = [model_of() for _ in range(2)]
    steady, first = (sharpwise.AdamMini(m, lr=1e-2, compile=True) for m in models)
    run(models[0], steady, range(4))
    run(models[1], first, range(2))
    second = sharpwise.AdamMini(models[1], lr=1e-2, compile=True)
    second.load_state_dict(first.state_dict())
    run(models[1], second, range(2, 4))
    assert one_pass(second) and same(*models)


@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 1.0}, {"on_nonfinite": "skip"}, {"stochastic_rounding": True, "storage": "bf16"}],
    ids=str,
)
def test_so_do_steps_that_wait_for_all_gradients(options):
    models = [model_of() for _ in range(2)]
    first, second = (
        sharpwise.AdamMini(m, lr=1e-2, compile=c, **options) for m, c in zip(models, (True, False), strict=True)
    )
    for model, optimizer in zip(models, (first, second), strict=True):
        run(model, optimizer, range(3))
    assert one_pass(first) == 15 and first.compiled_graphs > 0
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        # Momentum in bf16 may round to the other side.
        assert (p - q).norm() <= (1e-4 if "storage" in options else 1e-6) * q.norm(), name


def test_goes_on_without_the_loop(monkeypatch):
    """Where no kernel of the rule can be built, that of sums can, and the reference moves."""
    monkeypatch.setattr(loops, "Kernel", lambda *args: 1 / 0)
    models = [model_of() for _ in range(2)]
    first, second = (sharpwise.AdamMini(m, lr=1e-2, compile=c) for m, c in zip(models, (True, False), strict=True))
    for model, optimizer in zip(models, (first, second), strict=True):
        run(model, optimizer, range(3))
    assert first.compiled_graphs == 1 and one_pass(first) == 0
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm()


def test_gradients_of_another_type_take_two_passes():
    """One matrix of bf16 has gradients in fp32; nothing else changes its way."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has gradients of the parameter's type only")
    models = [model_of().to(torch.bfloat16) for _ in range(2)]
    optimizers = [sharpwise.AdamMini(m, lr=1e-2, compile=c) for m, c in zip(models, (True, False), strict=True)]
    name = "transformer.h.0.attn.c_attn.weight"
    for model, optimizer in zip(models, optimizers, strict=True):
        model.get_parameter(name).grad_dtype = None
        for step in range(3):
            fill_gradients(model, step)
            model.get_parameter(name).grad = model.get_parameter(name).grad.float()
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert (p.double() - q.double()).norm() <= 1e-3 * q.double().norm()
        for key, value in optimizers[0].state[p].items():
            other = optimizers[1].state[q][key].double()
            assert (value.double() - other).norm() <= 1e-3 * other.norm(), key


def rectangles(model, name, blocks=None):
    blocks = blocks or sharpwise.BlockMap.of(model)
    (view,) = views_of(
        name, model.get_parameter(name), rules.AdamMini().defaults, blocks[name], rules.AdamMini(), Layouts()
    )
    return view.rectangles


def test_a_view_as_rectangles():
    model, n = model_of(), 256 * 256
    q, k = (Rectangle(i * n, i * n, 16, 16 * 256, 16 * 256, i, first=i * 16, blocks=16) for i in (0, 1))
    v = Rectangle(2 * n, 2 * n, 256, 256, 256, 2, first=32, blocks=256)
    assert rectangles(model, "transformer.h.0.attn.c_attn.weight") == [q, k, v]
    assert rectangles(model, "transformer.wte.weight") == [Rectangle(0, 0, 300, 256, 256, 0, blocks=300)]
    transposed = nn.Module()
    transposed.w = nn.Parameter(torch.randn(256, 512))
    segment = sharpwise.blocks.Segment("w", (256, 512), role=sharpwise.blocks.Role.UP, dim=1, source="said")
    columns = Rectangle(0, 0, 256, 512, 512, 0, blocks=512, size=1)
    assert rectangles(transposed, "w", sharpwise.BlockMap((segment,))) == [columns]
