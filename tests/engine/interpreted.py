"""The Triton kernels, interpreted on the CPU, against the reference. Run by test_triton.py in a process of its own."""

import itertools
import os
import sys
from dataclasses import dataclass

if (
    "pytest" not in sys.modules
):  # a process of its own: it is read as Triton is imported, and would hold for other tests
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import nn

import sharpwise.engine.step as steps
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine import backends
from sharpwise.engine.backends import triton_jobs, triton_launch, triton_print
from sharpwise.engine.optimizer import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.optim import create_optimizer
from sharpwise.rules import SGD
from sharpwise.storage.dense import mix, round_to
from sharpwise.testing import fill_gradients

SIZES = {"one program": 1 << 16, "pieces": 64}


def of(name, shape, role, dim=0, **more):
    return Segment(name, shape, role=role, dim=dim, source="said", **more)


def fused(name, shape, dim=0, **more):
    """q, k, v one after the other, in three heads."""
    n = shape[dim] // 3
    return [
        of(name, shape, role, dim, start=i * n, length=n, heads=3 if role is not Role.V else None, **more)
        for i, role in enumerate((Role.Q, Role.K, Role.V))
    ]


def interleaved(name, shape, dim=0):
    """Every head has its q, k and v."""
    n = shape[dim] // 9
    parts = {"length": n, "stride": 3 * n, "count": 3}
    return [
        of(name, shape, role, dim, start=i * n, **parts, heads=3 if role is not Role.V else None)
        for i, role in enumerate((Role.Q, Role.K, Role.V))
    ]


SEGMENTS = [
    of("embedding", (11, 40), Role.TOK_EMB),
    of("rows", (12, 48), Role.UP),
    of("odd", (5, 33), Role.O),
    of("short", (40, 4), Role.DOWN),
    of("columns", (24, 80), Role.UP, 1),
    of("odd_columns", (7, 9), Role.DOWN, 1),
    *fused("qkv", (36, 16)),
    *fused("qkv_columns", (16, 72), 1),
    *interleaved("heads", (36, 8)),
    *interleaved("heads_of_columns", (8, 36), 1),
    of("wide_heads", (6, 160), Role.K, 1, heads=2),
    of("experts", (3, 10, 16), Role.UP, 1, stacked=True),
    of("expert_columns", (3, 16, 12), Role.DOWN, 2, stacked=True),
    of("expert_tensors", (2, 8, 8), Role.POS_EMB, 2, stacked=True),
    of("expert_heads", (2, 8, 12), Role.Q, 2, stacked=True, heads=3),
    of("positions", (5, 70), Role.POS_EMB),
    of("norm", (30,), Role.NORM),
    of("bias", (30,), Role.UP, bias=True),
    of("scalar", (), Role.OTHER),
    of("empty", (0, 8), Role.GATE),
    of("no_columns", (8, 0), Role.GATE),
    of("unaligned", (6, 20), Role.UP),
]


def model_of(dtype=torch.float32):
    model = nn.Module()
    for i, segment in enumerate({s.name: s for s in SEGMENTS}.values()):
        generator = torch.Generator().manual_seed(i)
        value = torch.randn(segment.shape, generator=generator).to(dtype)
        if segment.name == "unaligned":
            value = torch.cat((value.new_zeros(1), value.reshape(-1)))[1:].view(segment.shape)
        model.register_parameter(segment.name, nn.Parameter(value))
    return model


RULES = {
    "adamw": ("adamw", {}),
    "lion": ("lion", {}),
    "sgd": ("sgd", {"momentum": 0.9}),
    "coupled": ("sgd", {"momentum": 0.9, "decoupled_weight_decay": False}),
    "adam-mini": ("adam-mini", {}),
    "adam-mini by tensor": ("adam-mini", {"v_by": "tensor", "cautious_decay": True}),
}
FORMATS = {
    "fp32": (torch.float32, {}),
    "bf16 state": (torch.float32, {"storage": "bf16", "stochastic_rounding": True}),
    "bf16": (torch.bfloat16, {"storage": "bf16", "stochastic_rounding": True, "seed": 7}),
    "bf16 nearest": (torch.bfloat16, {}),
}
GUARDS = {
    "none": {},
    "clip": {"max_grad_norm": 0.5},
    "skip": {"on_nonfinite": "skip"},
    "both": {"max_grad_norm": 0.5, "on_nonfinite": "skip"},
}
AXES = {
    "rule": RULES,
    "format": FORMATS,
    "guard": GUARDS,
    "block_lr": {"uniform": {}, "blockwise": {"block_lr": "blockwise"}},
    "groups": {"one group": 1, "two groups": 2},
    "counts": {"host": True, "device": False},
    "size": SIZES,
}


def pairwise():
    """Few cases with every pair of values of every two axes."""
    missing = {(a, x, b, y) for a, b in itertools.combinations(AXES, 2) for x, y in itertools.product(AXES[a], AXES[b])}
    everything = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    found = []
    while missing:
        pairs = [{(a, c[a], b, c[b]) for a, b in itertools.combinations(AXES, 2)} & missing for c in everything]
        best = max(range(len(pairs)), key=lambda i: len(pairs[i]))
        missing -= pairs[best]
        found.append(everything[best])
    return found


FEW = pairwise()
REST = [
    case
    for values in itertools.product(*AXES.values())
    if (case := dict(zip(AXES, values, strict=True))) not in FEW
    and (case["counts"] == "device") == (case["size"] == "pieces")  # these two by turns
]
CASES = [pytest.param(c, id="-".join(c.values())) for c in FEW]
CASES += [pytest.param(c, id="-".join(c.values()), marks=pytest.mark.slow) for c in REST]


def built(case, model, **more):
    name, own = RULES[case["rule"]]
    options = {**own, **FORMATS[case["format"]][1], **GUARDS[case["guard"]], **AXES["block_lr"][case["block_lr"]]}
    groups = [{"params": list(model.parameters())}]
    if case["groups"] == "two groups":
        params = list(model.parameters())
        flags = {"nesterov": True} if name == "sgd" else {"betas": (0.8, 0.9)}
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3, "weight_decay": 0.0, **flags}]
    return create_optimizer(
        groups, name, lr=1e-2, weight_decay=0.1, model=model, blocks=BlockMap(tuple(SEGMENTS)), **options, **more
    )


@pytest.fixture(autouse=True)
def only_triton(monkeypatch):
    monkeypatch.setitem(backends.ORDER, "cpu", ("triton",))


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference(case, monkeypatch):
    monkeypatch.setattr(triton_jobs, "ONE_PROGRAM", SIZES[case["size"]])
    if case["counts"] == "device":
        monkeypatch.setattr(steps, "decided_by_host", lambda views: False)
    dtype = FORMATS[case["format"]][0]
    models = [model_of(dtype), model_of(dtype)]
    optimizers = [built(case, models[0], compile=False), built(case, models[1])]
    skips = case["guard"] in ("skip", "both")
    nearest = case["format"] == "bf16 nearest"  # the interpreter cuts bits off: after one step, the last one
    for step in range(1 + skips if nearest else 2 + skips):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, step, skip=("odd",) if step == 1 else ())
            if skips and step == 1:
                model.rows.grad[3, 2] = float("nan")
            optimizer.step()
    assert {row["backend"].split(" ")[0] for row in optimizers[1].explain()} == {"triton"}
    assert optimizers[0].skipped_steps == optimizers[1].skipped_steps == (1 if skips else 0)
    stochastic = "stochastic_rounding" in FORMATS[case["format"]][1]
    for name, p in models[0].named_parameters():
        q = models[1].get_parameter(name)
        mine, theirs = optimizers[1].state[q], optimizers[0].state[p]
        pairs = {"the parameter": (q.detach(), p.detach())}
        pairs |= {key: (mine[key], value) for key, value in theirs.items() if isinstance(value, torch.Tensor)}
        for key, (own, expected) in pairs.items():
            off = (own.double() - expected.double()).norm()
            if own.dtype == torch.bfloat16 and stochastic:  # of a value on the edge the last bit may turn
                assert (own != expected).sum() <= 0.001 * own.numel() + 1, (name, key)
                assert off <= 1e-3 * expected.double().norm(), (name, key)
            elif own.dtype == torch.bfloat16:
                assert ((own - expected).abs() <= 2.0**-7 * expected.abs() + 1e-6).all(), (name, key)
            else:
                assert off <= 1e-6 * expected.double().norm(), (name, key, float(off))


def test_rounding_is_that_of_storage_to_the_bit():
    import triton
    import triton.language as tl

    formats = triton_print.Formats(torch.bfloat16, torch.bfloat16, (), (), True)
    module = triton_print.module(triton_print.kernels(SGD(), formats, False).text)
    stochastic = module.stochastic

    @triton.jit
    def rounded(x, index, key, out, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(out + i, stochastic(tl.load(x + i), tl.load(index + i), tl.load(key).to(tl.uint32)))

    rounded.fn.__globals__["stochastic"] = stochastic
    generator = torch.Generator().manual_seed(0)
    n = 4096
    x = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-30, 30, (n,), generator=generator)
    x[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38])
    index = torch.randint(0, 1 << 40, (n,), generator=generator)
    key = mix(0xDEADBEEF)
    out = torch.empty(n, dtype=torch.bfloat16)
    globals().update(tl=tl, stochastic=stochastic)
    rounded[(1,)](x, index, torch.tensor([key]), out, N=n)
    expected = round_to(x, torch.bfloat16, index, key)
    assert torch.equal(out.view(torch.int16)[~x.isnan()], expected.view(torch.int16)[~x.isnan()])
    assert out[4].isnan()


def test_sums_of_the_largest_gradients_are_finite():
    for name in ("adamw", "adam-mini"):
        model = model_of()
        optimizer = create_optimizer(
            model, name, lr=1e-3, blocks=BlockMap(tuple(SEGMENTS)), max_grad_norm=1.0, on_nonfinite="raise"
        )
        for p in model.parameters():
            p.grad = torch.full_like(p, 3e38)
        optimizer.step()
        n = sum(p.numel() for p in model.parameters())
        assert float(optimizer.grad_norm) == pytest.approx(3e38 * n**0.5, rel=1e-6)
        assert all(p.isfinite().all() for p in model.parameters())


def test_gradients_may_lie_anywhere_and_move():
    models = [model_of(), model_of()]
    case = dict.fromkeys(AXES, "") | {"rule": "adam-mini", "format": "fp32", "guard": "clip", "block_lr": "uniform"}
    optimizers = [built(case, models[0], compile=False), built(case, models[1])]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, step)
            for p in model.parameters():
                g = p.grad
                if step == 1:
                    p.grad = torch.cat((g.new_zeros(1), g.reshape(-1)))[1:].view(g.shape)
                elif step == 2 and g.dim() == 2:
                    p.grad = g.T.contiguous().T
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p - q).norm() <= 1e-6 * p.norm()


def test_only_numbers_that_changed_are_uploaded(monkeypatch):
    from sharpwise.engine.backends import triton_tables

    sent = []
    upload = triton_tables.upload
    monkeypatch.setattr(triton_tables, "upload", lambda *args: sent.append(len(args)) or upload(*args))
    model = model_of()
    optimizer = create_optimizer(model, "adam-mini", lr=1e-3, blocks=BlockMap(tuple(SEGMENTS)))
    fill_gradients(model, 0)
    optimizer.step()
    sent.clear()
    optimizer.step()  # the gradients lie where they lay
    assert len(sent) == 1
    for p in model.parameters():
        p.grad = p.grad.clone()
    kept = [p.grad for p in model.parameters()]
    sent.clear()
    optimizer.step()
    assert len(sent) == 2, kept


def test_text_is_the_same_for_other_numbers():
    """No hyperparameter, size or multiplier is in a kernel."""
    from sharpwise.rules import AdamMini

    formats = triton_print.Formats(torch.float32, torch.float32, (torch.float32,), (torch.float32,), False)
    texts = {triton_print.kernels(AdamMini(betas, eps), formats, False).text for betas, eps in
             (((0.9, 0.99), 1e-8), ((0.5, 0.7), 1e-3))}  # fmt: skip
    assert len(texts) == 1


@dataclass(frozen=True)
class Strange(SGD):
    """Its arithmetic has an operation that no printer has."""

    def direction(self, g, state, s):
        new, numerator, below = super().direction(g, state, s)
        return new, numerator.erf(), below


def test_arithmetic_without_words_is_the_references(caplog):
    model = model_of()
    optimizer = BlockOptimizer(
        model, Strange(momentum=0.9), lr=1e-3, weight_decay=0.0, options=Options(), blocks=BlockMap(tuple(SEGMENTS))
    )
    fill_gradients(model, 0)
    optimizer.step()
    assert {row["backend"] for row in optimizer.explain()} == {"reference"}
    assert {row["why"] for row in optimizer.explain()} == {"triton: no words in Triton for aten.erf.default"}
    assert not caplog.records


def test_a_kernel_that_cannot_be_built_is_said_once(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("ptxas died\nof something")

    monkeypatch.setattr(triton_launch, "build", fails)
    model = model_of()
    optimizer = create_optimizer(model, "adam-mini", lr=1e-3, blocks=BlockMap(tuple(SEGMENTS)))
    fill_gradients(model, 0)
    optimizer.step()
    rows = [row for row in optimizer.explain() if row["name"] not in ("empty", "no_columns")]
    assert {row["backend"] for row in rows} == {"reference"}
    assert {row["why"] for row in rows} == {"triton: building a kernel failed: ptxas died"}
    assert [r.levelname for r in caplog.records if "ptxas died" in r.message].count("WARNING") == 1


def test_groups_whose_scalars_are_worked_out_otherwise(monkeypatch):
    """Dampening that follows momentum, and one that is 0, on a device that alone knows the count."""
    monkeypatch.setattr(steps, "decided_by_host", lambda views: False)
    models = [model_of(), model_of()]
    optimizers = []
    for model, more in zip(models, ({"compile": False}, {}), strict=True):
        params = list(model.parameters())
        groups = [{"params": params[::2], "dampening": None}, {"params": params[1::2], "lr": torch.tensor(3e-3)}]
        blocks = BlockMap(tuple(SEGMENTS))
        optimizers.append(
            create_optimizer(
                groups, "sgd", lr=1e-2, momentum=0.9, model=model, blocks=blocks, on_nonfinite="skip", **more
            )
        )
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            fill_gradients(model, step)
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert (p - q).norm() <= 1e-6 * p.norm()
