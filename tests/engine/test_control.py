"""Controls: what sums they are given, and what their factors do, in every layout, on every back end."""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from distributed.controls import CONTROLS, Sized, Turned
from torch import nn

from sharpwise.block_lr import make_block_lr
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.controls import Angular, Control
from sharpwise.engine import BlockOptimizer
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.options import Options, Storage
from sharpwise.rules import SGD, AdamMini, AdamW, Lion
from sharpwise.rules.muon import Muon
from sharpwise.storage import BF16, FP32
from sharpwise.testing import fill_gradients, tiny_model

# By parameter: shape, output dimension, whether it is stacked, and the output rows of its segments.
QKV = [list(range(i * 12, i * 12 + 12)) for i in range(3)]
BY_HEAD = [[h * 12 + i * 4 + j for h in range(3) for j in range(4)] for i in range(3)]
MATRICES = {
    "rows": ((12, 40), 0, False, [list(range(12))]),
    "columns": ((40, 12), 1, False, [list(range(12))]),
    "fused": ((36, 16), 0, False, QKV),
    "fused_columns": ((16, 36), 1, False, QKV),
    "interleaved": ((36, 8), 0, False, BY_HEAD),
    "experts": ((3, 10, 16), 1, True, [list(range(10))]),
    "expert_columns": ((3, 16, 12), 2, True, [list(range(12))]),
    "narrow": ((9, 1), 0, False, [list(range(9))]),
}
VECTORS = {"norm": ((30,), Role.NORM, False), "bias": ((30,), Role.UP, True), "expert_bias": ((3, 10), Role.UP, True)}
RULES = {
    "adamw": AdamW((0.9, 0.95), 1e-8),
    "lion": Lion((0.9, 0.95)),
    "adam-mini": AdamMini((0.9, 0.95), 1e-8),
    "sgd": SGD(0.9, 0.0, False),
    "muon": Muon(),
}


def segments():
    found = []
    for name, (shape, dim, stacked, rows) in MATRICES.items():
        if len(rows) == 1:
            found.append(Segment(name, shape, Role.UP, dim=dim, stacked=stacked, source="said"))
            continue
        for role, own in zip((Role.Q, Role.K, Role.V), rows, strict=True):
            heads = {"heads": 3} if role != Role.V else {}
            parts = {"stride": 12, "count": 3, "length": 4} if name == "interleaved" else {"length": 12}
            found.append(Segment(name, shape, role, dim=dim, start=own[0], source="said", **parts, **heads))
    for name, (shape, role, bias) in VECTORS.items():
        stacked = len(shape) > 1
        found.append(Segment(name, shape, role, dim=int(stacked), bias=bias, stacked=stacked, source="said"))
    return tuple(found)


def model_of(dtype=torch.float32):
    model = nn.Module()
    for i, (name, (shape, *_)) in enumerate({**MATRICES, **VECTORS}.items()):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        model.register_parameter(name, nn.Parameter(value))
    return model


def built(model, rule, lr=0.02, weight_decay=0.1, storage=FP32, **options):
    blocks, options = BlockMap(segments()), Options(storage=Storage(storage), **options)
    return BlockOptimizer(model, rule, lr=lr, weight_decay=weight_decay, options=options, blocks=blocks)


def units(name, over):
    """Flat indices of the elements of each unit, literally."""
    shape, dim, stacked, rows = MATRICES[name]
    index = np.arange(np.prod(shape)).reshape(shape)
    for matrix in index if stacked else [index]:
        lines = np.moveaxis(matrix, dim - stacked, 0)
        own = [[row] for segment in rows for row in segment] if over == "row" else rows
        yield from (lines[unit].ravel() for unit in own)


def bounded(control, p, d, lr, decay):
    """The equations of `CONTROLS` for one unit; d: what a rule without decay would subtract."""
    if control == "turned":
        return decay * p - lr * np.linalg.norm(p) * d / np.linalg.norm(d)
    if control == "sized":
        return decay * p - lr * 0.3 * np.sqrt(len(p)) * d / np.linalg.norm(d)
    return p + p * (p @ d) / (p @ p) - d


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("clips", [None, 3.0], ids=["", "clipped"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_is_its_equations(control, rule, clips, dtype):
    """Of the directions of the same rule without control and decay, in float64, unit by unit; vectors as ever."""
    model, plain = model_of(dtype), model_of(torch.float64)
    guard = {"max_grad_norm": clips, "block_lr": make_block_lr("blockwise(ffn=2)")}
    optimizer = built(model, RULES[rule], control=CONTROLS[control], **guard)
    twin = built(plain, RULES[rule], weight_decay=0.0, compile=False, **guard)
    rates = {(row["name"], row["role"]): row["lr"] for row in optimizer.lr_multipliers()}
    for t in range(4):
        fill_gradients(model, t)
        before = {}
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            before[name] = p.detach().double().numpy().copy()
            q.data.copy_(p)
            q.grad = p.grad.double()
        optimizer.step()
        twin.step()
        for name, p in model.named_parameters():
            d = before[name] - plain.get_parameter(name).detach().numpy()
            want, old = np.full(d.size, np.nan), before[name].ravel()
            if name in VECTORS:
                want = before[name] * (1 - 0.1 * next(lr for (n, _), lr in rates.items() if n == name)) - d
            else:
                roles = ("q", "k", "v") if len(MATRICES[name][3]) > 1 else ("up",)
                own = list(units(name, CONTROLS[control].over))
                per = len(own) // MATRICES[name][0][0] if MATRICES[name][2] else len(own)
                for i, unit in enumerate(own):
                    lr = rates[name, roles[i % per * len(roles) // per]]
                    want[unit] = bounded(control, old[unit], d.ravel()[unit], lr, 1 - 0.1 * lr)
            off = np.linalg.norm(p.detach().double().numpy().ravel() - want.ravel())
            assert off <= (1e-6 if dtype == torch.float32 else 1e-13) * np.linalg.norm(want), (name, t, off)


@pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("control", CONTROLS)
def test_the_kernels_are_the_reference(control, rule, format):
    """With multipliers, clipping and cautious decay; bf16 rounded stochastically, to the bit but for few."""
    more = {"storage": BF16, "stochastic_rounding": True, "seed": 3} if format == "bf16" else {}
    found = []
    for compiled in (True, False):
        model = model_of(torch.bfloat16 if more else torch.float32)
        options = {"block_lr": make_block_lr("blockwise"), "max_grad_norm": 1.0, "cautious": True, **more}
        optimizer = built(model, RULES[rule], control=CONTROLS[control], compile=compiled, **options)
        for t in range(1 if more else 4):
            fill_gradients(model, t)
            optimizer.step()
        found.append((model, optimizer))
    rows = [row for row in found[0][1].explain() if row["control"]]
    moved_by = {row["name"]: row["backend"] for row in rows}
    if rule != "muon":
        if CONTROLS[control].over == "matrix":  # in one piece; of blocks the rates come first
            inside = set() if rule == "adam-mini" else set(moved_by) - {"interleaved"}
        else:
            lying = {name for name, (_, dim, stacked, _) in MATRICES.items() if dim != stacked}
            inside = set(moved_by) - {"narrow", *(lying if rule == "adam-mini" else [])}
        assert moved_by == {name: "cpp (one pass)" if name in inside else "cpp" for name in moved_by}
    assert {own.partition(" ")[0] for own in moved_by.values()} == ({"matrices", "cpp"} if rule == "muon" else {"cpp"})
    assert not any(row["why"] for row in rows)
    for (name, p), q in zip(found[0][0].named_parameters(), found[1][0].parameters(), strict=True):
        if more:
            assert (p != q).sum() <= 0.01 * p.numel() + 1, name
        else:
            assert (p.double() - q.double()).norm() <= 1e-6 * q.double().norm(), name
        for key, value in found[0][1].state[p].items():
            other = found[1][1].state[q][key].double()
            assert (value.double() - other).norm() <= (1e-3 if more else 1e-6) * other.norm(), (name, key)


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
def test_what_has_no_gradient_or_no_rate_does_not_move(compiled):
    """Sums of zero, and a learning rate of zero, are no trouble; a step that is skipped changes nothing."""
    model = model_of()
    optimizer = built(model, RULES["adamw"], weight_decay=0.0, control=Turned(), on_nonfinite="skip", compile=compiled)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fill_gradients(model, 0)
    for p in model.parameters():
        p.grad[0] = 0.0
    model.rows.grad[3, 3] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    model.rows.grad[3, 3] = 0.0
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert all(p.isfinite().all() and torch.equal(p[0], before[name][0]) for name, p in model.named_parameters())
    assert not any(torch.equal(p[1:], before[name][1:]) for name, p in model.named_parameters() if name in MATRICES)


def test_the_explanation_names_it_where_it_is():
    rows = built(model_of(), RULES["adamw"], control=Sized()).explain()
    assert {row["name"]: row["control"] for row in rows} == {
        **dict.fromkeys(MATRICES, "test-sized"), **dict.fromkeys(VECTORS)
    }  # fmt: skip
    assert "control" not in built(model_of(), RULES["adamw"]).explain().columns


@dataclass(frozen=True)
class Wrong(Control):
    """Returns what it is told."""

    given: object = None

    name: ClassVar[str] = "wrong"
    over: ClassVar[str] = "row"

    def factors(self, sums, s):
        return self.given(sums)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda sums: sums.missing, r"control 'wrong' fails on a row: AttributeError"),
        (lambda sums: sums.uu, r"must return two finite numbers per row or matrix"),
        (lambda sums: (sums.uu, sums.uu.sum()), r"must return two finite numbers per row or matrix"),
        (lambda sums: (sums.pp / sums.uu, sums.uu), r"of zeros too; of two, of which one is all zeros, it returns"),
    ],
    ids=["it raises", "one factor", "one number for all", "not a number"],
)
def test_a_control_that_cannot_work_is_refused(given, says):
    with pytest.raises(ValueError, match=f"^BlockOptimizer: .*{says}"):
        built(model_of(), RULES["adamw"], control=Wrong(given))


def test_coupled_decay_and_unknown_units_are_refused():
    with pytest.raises(ValueError, match="a control is for decoupled weight decay"):
        built(model_of(), RULES["sgd"], control=Turned(), decoupled=False)
    per_layer = type("PerLayer", (Turned,), {"over": "layer"})
    with pytest.raises(ValueError, match=r"is over 'layer'; it may be over row, matrix"):
        built(model_of(), RULES["sgd"], control=per_layer())


def test_a_control_is_of_the_options_and_survives_a_copy():
    model = tiny_model()
    optimizer = BlockOptimizer(model, RULES["adamw"], lr=0.1, weight_decay=0.0, options=Options(control=Sized(0.5)))
    assert copy.deepcopy(optimizer).options.control == Sized(0.5) == replace(Sized(), size=0.5)


def test_angles_of_what_was_built_with_lr_0_follow_the_lr_of_the_step():
    """There is no peak that they could refer to."""
    found = []
    for begin in (0.0, 0.02):
        model = model_of()
        optimizer = built(model, RULES["lion"], lr=begin, control=Angular(), compile=False)
        optimizer.param_groups[0]["lr"] = 0.02
        fill_gradients(model, 0)
        optimizer.step()
        found.append(model)
    assert not torch.equal(found[0].rows, model_of().rows)
    for p, q in zip(*(model.parameters() for model in found), strict=True):
        assert torch.equal(p, q)
