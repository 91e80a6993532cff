"""Our own loops against the equations in float64, on shapes that divide by nothing."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.backends.loops import Squares
from sharpwise.engine.optimizer import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.rules import AdamMini
from sharpwise.rules.base import Rule
from sharpwise.testing import fill_gradients

pytestmark = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")

SHAPES = [(1, 1), (7, 5), (5, 700), (700, 5), (64, 256), (130, 2001), (1, 70000), (70000, 1), (129, 16), (2000, 33)]


@pytest.fixture
def threads():
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_squares(dim, dtype, exact, n, threads):
    threads(n)
    generator = torch.Generator().manual_seed(dim)
    matrices = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    found = Squares()(matrices, [dim] * len(matrices), exact)
    for g, sums in zip(matrices, found, strict=True):
        expected = (g.double() ** 2).sum(dim)
        assert sums.shape == expected.shape
        assert ((sums - expected).abs() <= (1e-14 if exact else 1e-6) * expected).all()


def test_squares_of_rows_and_columns_in_one_call():
    matrices = [torch.randn(40, 70), torch.randn(90, 30).bfloat16(), torch.randn(8, 300)]
    for g, dim, sums in zip(matrices, (0, 1, 0), Squares()(matrices, [0, 1, 0]), strict=True):
        assert torch.allclose(sums, (g.double() ** 2).sum(dim), rtol=1e-6)


def test_squares_that_are_not_finite():
    g = torch.ones(100, 100)
    g[3, 4], g[5, 6] = float("nan"), float("inf")
    for dim, (nan, inf) in enumerate([(4, 6), (3, 5)]):
        (sums,) = Squares()([g], [dim])
        assert sums[nan].isnan()
        assert sums[inf].isinf()
        assert int(sums.isfinite().sum()) == 98


LAYOUTS = {
    "rows": ((331, 211), 0, "row"),
    "columns": ((331, 211), 1, "row"),
    "heads of rows": ((6 * 60, 203), 0, "head"),
    "heads of columns": ((203, 6 * 60), 1, "head"),
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("shape", "dim", "cut"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_is_the_equations(shape, dim, cut, n, threads):
    """methods.md 2, in float64: m, v per block, and the parameter."""
    threads(n)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(shape))
    heads = {"heads": 6, "role": Role.Q} if cut == "head" else {"role": Role.UP}
    blocks = BlockMap((Segment("w", shape, dim=dim, source="said", **heads),))
    lr, wd, b1, b2, eps = 1e-2, 0.1, 0.9, 0.95, 1e-8
    optimizer = sharpwise.AdamMini(model, lr=lr, weight_decay=wd, betas=(b1, b2), eps=eps, blocks=blocks, compile=True)
    p, m = model.w.detach().double(), torch.zeros(shape, dtype=torch.float64)
    size = 60 if cut == "head" else 1
    v = torch.zeros(shape[dim] // size, dtype=torch.float64)
    for t in range(1, 5):
        fill_gradients(model, t)
        g = model.w.grad.double()
        optimizer.step()
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g**2).mean(1 - dim).view(-1, size).mean(1)
        below = ((v / (1 - b2**t)).sqrt() + eps).repeat_interleave(size)
        p = p * (1 - lr * wd) - lr * (m / (1 - b1**t)) / (below[:, None] if dim == 0 else below)
        state = optimizer.state[model.w]
        for mine, expected in ((model.w.detach(), p), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
            assert (mine.double() - expected).norm() <= 1e-6 * expected.norm(), t
    assert [row["backend"] for row in optimizer.explain()] == ["cpp (one pass)"]


def assert_alike(optimizers, params):
    """A parameter and its state under one optimizer and under another."""
    tensors = [
        {"the parameter": p.detach(), **optimizer.state[p]} for optimizer, p in zip(optimizers, params, strict=True)
    ]
    for name, value in tensors[0].items():
        other = tensors[1][name].double()
        assert (value.double() - other).norm() <= 1e-6 * other.norm(), name


RULES = {
    "adamw": (sharpwise.AdamW, {"block_lr": "blockwise"}),
    "lion": (sharpwise.Lion, {"lr": 1e-3}),
    "adam-mini": (sharpwise.AdamMini, {"block_lr": "blockwise"}),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("build", "options"), RULES.values(), ids=RULES)
def test_elements_are_the_eager_ones(build, options, transposed):
    """Under clipping, with steps and decay by row, in both layouts of a weight and on sizes that divide by nothing."""
    models, segments = [], []
    for i, (heads, role) in enumerate([(6, Role.Q), (None, Role.UP)]):
        shape = (402, 259) if not transposed else (259, 402)
        part = {"heads": heads, "length": 198} if heads else {"start": 198, "length": 204}
        segments.append(Segment("w", shape, role=role, dim=int(transposed), source="said", layer=i, **part))
    optimizers = []
    for compile in (True, False):
        model = nn.Module()
        model.w = nn.Parameter(torch.linspace(-1, 1, 402 * 259).view(segments[0].shape))
        settings = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5, "no_decay": ("q",), **options}
        optimizers.append(build(model, blocks=BlockMap(tuple(segments)), compile=compile, **settings))
        models.append(model)
        for t in range(4):
            fill_gradients(model, t)
            optimizers[-1].step()
    assert {row["backend"].split()[0] for row in optimizers[0].explain()} == {"cpp"}
    assert_alike(optimizers, [model.w for model in models])


def test_whatever_the_default_type():
    models = []
    for default in (torch.float32, torch.float64):
        model = nn.Linear(300, 301, bias=False, dtype=torch.float32)
        nn.init.constant_(model.weight, 0.1)
        torch.set_default_dtype(default)
        try:
            optimizer = sharpwise.AdamMini(model, lr=1e-2, cut="tensor", on_nonfinite="skip", compile=True)
            two = sharpwise.AdamMini(model, lr=1e-2, cut="tensor", compile=True)
            model.weight.grad = torch.linspace(-1, 1, 300 * 301, dtype=torch.float32).view(301, 300)
            optimizer.step()
            two.step()
        finally:
            torch.set_default_dtype(torch.float32)
        assert two.explain()[0]["backend"] == "cpp (one pass)"
        models.append(model)
    assert torch.equal(models[0].weight, models[1].weight)


@dataclass(frozen=True)
class Own(Rule):
    """A rule of a user's: names that our C++ uses, and numbers that fp32 does not hold."""

    name: ClassVar[str] = "own"
    hyperparameters: ClassVar[tuple[str, ...]] = ()

    @property
    def state(self):
        return {"p": "element", "i": "element"}

    def scalars(self, t, group):
        return {"rows": 0.3, "s": 0.7, "float": 0.1}

    def direction(self, g, state, s):
        p = state["p"] * s["s"] + g * 0.1
        i = 0.9 * state["i"] - g / 3.7
        return {"p": p, "i": i}, p * s["rows"] + i.abs() * s["float"], None


class Cubed(AdamMini):
    """Of a rule that no loop has words for."""

    name = "cubed"

    def direction(self, g, state, s):
        new, numerator, denominator = super().direction(g, state, s)
        return new, numerator**3, denominator


def test_a_rule_of_ones_own():
    models = [nn.Linear(300, 301, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    settings = [Options(compile=compile) for compile in (True, False)]
    optimizers = [
        BlockOptimizer(m, Own(), lr=1e-2, weight_decay=0.1, options=o) for m, o in zip(models, settings, strict=True)
    ]
    for t in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, t)
            optimizer.step()
    assert {row["backend"] for row in optimizers[0].explain()} == {"cpp"}
    assert_alike(optimizers, [model.weight for model in models])


class CubedBlocks(AdamMini):
    """Of a rule that no loop has words for where it looks at blocks."""

    name = "cubed blocks"

    def block_phase(self, blocks, mean_square, s):
        new, denominator = super().block_phase(blocks, mean_square, s)
        return new, denominator**3


@pytest.mark.parametrize("rule", [Cubed, CubedBlocks])
def test_a_rule_without_words_is_refused(rule):
    models = [nn.Linear(300, 301) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    blocks = {"weight": "up"}
    settings = {"lr": 1e-2, "weight_decay": 0.1, "blocks": blocks}
    optimizers = [
        BlockOptimizer(m, rule(), options=Options(compile=c), **settings)
        for m, c in zip(models, (True, False), strict=True)
    ]
    for t in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, t)
            optimizer.step()
    row = optimizers[0].explain()[0]
    assert row["backend"] != "cpp" and "no words in C++ for aten.pow" in row["why"]
    assert_alike(optimizers, [model.weight for model in models])
