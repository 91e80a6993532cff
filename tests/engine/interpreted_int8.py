"""8-bit state in the Triton kernels, interpreted on the CPU, against the reference. Run by test_triton.py."""

import itertools

import pytest
import torch
from engine import interpreted
from engine.interpreted import of, only_triton  # noqa: F401
from torch import nn

import sharpwise.engine.step as steps
from sharpwise.blocks import BlockMap, Role
from sharpwise.optim import create_optimizer
from sharpwise.storage import Int8
from sharpwise.testing import fill_gradients


def parts(name, shape, dim, ends, heads=None):
    """q, k and v that end there."""
    roles = (Role.Q, Role.K, Role.V)
    return [
        of(name, shape, role, dim, start=a, length=b - a, heads=None if role is Role.V else heads)
        for role, (a, b) in zip(roles, itertools.pairwise((0, *ends)), strict=True)
    ]


SEGMENTS = [
    of("rows", (3, 600), Role.UP),
    of("short", (5, 100), Role.DOWN),
    of("short_aligned", (7, 64), Role.DOWN),
    of("wide", (2, 2100), Role.O, heads=2),
    *parts("qkv", (6, 272), 0, (2, 4, 6), 2),
    *parts("qkv_columns", (3, 530), 1, (256, 512, 530), 2),
    *interpreted.interleaved("heads", (18, 80)),
    of("columns", (3, 66), Role.K, 1, heads=6),
    of("experts", (2, 2, 288), Role.UP, 1, stacked=True),
    of("expert_columns", (2, 3, 72), Role.Q, 2, stacked=True, heads=3),
    of("expert_tensors", (2, 2, 80), Role.POS_EMB, 2, stacked=True),
    of("convolution", (2, 4, 5, 6), Role.OTHER),
    of("unaligned", (2, 272), Role.UP),
    of("dense", (4, 16), Role.UP),
    of("norm", (30,), Role.NORM),
]
CUT = {"qkv_columns"}
"""Of which some segments begin within blocks of 2048."""
RULES = {
    "adamw": ("adamw", {}),
    "lion": ("lion", {}),
    "sgd": ("sgd", {"momentum": 0.9, "decoupled_weight_decay": True}),
    "adam-mini": ("adam-mini", {}),
    "muon": ("muon", {}),
}
STORAGES = ("int8-linear", "int8-dynamic", "int8-dynamic-2048")
OPTIONS = {
    "plain": {},
    "clip and skip": {"max_grad_norm": 0.5, "on_nonfinite": "skip"},
    "bf16 weights": {"dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 7, "block_lr": "blockwise"},
    "NaN": {"on_nonfinite": "ignore", "cautious_decay": True},
}
FEW = [
    ("adamw", "int8-linear", "clip and skip"),
    ("adamw", "int8-dynamic", "NaN"),
    ("lion", "int8-dynamic-2048", "bf16 weights"),
    ("adam-mini", "int8-dynamic", "bf16 weights"),
]
REST = [case for case in itertools.product(RULES, STORAGES, OPTIONS) if case not in FEW]
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (divide|multiply|cast):RuntimeWarning")


def model_of(dtype=torch.float32):
    model = nn.Module()
    for i, segment in enumerate({s.name: s for s in SEGMENTS}.values()):
        value = torch.randn(segment.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        if segment.name == "unaligned":
            value = torch.cat((value.new_zeros(1), value.reshape(-1)))[1:].view(segment.shape)
        model.register_parameter(segment.name, nn.Parameter(value))
    return model


def built(rule, model, **options):
    name, own = RULES[rule]
    own = {**own, **options, "model": model, "blocks": BlockMap(tuple(SEGMENTS)), "keep_fp32": ()}
    return create_optimizer(model.named_parameters(), name, lr=1e-2, weight_decay=0.1, allow_unstable=True, **own)


def off(mine, theirs):
    """How far tensors are from those of the reference, in its norm; NaN where this has NaN."""
    assert torch.equal(mine.isnan(), theirs.isnan())
    mine, theirs = (t.double().nan_to_num(0.0) for t in (mine, theirs))
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("rule", "storage", "options"), CASES)
def test_it_is_the_reference(rule, storage, options, monkeypatch):
    own = dict(OPTIONS[options])
    dtype = own.pop("dtype", torch.float32)
    models = [model_of(dtype), model_of(dtype)]
    optimizers = [built(rule, m, storage=storage, **own, compile=c) for m, c in zip(models, (False, None), strict=True)]
    if options == "plain":
        monkeypatch.setattr(steps, "decided_by_host", lambda views: False)
    differing = total = 0
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, step, skip=("rows",) if step == 1 else ())
            if step == 1 and options in ("clip and skip", "NaN"):
                model.short.grad[3, 2] = float("nan")
            optimizer.step()
        for name, p in models[0].named_parameters():
            q = models[1].get_parameter(name)
            stochastic = p.dtype == torch.bfloat16  # of a number on the edge the last bit may turn
            assert off(q.detach(), p.detach()) <= (1e-3 if stochastic else 1e-6), name
            for key, theirs in optimizers[0].state[p].items():
                mine = optimizers[1].state[q][key]
                if theirs.is_floating_point():
                    assert off(mine, theirs) <= 1e-6, (name, key)
                    continue
                far = (mine.int() - theirs.int()).abs() % 255  # codes 0 and 255 of a dynamic format are next
                assert far.max() <= 1, (name, key)
                differing, total = differing + int((far > 0).sum()), total + far.numel()
        assert differing <= (0 if step == 0 else 1e-5 * total), (step, differing, total)
    assert total
    left = CUT if storage.endswith("2048") and (rule == "adam-mini" or "block_lr" in own) else set()
    assert {row["name"] for row in optimizers[1].explain() if row["why"]} == left
    assert optimizers[1].skipped_steps == (options == "clip and skip")


@pytest.mark.parametrize(
    ("rule", "format", "why"),
    [
        ("adam-mini", Int8("dynamic", 2048), {"qkv_columns": "segments that begin or end within blocks"}),
        ("lion", Int8("linear", 100), "blocks of 100 elements: powers of 2 from 16 to 2048 alone"),
    ],
    ids=["a cut", "a size"],
)
def test_what_it_does_not_move_is_said(rule, format, why):
    model = model_of()
    optimizer = built(rule, model, storage=format)
    optimizer.init_state()
    for row in optimizer.explain():
        held = optimizer.state[model.get_parameter(row["name"])]
        own = why if isinstance(why, str) else why.get(row["name"])
        refused = own is not None and "exp_avg_absmax" in held
        assert row["backend"].split(" ")[0] == ("reference" if refused else "triton"), row
        assert not refused or row["why"].startswith(f"triton: {own}")


@pytest.mark.parametrize("block", [16, 64])
def test_small_blocks(block):
    """Of which several lie in a tile."""
    models = [model_of(), model_of()]
    options = {"storage": Int8("linear", block), "decoupled_weight_decay": False}
    optimizers = [built("sgd", m, **options, compile=c) for m, c in zip(models, (False, None), strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        fill_gradients(model, 0)
        optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert all(torch.equal(t, optimizers[1].state[q][key]) for key, t in optimizers[0].state[p].items())
