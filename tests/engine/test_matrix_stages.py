"""What goes element by element in a step of whole matrices: by kernels as by the reference, a view at a time."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import sharpwise
from sharpwise.block_lr import make_block_lr
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.backends import owners
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.options import Options, Storage
from sharpwise.rules import SGD
from sharpwise.rules.base import MatrixRule
from sharpwise.storage import BF16, FP32, Format
from sharpwise.testing import fill_gradients

needs_compiler = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
bf16, fp32 = torch.bfloat16, torch.float32
SAID = {"source": "said", "layer": 0}
SEGMENTS = [
    Segment("rows", (37, 50), role=Role.UP, **SAID),
    Segment("more_rows", (37, 50), role=Role.UP, **SAID),
    Segment("columns", (50, 37), role=Role.DOWN, dim=1, **SAID),
    Segment("wide", (300, 260), role=Role.DOWN, **SAID),
    Segment("wide_columns", (80, 192), role=Role.Q, dim=1, heads=4, length=96, **SAID),
    Segment("wide_columns", (80, 192), role=Role.V, dim=1, heads=4, start=96, length=96, **SAID),
    Segment("heads", (64, 30), role=Role.Q, heads=4, **SAID),
    Segment("fused", (96, 20), role=Role.Q, heads=4, length=32, **SAID),
    Segment("fused", (96, 20), role=Role.V, heads=4, start=32, length=64, **SAID),
    Segment("fused_columns", (20, 96), role=Role.Q, dim=1, heads=4, length=32, **SAID),
    Segment("fused_columns", (20, 96), role=Role.V, dim=1, heads=4, start=32, length=64, **SAID),
    Segment("interleaved", (48, 20), role=Role.Q, heads=4, length=6, stride=12, count=4, **SAID),
    Segment("interleaved", (48, 20), role=Role.V, heads=4, start=6, length=6, stride=12, count=4, **SAID),
    Segment("experts", (3, 24, 10), role=Role.UP, dim=1, stacked=True, **SAID),
    Segment("experts_of_columns", (3, 10, 24), role=Role.DOWN, dim=2, stacked=True, **SAID),
    Segment("norm", (60,), role=Role.NORM, **SAID),
]
MATRICES = sorted({s.name for s in SEGMENTS} - {"norm"})


def model_of(dtype, segments=SEGMENTS):
    model = nn.Module()
    for i, (name, shape) in enumerate({s.name: s.shape for s in segments}.items()):
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        model.register_parameter(name, nn.Parameter(numbers.to(dtype)))
    return model


def trained(compile, dtype=fp32, grad=fp32, steps=4, skip=(), make=sharpwise.Muon, **options):
    """A model and its optimizer after some steps; `skip` gets no gradient in every other one."""
    model = model_of(dtype)
    optimizer = make(model, blocks=BlockMap(SEGMENTS), **{"lr": 1e-2, "compile": compile, **options})
    for step in range(steps):
        fill_gradients(model, step, skip if step % 2 else ())
        for p in model.parameters():
            if grad != dtype and p.grad is not None:
                p.grad_dtype = None
                p.grad = p.grad.to(grad)
        optimizer.step()
    return model, optimizer


def pairs(one, two):
    """Parameters and state of two, by name."""
    for (name, p), q in zip(one[0].named_parameters(), two[0].parameters(), strict=True):
        yield name, p.detach(), q.detach()
        for key, value in one[1].state[p].items():
            yield f"{name}: {key}", value, two[1].state[q][key]


OPTIONS = {
    "plain": {},
    "heads": {"per_head": True},
    "rows": {"normalize_rows": True},
    "heavy ball, clipped": {"heavy_ball": True, "nesterov": False, "max_grad_norm": 0.5},
    "clipped or skipped": {"max_grad_norm": 0.5, "on_nonfinite": "skip", "normalize_rows": True},
    "rates by segment": {"block_lr": "blockwise", "weight_decay": 0.5},
    "decay by segment": {"no_decay": ("q",), "weight_decay": 0.5},
    "cautious decay by segment": {"no_decay": ("q",), "weight_decay": 0.5, "cautious_decay": True},
    "missing gradients": {"skip": ("rows", "fused_columns", "experts", "norm")},
    "first missing": {"skip": MATRICES[::2]},
}


@needs_compiler
@pytest.mark.parametrize("options", OPTIONS)
def test_kernels_are_the_reference(options):
    """Orthogonal factors are found in batches, or one by one: they agree to 3e-5, and move by lr."""
    one, two = (trained(compile, **OPTIONS[options]) for compile in (None, False))
    for name, mine, other in pairs(one, two):
        bound = 1e-4 if "row_second" in name else 1e-6
        off = mine.double() - other.double()
        if "cautious" in options:  # where an update is nearly 0, its sign may be that of a rounding
            flipped = off.abs() > 1e-5
            assert flipped.sum() <= 1e-4 * off.numel(), name
            off = off[~flipped]
        assert off.norm() <= bound * other.double().norm(), name
    assert {row["why"] for row in one[1].explain()} == {""}


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "grad", "storage"), [(bf16, bf16, "bf16"), (bf16, fp32, "fp32"), (fp32, bf16, "bf16")]
)
def test_narrow_types(dtype, grad, storage):
    """To the unit in the last place, of a step; momentum to the bit."""
    if grad != dtype and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has gradients of the parameter's type only")
    one, two = (trained(compile, dtype, grad, steps=1, storage=storage) for compile in (None, False))
    for name, mine, other in pairs(one, two):
        assert ((mine.double() - other.double()).abs() <= 2.0**-7 * other.double().abs()).all(), name


@dataclass(frozen=True)
class Signs(MatrixRule):
    """m <- (m + g) / 2 + wd p / 2 (coupled);   u = sign(m) at half the size: of some numbers all of it is exact."""

    momentum: float = 0.5
    dampening: float = 0.0
    nesterov: bool = False
    name: ClassVar[str] = "test-signs"
    hyperparameters: ClassVar[tuple[str, ...]] = SGD.hyperparameters

    @property
    def state(self):
        return {"m": "element"}

    def assign(self, segment):
        return (self, "tensor") if segment.is_matrix else (SGD(self.momentum), "element")

    def scalars(self, t, group):
        return {"mu": group["momentum"]}

    def input(self, g, state, s):
        m = state["m"] * s["mu"] + g * s["mu"]
        return {"m": m}, m

    def owner(self, m, small, s):
        return m.sign() / 2, {}


def signs(model, blocks, lr, compile, storage=FP32, weight_decay=0.0, **options):
    options = Options(compile=compile, storage=Storage(storage), **options)
    return BlockOptimizer(model, Signs(), lr=lr, weight_decay=weight_decay, blocks=blocks, options=options)


@needs_compiler
def test_stochastic_rounding_is_the_reference_to_the_bit():
    options = {"make": signs, "lr": 2.0**-5, "storage": BF16, "stochastic_rounding": True}
    one, two = (trained(compile, bf16, bf16, steps=3, **options) for compile in (None, False))
    nearest = trained(None, bf16, bf16, steps=3, **{**options, "stochastic_rounding": False})
    for (name, mine, other), (_, _, third) in zip(pairs(one, two), pairs(one, nearest), strict=True):
        if name.split(":")[0] in MATRICES:
            assert torch.equal(mine, other), name
            assert name.endswith("step") or not torch.equal(mine, third), name


@pytest.mark.parametrize("compile", [None, False])
@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
def test_both_decays_are_their_equations(decoupled, compile):
    lr, wd, clip = 2.0**-5, 0.25, 1.5
    options = {"weight_decay": wd, "decoupled": decoupled, "max_grad_norm": clip}
    p, m, factor = {}, {}, []

    def make(model, **own):
        p.update({name: t.detach().double() for name, t in model.named_parameters()})
        return signs(model, **own)

    model, _ = trained(compile, make=make, lr=lr, **options)
    twin = model_of(fp32)
    for step in range(4):
        fill_gradients(twin, step)
        factor.append(min(1.0, clip / float(torch.cat([t.grad.double().view(-1) for t in twin.parameters()]).norm())))
        for name in MATRICES:
            g = twin.get_parameter(name).grad.double() * factor[-1] + (0 if decoupled else wd) * p[name]
            m[name] = (m.get(name, 0) + g) / 2
            p[name] = p[name] * (1 - lr * wd if decoupled else 1) - lr * m[name].sign() / 2
    assert max(factor) < 1
    for name in MATRICES:
        assert (model.get_parameter(name).double() - p[name]).norm() <= 1e-6 * p[name].norm(), name


@pytest.mark.parametrize("compile", [None, False])
def test_multipliers_that_move(compile):
    """Of a rule whose updates have one size, the step of every element is lr times the multiplier of now."""
    block_lr = make_block_lr("llr(start=1,every=2,stop=9,soft=3,least=4)")
    model, optimizer = trained(compile, make=signs, steps=1, lr=2.0**-5, block_lr=block_lr)
    seen = set()
    for step in range(1, 7):
        before = {name: model.get_parameter(name).detach().clone() for name in MATRICES}
        fill_gradients(model, step)
        optimizer.step()
        for row in optimizer.lr_multipliers():
            if row["name"] in ("rows", "columns", "experts"):
                moved = (model.get_parameter(row["name"]) - before[row["name"]]).detach().abs()
                assert torch.allclose(moved, torch.full_like(moved, row["multiplier"] * 2.0**-6), rtol=1e-4), row
                seen.add(row["multiplier"])
    assert len(seen) > 4


@pytest.mark.parametrize("compile", [None, False])
def test_chunks_change_nothing_and_are_what_is_held(compile, monkeypatch):
    one = trained(compile, per_head=True)
    monkeypatch.setattr(owners, "BATCH", 4 * 37 * 50 * 2)
    two = trained(compile, per_head=True)
    for name, mine, other in pairs(one, two):
        assert torch.equal(mine, other) if compile is False else torch.allclose(mine, other, rtol=0, atol=1e-6), name
    sizes = [sum(len(t) for t in o._backends.matrices[compile is None]._scratch.values()) for _, o in (one, two)]
    assert sizes[0] > sum(p.numel() for n, p in one[0].named_parameters() if n in MATRICES) - 1
    assert sizes[1] < 300 * 260 + 16  # one matrix is larger


@needs_compiler
def test_a_steady_step_makes_no_table(monkeypatch):
    """Whatever the number of chunks: addresses within the scratch stay."""
    from sharpwise.engine.backends import cpp

    monkeypatch.setattr(owners, "BATCH", 4 * 37 * 50 * 2)
    model, optimizer = trained(None, steps=2)
    monkeypatch.setattr(cpp, "LaunchTable", None)
    for step in range(3):
        fill_gradients(model, step)
        optimizer.step()


def test_a_step_that_is_not_taken_writes_nothing():
    model, optimizer = trained(None, on_nonfinite="skip", normalize_rows=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {(p, k): t.clone() for p, own in optimizer.state.items() for k, t in own.items()}
    fill_gradients(model, 9)
    model.wide.grad[3, 4] = float("nan")
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(optimizer.state[p][k], t) for (p, k), t in state.items())
    fill_gradients(model, 10)
    optimizer.step()
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in model.named_parameters())


@needs_compiler
def test_why_elements_are_slow():
    rows = sharpwise.Muon(model_of(torch.float64), lr=1e-3, blocks=BlockMap(SEGMENTS)).explain()
    whys = {(row["backend"], row["why"]) for row in rows if row["rule"] == "muon"}
    assert whys == {("matrices", "cpp: fp32 and bf16 alone, not float64")}


class Watched(Format):
    """bf16, and the shapes that are written."""

    name = "watched"

    def __init__(self):
        self.shapes = set()

    def dtype_for(self, compute):
        return torch.bfloat16

    def decode(self, codes, absmax=None, compute=torch.float32):
        return codes.to(compute)

    def encode(self, x, absmax=None, noise=None):
        self.shapes.add(tuple(x.shape))
        return x.to(torch.bfloat16)


def test_a_format_is_given_whole_lines():
    """Of the parameter as it lies in memory, not of its matrices."""
    storage = Watched()
    trained(False, steps=2, storage=storage, per_head=True)
    assert {(96, 20), (20, 96), (48, 20), (50, 37), (72, 10), (3, 10, 24)} <= storage.shapes
    assert not {(8, 20), (20, 8), (6, 20), (24, 10), (10, 24)} & storage.shapes


@needs_compiler
def test_eight_bits_in_kernels_are_those_of_the_reference():
    """Codes of blocks of lines, in every layout: where the last bit turns a code, it turns to the next."""
    one, two = (trained(compile, steps=2, storage="int8-linear", per_head=True) for compile in (None, False))
    assert {row["why"] for row in one[1].explain()} == {""}
    for name, mine, other in pairs(one, two):
        if mine.dtype == torch.uint8 or mine.dtype == torch.int8:
            off = (mine.int() - other.int()).abs()
            assert off.max() <= 1 and (off > 0).sum() <= 1e-3 * off.numel() + 1, name
        else:
            assert (mine.double() - other.double()).norm() <= 1e-3 * other.double().norm(), name
    assert sum(t.dtype in (torch.uint8, torch.int8) for own in one[1].state.values() for t in own.values()) >= 3
