"""Controls in Triton kernels, interpreted on the CPU, against the reference. Run by test_triton.py in a process of its
own."""

import pytest
import torch
from engine.test_control import RULES, segments
from torch import nn

import sharpwise.engine.step as steps
from sharpwise.block_lr import make_block_lr
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.controls import L2, Angular, Hyperball
from sharpwise.engine import BlockOptimizer, backends
from sharpwise.engine.backends import triton_bounds
from sharpwise.engine.options import Options, Storage
from sharpwise.rules.base import Rule
from sharpwise.storage import BF16, FP32, Int8
from sharpwise.testing import fill_gradients

CONTROLS = {
    "l2": L2(inverse_bias_correction=True),
    "angular": Angular(),
    "hyperball": Hyperball(),
    "snr": Angular(angle="sqrt", snr=True, batch_size=8),
}
HELD_LATER = ("rows", "columns")
"""Of these some rows, or all, begin at zero."""
NAMES = ("rows", "columns", "fused_columns", "interleaved", "expert_columns", "norm")
GUARDS = {"none": {}, "clip": {"max_grad_norm": 1.0}, "skip": {"max_grad_norm": 1.0, "on_nonfinite": "skip"}}


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    monkeypatch.setitem(backends.ORDER, "cpu", ("triton",))


def model_of(dtype):
    model = nn.Module()
    for i, (name, shape) in enumerate({s.name: s.shape for s in segments()}.items()):
        if name in NAMES:
            value = torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
            if name in HELD_LATER:
                value[: 3 if name == "rows" else None] = 0.0
            model.register_parameter(name, nn.Parameter(value))
    return model


def built(rule, dtype=torch.float32, storage=FP32, **options):
    model = model_of(dtype)
    blocks = BlockMap(tuple(s for s in segments() if s.name in NAMES))
    options = Options(storage=Storage(storage), block_lr=make_block_lr("blockwise"), cautious=True, **options)
    return model, BlockOptimizer(model, rule, lr=0.02, weight_decay=0.1, options=options, blocks=blocks)


def check(control, rule, guard, format, monkeypatch):
    monkeypatch.setattr(steps, "decided_by_host", lambda views: guard != "skip")
    monkeypatch.setattr(triton_bounds, "WIDEST", 64)
    monkeypatch.setattr(triton_bounds, "SPAN", 512)
    monkeypatch.setattr(triton_bounds, "UNITS", (32, 8))  # fewer programs, which take long here
    bf16, skips = format == "bf16", guard == "skip"
    how = {"dtype": torch.bfloat16, "storage": BF16, "stochastic_rounding": True, "seed": 3} if bf16 else {}
    how |= GUARDS[guard]
    (model, optimizer), (other, twin) = (
        built(RULES[rule], control=CONTROLS[control], compile=own, **how) for own in (None, False)
    )
    for step in range(1 + skips if bf16 else 2 + skips):
        for own, moved in ((model, optimizer), (other, twin)):
            fill_gradients(own, step)
            if skips and step == 1:
                own.rows.grad[3, 2] = float("nan")
            moved.step()
    assert {row["backend"] for row in optimizer.explain()} == {"triton"} | ({"matrices"} if rule == "muon" else set())
    assert {row["why"] for row in optimizer.explain()} == {""}
    assert optimizer.skipped_steps == twin.skipped_steps == int(skips)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        pairs = {"p": (p.detach(), q.detach())} | {k: (t, twin.state[q][k]) for k, t in optimizer.state[p].items()}
        for key, (mine, theirs) in pairs.items():
            off = (mine.double() - theirs.double()).norm()
            if mine.dtype == torch.bfloat16:  # of a value on the edge the last bit may turn
                assert (mine != theirs).sum() <= 0.01 * mine.numel() + 1, (name, key)
            assert off <= (1e-3 if bf16 else 1e-6) * theirs.double().norm(), (name, key, float(off))


@pytest.mark.pairwise
@pytest.mark.parametrize("format", ["fp32", "bf16"])
@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("rule", ["lion", "adamw", "adam-mini", "sgd"])
@pytest.mark.parametrize("control", ["l2", "angular", "hyperball"])
def test_a_control_is_the_reference(control, rule, guard, format, monkeypatch):
    """Rows, columns and matrices, norms that are held as they grow, and a step that is skipped, of which a device
    alone knows."""
    check(control, rule, guard, format, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("control", "rule"), [("snr", "lion"), ("angular", "muon")])
def test_so_it_is_of_gradient_snr_and_of_whole_matrices(control, rule, monkeypatch):
    check(control, rule, "clip", "fp32", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("control", ["l2", "angular"])
def test_rows_move_by_what_torch_found(control, monkeypatch):
    """As where a mesh cuts units: their sums come from elsewhere."""
    monkeypatch.setattr(triton_bounds, "ThinRule", Rule)
    found = [built(RULES["lion"], control=CONTROLS[control], compile=own) for own in (None, False)]
    for step in range(2):
        for model, optimizer in found:
            fill_gradients(model, step)
            optimizer.step()
    assert {row["backend"] for row in found[0][1].explain()} == {"triton"}
    for (name, p), q in zip(found[0][0].named_parameters(), found[1][0].parameters(), strict=True):
        assert (p - q).norm() <= 1e-6 * q.norm(), name


def test_what_triton_leaves_to_the_reference_under_a_control():
    """State in blocks; `explain` says so."""
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.randn(8, 128)))
    how = Options(storage=Storage(Int8("linear", 16)), control=Angular())
    blocks = BlockMap((Segment("w", (8, 128), Role.UP, dim=0, source="said"),))
    optimizer = BlockOptimizer(model, RULES["lion"], lr=0.02, weight_decay=0.1, options=how, blocks=blocks)
    (row,) = optimizer.explain()
    assert row["backend"] == "reference"
    assert row["why"] == "triton: a control of state that is coded in blocks"
