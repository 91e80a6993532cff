"""Units that a control bounds as they move: one kernel call, each is summed up and moved, and no other read."""

import math

import pytest
import torch
from engine.test_control import RULES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sharpwise.block_lr import make_block_lr
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.controls import L2, Angular, Hyperball
from sharpwise.controls.rms_clip import RMSClip
from sharpwise.engine import BlockOptimizer, control
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.backends.cpp_print import _bound
from sharpwise.engine.backends.launch import LaunchTable
from sharpwise.engine.backends.loops import SHARED
from sharpwise.engine.options import Options, Storage
from sharpwise.rules import SGD
from sharpwise.storage import BF16, FP32, Int8
from sharpwise.testing import fill_gradients

pytestmark = pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
CONTROL = Angular(snr=True, batch_size=16)


def model_of():
    """A matrix, q, k and v in one, and experts, all in the layout of Linear."""
    torch.manual_seed(0)
    model = nn.Module()
    for name, shape in (("rows", (20, 160)), ("fused", (24, 96)), ("experts", (2, 10, 96))):
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model


def built(model, rule, storage=FP32, **options):
    fused = [
        Segment(
            "fused", (24, 96), role, dim=0, start=8 * i, length=8, heads=2 if role != Role.V else None, source="said"
        )
        for i, role in enumerate((Role.Q, Role.K, Role.V))
    ]
    rows = Segment("rows", (20, 160), Role.UP, dim=0, source="said")
    experts = Segment("experts", (2, 10, 96), Role.UP, dim=1, stacked=True, source="said")
    how = Options(storage=Storage(storage), **options)
    blocks = BlockMap((rows, *fused, experts))
    return BlockOptimizer(model, rule, lr=0.02, weight_decay=0.1, options=how, blocks=blocks)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that torch makes, and does not only look at."""

    def __init__(self, known):
        super().__init__()
        self.known, self.elements = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for own in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(own, torch.Tensor) and own.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, own.numel())
        return found


@pytest.mark.parametrize("bound", [Angular(), L2()], ids=str)
@pytest.mark.parametrize("rule", ["lion", "adamw"])
def test_vectors_are_bounded_as_they_move_segment_by_segment(rule, bound, monkeypatch):
    """As by torch, to rounding, with multipliers of their own, and without any work of torch on one of them."""
    named = {"norm": torch.randn(300), "fused": torch.randn(24) * 3}
    segments = [Segment("norm", (300,), Role.NORM, bias=False, source="said")]
    roles = zip((Role.Q, Role.K, Role.V), (2, 2, None), strict=True)
    segments += [
        Segment("fused", (24,), role, start=8 * i, length=8, heads=heads, bias=True, source="said")
        for i, (role, heads) in enumerate(roles)
    ]
    found = []
    for compiled in (True, False):
        model = nn.Module()
        for name, value in named.items():
            model.register_parameter(name, nn.Parameter(value.clone()))
        how = {"control": bound, "compile": compiled, "block_lr": make_block_lr("blockwise(qk=3, vo=2)")}
        optimizer = BlockOptimizer(
            model, RULES[rule], lr=0.02, weight_decay=0.1, options=Options(**how), blocks=BlockMap(tuple(segments))
        )
        with monkeypatch.context() as patched:
            if compiled:
                patched.setattr(control.Bounds, "_factors", _refused)
            for t in range(3):
                fill_gradients(model, t)
                optimizer.step()
        assert {row["backend"] for row in optimizer.explain()} == {"cpp (one pass)" if compiled else "reference"}
        found.append(model)
    for p, q in zip(*(model.parameters() for model in found), strict=True):
        assert (p.double() - q.double()).norm() <= 1e-6 * q.double().norm()


def _refused(*_):
    raise AssertionError("torch sums up rows")


@pytest.mark.parametrize("rule", ["lion", "adamw"])
def test_a_step_is_one_call_and_makes_nothing_of_the_size_of_a_matrix(rule, monkeypatch):
    monkeypatch.setattr(control, "_row_sums", _refused)
    calls, launch = [], LaunchTable.launch
    monkeypatch.setattr(LaunchTable, "launch", lambda self, *more: (calls.append(self), launch(self, *more)))
    model = model_of()
    optimizer = built(model, RULES[rule], control=Angular())
    for t in range(3):
        fill_gradients(model, t)
        held = [t for p in model.parameters() for t in (p, p.grad)]
        state = [t for own in optimizer.state.values() for t in own.values()]
        with Largest([*held, *state]) as largest:
            optimizer.step()
    assert len(calls) == 3 and len({id(table) for table in calls}) == 1
    most = max(p.numel() for p in model.parameters())
    assert 0 < largest.elements < most / 20, "as many numbers as rows, at the most"
    assert {row["backend"] for row in optimizer.explain()} == {"cpp (one pass)"}


@pytest.mark.parametrize("bound", [Angular(), L2(), Hyperball()], ids=str)
def test_columns_and_matrices_are_bounded_in_the_call_that_moves_them(bound, monkeypatch):
    monkeypatch.setattr(control, "_row_sums", _refused)
    calls, launch = [], LaunchTable.launch
    monkeypatch.setattr(LaunchTable, "launch", lambda self, *more: (calls.append(self), launch(self, *more)))
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.randn(300, 20)))
    blocks = BlockMap((Segment("w", (300, 20), Role.UP, dim=1, source="said"),))
    how = Options(control=bound)
    optimizer = BlockOptimizer(model, RULES["lion"], lr=0.02, weight_decay=0.1, options=how, blocks=blocks)
    for t in range(3):
        fill_gradients(model, t)
        held = [model.w, model.w.grad, *(t for own in optimizer.state.values() for t in own.values())]
        with Largest(held) as largest:
            optimizer.step()
    assert len(calls) == 3 and len({id(table) for table in calls}) == 1
    assert largest.elements <= 60


LARGE = {
    "rows": [Segment("rows", (500, 200), Role.UP, dim=0, source="said")],
    "columns": [Segment("columns", (302, 330), Role.UP, dim=1, source="said")],
    "fused": [
        Segment("fused", (260, 300), role, dim=1, start=100 * i, length=100, heads=2, source="said")
        for i, role in enumerate((Role.Q, Role.K, Role.V))
    ],
    "experts": [Segment("experts", (3, 130, 200), Role.UP, dim=1, stacked=True, source="said")],
    "expert_columns": [Segment("expert_columns", (3, 130, 200), Role.UP, dim=2, stacked=True, source="said")],
    "norm": [Segment("norm", (70_000,), Role.NORM, bias=False, source="said")],
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bound", [CONTROL, L2(), Hyperball()], ids=lambda c: c.name)
@pytest.mark.parametrize("storage", [FP32, BF16, Int8("dynamic"), Int8("dynamic", 300)], ids=lambda s: s.name)
def test_large_units_are_bounded_by_all_threads(bound, threads, storage):
    """As the reference bounds them: matrices of more elements than one thread sums up, whichever way they lie, with
    multipliers by segment."""
    before, found = torch.get_num_threads(), []
    assert all(math.prod(own[0].shape) > SHARED for own in LARGE.values())
    for compiled in (None, False):
        torch.manual_seed(0)
        model = nn.Module()
        for name, own in LARGE.items():
            model.register_parameter(name, nn.Parameter(torch.randn(own[0].shape)))
        blocks = BlockMap(tuple(segment for own in LARGE.values() for segment in own))
        how = {"block_lr": make_block_lr("blockwise(qk=3, vo=2)"), "compile": compiled, "storage": Storage(storage)}
        options = Options(control=bound, **how)
        optimizer = BlockOptimizer(model, RULES["lion"], lr=0.02, weight_decay=0.1, options=options, blocks=blocks)
        try:
            torch.set_num_threads(threads)
            for t in range(3):
                fill_gradients(model, t)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        if compiled is None and not storage.block:
            inside = {row["backend"] for row in optimizer.explain() if row["control"]}
            assert inside == {"cpp (one pass)"}
        found.append((model, optimizer))
    for (name, p), q in zip(found[0][0].named_parameters(), found[1][0].parameters(), strict=True):
        assert (p.double() - q.double()).norm() <= 2e-6 * q.double().norm(), name
        held, other = (one.state[x].get("held_norm") for (_, one), x in zip(found, (p, q), strict=True))
        assert held is None or torch.allclose(held, other, rtol=1e-6), name


@pytest.mark.parametrize("storage", [FP32, BF16, Int8("dynamic")], ids=lambda s: s.name)
@pytest.mark.parametrize("rule", ["lion", "adam-mini"])
def test_they_move_as_the_reference_moves_them(rule, storage):
    """With multipliers by segment, clipping, the factor by gradient SNR, and norms that are held as they grow."""
    found = []
    for compiled in (None, False):
        model = model_of()
        with torch.no_grad():
            model.rows[:7] = 0.0
        options = {"block_lr": make_block_lr("blockwise"), "max_grad_norm": 1.0, "compile": compiled}
        optimizer = built(model, RULES[rule], storage, control=CONTROL, **options)
        for t in range(4):
            fill_gradients(model, 3)
            for p in model.parameters():
                p.grad += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            optimizer.step()
        found.append((model, optimizer))
    for (name, p), q in zip(found[0][0].named_parameters(), found[1][0].parameters(), strict=True):
        assert (p.double() - q.double()).norm() <= 2e-6 * q.double().norm(), name
        for key, value in found[0][1].state[p].items():
            other = found[1][1].state[q][key].double()
            assert (value.double() - other).norm() <= 1e-6 * other.norm() or value.dtype == torch.uint8, (name, key)
        assert (found[0][1].state[p]["held_norm"] > 0).all()


@pytest.mark.parametrize("bound", [L2(), Hyperball(), Angular()], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_parts_of_a_single_row_move(rows, bound):
    """Of q, k and v in the columns of a matrix of one row each is less than a row."""
    parts = [
        Segment("w", (rows, 96), role, dim=1, start=32 * i, length=32, source="said")
        for i, role in enumerate((Role.Q, Role.K, Role.V))
    ]
    found = []
    for compiled in (None, False):
        model = nn.Module()
        model.w = nn.Parameter(torch.linspace(-1, 1, rows * 96).view(rows, 96))
        how = Options(control=bound, compile=compiled)
        optimizer = BlockOptimizer(model, RULES["lion"], lr=0.02, weight_decay=0.1, options=how, blocks=BlockMap(parts))
        for step in range(2):
            fill_gradients(model, step)
            optimizer.step()
        found.append((model.w.detach(), optimizer.state[model.w]["exp_avg"]))
    for mine, theirs in zip(*found, strict=True):
        assert theirs.norm() > 0 and (mine - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize(
    ("bound", "alone"), [(L2(), True), (RMSClip(), True), (Hyperball(), False), (Angular(), False)]
)
def test_what_only_scales_is_told_of_the_update_alone(bound, alone):
    """The weights are not read for it."""
    assert ("SCALES = true" in _bound(bound)) is alone


@pytest.mark.parametrize("along", [False, True], ids=["random", "along the weights"])
@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e19])
@pytest.mark.parametrize("bound", [L2(), Hyperball(), Angular()], ids=str)
def test_sums_in_fp32_are_taken_again_where_they_are_not_sure(bound, scale, along):
    """Squares beyond its range, and updates of which little is left beside the weights; of rows, columns, zeros."""
    segments = [
        Segment(n, (40, 65), Role.UP, dim=d, source="said") for n, d in (("rows", 0), ("columns", 1), ("zeros", 0))
    ]
    found = []
    for compiled in (None, False):
        model = nn.Module()
        for i, segment in enumerate(segments):
            numbers = torch.randn(40, 65, generator=torch.Generator().manual_seed(i))
            model.register_parameter(segment.name, nn.Parameter(numbers * (segment.name != "zeros")))
        how = Options(control=bound, compile=compiled)
        optimizer = BlockOptimizer(model, SGD(0.9), lr=0.02, weight_decay=0.0, options=how, blocks=BlockMap(segments))
        for step in range(2):
            fill_gradients(model, step)
            for p in model.parameters():
                p.grad.mul_(1e-3 * scale if along else scale).add_(p.detach() * scale * along)
            optimizer.step()
        assert {row["backend"] for row in optimizer.explain()} <= {"cpp (one pass)", "reference"}
        found.append([p.detach() for p in model.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()
