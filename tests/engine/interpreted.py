"""The Triton kernels, interpreted on the CPU, against the reference. Run by test_triton.py in a process of its own."""

import itertools
import mmap
import os
import sys
from dataclasses import dataclass

if (
    "pytest" not in sys.modules
):  # a process of its own: it is read as Triton is imported, and would hold for other tests
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from engine.test_formats import TABLE, TILES, Cubic, coded
from engine.test_int8_printed import blocks, formats, same
from pairwise import pairwise
from torch import nn

import sharpwise.engine.step as steps
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine import backends
from sharpwise.engine.backends import triton, triton_frames, triton_jobs, triton_launch, triton_print
from sharpwise.engine.backends.reference import Noise, update
from sharpwise.engine.layout import Layout, Layouts, Rectangle
from sharpwise.engine.optimizer import BlockOptimizer
from sharpwise.engine.options import Options
from sharpwise.engine.program import Arithmetic
from sharpwise.engine.stored import Stored
from sharpwise.engine.views import views_of
from sharpwise.optim import create_optimizer
from sharpwise.rules import SGD, AdamMini, Lion
from sharpwise.storage import BF16, FP32, Dense
from sharpwise.storage.dense import mix, step_key
from sharpwise.testing import fill_gradients

NORESERVE = 0x4000  # of Linux, where Triton is
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


# Not of SGD, of which interpreted_int8.py has a few, and not of clipping and skipping without each other.
SOME = AXES | {"rule": [name for name, (rule, _) in RULES.items() if rule != "sgd"], "guard": ("none", "both")}
FEW = [dict(zip(AXES, case, strict=True)) for case in pairwise([*itertools.product(*SOME.values())])]
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


MATRICES = [(f, *own) for f in FORMATS for own in (("none", "host"), ("both", "device"))]
FAST = ("fp32", "none", "host"), ("bf16 state", "both", "device")


@pytest.mark.parametrize(
    ("format", "guard", "counts"), [c if c in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in MATRICES]
)
def test_whole_matrices_are_the_reference(format, guard, counts, monkeypatch):
    """Of bf16 the interpreter cuts bits off, and small singular values are made large."""
    if counts == "device":
        monkeypatch.setattr(steps, "decided_by_host", lambda views: False)
    dtype, options = FORMATS[format]
    found = []
    for compile in (None, False):
        model = model_of(dtype)
        more = {**options, **GUARDS[guard], "block_lr": "blockwise", "normalize_rows": True}
        optimizer = create_optimizer(model, "muon", lr=1e-2, blocks=BlockMap(tuple(SEGMENTS)), compile=compile, **more)
        for step in range(3):
            fill_gradients(model, step, skip=("odd",) if step == 1 else ())
            held = [t for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]
            before = [t.clone() for t in held]
            if guard == "both" and step == 1:
                model.rows.grad[3, 2] = float("nan")
            optimizer.step()
            assert guard != "both" or step != 1 or all(map(torch.equal, held, before))
        found.append((model, optimizer))
    (model, optimizer), (other, twin) = found
    assert {row["why"] for row in optimizer.explain()} == {""}
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        tensors = {"p": (p.detach(), q.detach())} | {k: (t, twin.state[q][k]) for k, t in optimizer.state[p].items()}
        for key, (own, expected) in tensors.items():
            narrow = own.dtype == torch.bfloat16
            bound = 2e-2 if narrow else 1e-2 if dtype == torch.bfloat16 else 1e-4 if "row" in key else 1e-6
            assert (own.double() - expected.double()).norm() <= bound * expected.double().norm() + 1e-9, (name, key)


def printed(function, values, outputs):
    """What a function gives of a tile, printed as Triton.

    Args:
        values: vectors as long as the tile, or of one number; outputs: types, and how many there are.
    """
    n = max(map(len, values.values()))
    own = Arithmetic.of(function, {name: t.dtype for name, t in values.items()}, set(values), constants=True)
    tables = {node.target: node.meta["val"] for node in own.graph.nodes if node.op == "get_attr"}
    loads = {name: f"tl.load({name} + {'i' if len(t) > 1 else 'i * 0'}, mask=mask, other=0)"
             for name, t in values.items()}  # fmt: skip
    names = ", ".join([*values, *outputs, *tables])
    text = triton_frames.HEAD + triton_print.function(
        f"inner({names}, i, mask)",
        own,
        loads | {name: name for name in tables},
        lambda found: [
            f"tl.store({name} + i, tl.where(mask, {found[name]}, {found[name]}), mask=i < {k})"
            for name, (_, k) in outputs.items()
        ],
    )
    text += f"\n@triton.jit\ndef run({names}, N: tl.constexpr, M: tl.constexpr):\n    i = tl.arange(0, N)[None, :]\n"
    text += f"    inner({names}, i, i < M)\n"
    found = {name: torch.empty(k, dtype=dtype) for name, (dtype, k) in outputs.items()}
    size = 1 << (n - 1).bit_length()
    triton_print.module(text).run[(1,)](*values.values(), *found.values(), *tables.values(), N=size, M=n)
    return found


def test_rounding_is_that_of_storage_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    n = 4096
    x = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-30, 30, (n,), generator=generator)
    x[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38])
    given = {"x": x, "index": torch.randint(0, 1 << 40, (n,), generator=generator)}
    given["key"] = torch.tensor([mix(0xDEADBEEF)]).to(torch.int32)
    for own in (BF16, FP32):
        encode = lambda v: {"out": own.encode(v["x"], noise=(v["index"], v["key"]))}  # noqa: B023, E731
        pair = encode(given)["out"], printed(encode, given, {"out": (own.dtype, n)})["out"]
        assert torch.equal(*(t.view(torch.uint8).view(n, -1)[~x.isnan()] for t in pair))
        assert all(t[4].isnan() for t in pair)


@pytest.mark.filterwarnings("ignore:.* encountered in (divide|multiply|subtract):RuntimeWarning")
def test_operations_are_those_of_torch():
    x = torch.tensor([-2.5, -1.5, -0.5, -0.3, -0.0, 0.5, 1.5, 2.5, 1e9, -8388609.0, 4194304.5, float("nan"), -3.0])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), 3e38])])
    functions = {
        "round": lambda v: v["x"].round(),
        "clamp": lambda v: v["x"].clamp(-1.0, 1.5),
        "reciprocal": lambda v: v["x"].reciprocal(),
        "maximum": lambda v: torch.maximum(v["x"], v["y"]),
        "maximum of NaN": lambda v: torch.maximum(v["y"], v["x"]),
    }
    for name, run in functions.items():
        given = {"x": x, "y": x.flip(0)}
        (found,) = printed(lambda v: {"out": run(v)}, given, {"out": (torch.float32, len(x))}).values()  # noqa: B023
        expected = run(given)
        assert torch.equal(found.isnan(), expected.isnan()), name
        assert torch.equal(*(t.view(torch.int32)[~expected.isnan()] for t in (found, expected))), name


@pytest.mark.filterwarnings("ignore:.* encountered in (divide|cast):RuntimeWarning")  # of what `where` leaves out
@pytest.mark.parametrize("x", TILES, ids=lambda x: f"{len(x)} elements")
def test_a_format_of_ones_own(x):
    """A maximum over the tile, comparisons, rounding, a constant table: what int8 needs."""

    def encode(v):
        absmax = v["x"].abs().amax(0)
        return {"codes": Cubic().encode(v["x"], absmax), "absmax": absmax}

    n, parts = len(x), coded(x)
    codes = {"codes": (torch.uint8, n), "absmax": (torch.float32, 1)}
    found = printed(encode, {"x": x}, codes)
    assert torch.equal(found["absmax"], parts["absmax"].view(1))
    assert (found["codes"].int() - parts["codes"].int()).abs().max() <= 1
    assert (found["codes"] == parts["codes"]).float().mean() >= 0.999
    back = printed(lambda v: {"x": Cubic().decode(**v)}, found, {"x": (torch.float32, n)})["x"]
    assert torch.equal(back, Cubic().decode(**found))
    found = printed(encode, {"x": x / x[0]}, codes)
    assert found["absmax"].isnan() == x[0].eq(0)  # 0 / 0 reaches it


@pytest.mark.filterwarnings("ignore:.* encountered in (divide|multiply|cast):RuntimeWarning")
@formats
def test_8_bit_codes_are_those_of_torch(own):
    x, absmax = blocks(own)
    n, given = x.numel(), {"x": x.view(-1), "absmax": absmax.expand_as(x).reshape(-1)}
    kind = own.dtype_for(torch.float32)
    codes = printed(lambda v: {"codes": own.encode(**v)}, given, {"codes": (kind, n)})["codes"]
    assert int((codes != own.encode(**given)).sum()) == 0
    given = {"codes": codes, "absmax": given["absmax"]}
    assert same(printed(lambda v: {"x": own.decode(**v)}, given, {"x": (torch.float32, n)})["x"], own.decode(**given))


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
    for module in (triton_tables, triton_launch):
        monkeypatch.setattr(module, "upload", lambda *args: sent.append(len(args)) or upload(*args))
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

    formats = triton_print.Formats(FP32, FP32, (FP32,), (FP32,), False)
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


@pytest.mark.parametrize(
    ("decode", "why"),
    [
        (
            lambda self, codes, absmax=None, compute=torch.float32: codes.to(compute).erf(),
            "no words in Triton for aten.erf",
        ),
        (
            lambda self, codes, absmax=None, compute=torch.float32: codes.to(compute) * TABLE[0],
            "a number that comes from else",
        ),
    ],
    ids=["an operation", "a table"],
)
def test_a_format_without_words_is_the_references(monkeypatch, decode, why):
    monkeypatch.setattr(Dense, "decode", decode)
    model = model_of()
    optimizer = create_optimizer(model, "lion", lr=1e-3, blocks=BlockMap(tuple(SEGMENTS)))
    fill_gradients(model, 0)
    optimizer.step()
    assert {row["backend"] for row in optimizer.explain()} == {"reference"}
    assert all(row["why"].startswith(f"triton: {why}") for row in optimizer.explain())


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


FAR = (1 << 31) + (1 << 16)
"""Elements of a tensor of which memory is there only where a kernel reaches."""
RECTANGLES = {
    "tiles": (Lion(), BF16, Rectangle(0, 0, 1, FAR, FAR, 0)),
    "rows": (AdamMini(), FP32, Rectangle(0, 0, FAR >> 16, 1 << 16, 1 << 16, 0, blocks=FAR >> 16)),
    "columns": (AdamMini(), FP32, Rectangle(0, 0, 3, 64, 1 << 30, 0, blocks=64, size=1)),
}


@pytest.mark.parametrize("kind", RECTANGLES)
def test_offsets_have_64_bits(kind):
    """The last chunk of a tensor of more than 2**31 elements."""
    rule, own, far = RECTANGLES[kind]
    pages = [mmap.mmap(-1, FAR * own.dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE) for _ in "pgm"]
    p, g, m = (torch.frombuffer(page, dtype=own.dtype, count=FAR) for page in pages)
    group = {**rule.defaults, "seed": 5}
    (view,) = views_of("w", torch.zeros(2, 2), group, (of("w", (2, 2), Role.TOK_EMB),), rule, Layouts())
    counts = torch.full((max(far.blocks, 1),), 7.0, dtype=torch.float64)
    view.param, view.layout, view.rectangles = p, Layout(counts=counts), [far]
    view.own = {"exp_avg": m, "exp_avg_sq": torch.rand(far.blocks)}
    noisy = own is BF16
    formats = triton_print.Formats(own, own, (own,), (FP32,) * rule.has_blocks, noisy)
    printed_ = triton_print.kernels(rule, formats, False)
    moves = triton_jobs.MoveJobs(formats.width, formats.granule, noisy)
    place = triton_jobs.Place(0, (0,), 0)
    moves.add(view, place, g.data_ptr(), own.dtype.itemsize, triton_jobs.pieces_of(view, place, False))
    ((key, _),) = moves.jobs.chunks.items()
    assert key[0] == kind
    chunk = moves.jobs.chunk_table(key)[-1:]
    # What it moves, as a matrix.
    shape = {"tiles": (1, FAR % triton_jobs.SPAN or triton_jobs.SPAN), "rows": (1, 1 << 16), "columns": (3, 64)}[kind]
    first = 0 if kind == "columns" else FAR - shape[1]
    near = [t.as_strided(shape, (far.pitch, 1), first) for t in (p, g, m)]
    for i, t in enumerate(near):
        t.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(i)))
    s = dict(rule.scalars(3, rule.defaults))
    s.pop("bias_correction", None)
    s |= {"step": 0.01, "decay": 0.9}
    x, gradient, old = (t.clone() for t in near)
    blocks = slice(0, 64) if kind == "columns" else slice(-1, None)
    rate = None
    if rule.has_blocks:
        mean = gradient.double().square().sum(int(kind == "rows")) / 7.0
        new, below = rule.block_phase({"exp_avg_sq": view.own["exp_avg_sq"][blocks]}, mean, s)
        rate = (0.01 / below).float().view(-1, 1) if kind == "rows" else (0.01 / below).float()[None]
    key_ = torch.tensor([[(view.key + step_key(3, 5)) & 0xFFFFFFFF]])
    noise = Noise(torch.arange(first, FAR)[None], torch.zeros(1, 1, dtype=torch.int64), key_) if noisy else None
    update(rule, s, x, gradient, [Stored.dense(old)], rate, None, noise)
    name, constants = triton.kernel_and_constants(key, formats.granule)
    values = torch.tensor([{**s, "t": 3.0}[n] for n in printed_.scalars], dtype=torch.float32)
    arguments = [torch.from_numpy(moves.jobs.table()), torch.from_numpy(chunk), torch.tensor([g.data_ptr()]), values]
    arguments += [torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.uint8), torch.zeros(1)]
    kernel = getattr(triton_print.module(printed_.text), name)
    triton_launch.launch(kernel, 1, arguments[: len(triton.ARGUMENTS[name])], constants, p.device)
    for mine, theirs in ((near[0], x), (near[2], old)):
        assert (mine != theirs).sum() <= 0.001 * mine.numel() if noisy else (mine - theirs).norm() <= 1e-6 * mine.norm()
    if rule.has_blocks:
        assert (view.own["exp_avg_sq"][blocks] - new["exp_avg_sq"]).norm() <= 1e-6 * new["exp_avg_sq"].norm()
    if kind == "tiles":
        sums = triton_jobs.SumJobs()
        sums.add(view, 0, g.data_ptr(), own.dtype, True, False)
        ((key, chunks),) = sums.tables()[0].items()
        chunk, partial = torch.from_numpy(chunks[-1:].copy()), torch.zeros(1, dtype=torch.float64)
        chunk[0, 2] = 0
        kernel = triton_print.module(triton_print.squares(own.dtype, len(triton_print.FIELDS))).squares
        _, constants = triton.kernel_and_constants(key, 8)
        arguments = (torch.from_numpy(sums.jobs.table()), chunk, torch.tensor([g.data_ptr()]), partial)
        triton_launch.launch(kernel, 1, arguments, constants, p.device)
        assert float(partial) == pytest.approx(float(gradient.double().square().sum()), rel=1e-9)
