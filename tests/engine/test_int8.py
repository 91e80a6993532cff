"""State in 8 bits: blocks within lines, the kernels against the reference, and what stays in fp32."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import sharpwise
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.stored import Stored
from sharpwise.storage import Int8
from sharpwise.testing import fill_gradients, run, same, tiny_model


def segment(name, shape, role, **how):
    return Segment(name, shape, role, layer=None if role == Role.OTHER else 0, source="test", **how)


SHAPES = {
    s.name: s
    for s in (
        segment("columns", (40, 512), Role.V, dim=1),
        segment("experts", (3, 4, 130), Role.GATE, dim=1, stacked=True),
        segment("kernels", (6, 3, 5, 7), Role.OTHER),
        segment("narrow", (8, 63), Role.UP),
        segment("norm", (300,), Role.NORM),
        segment("ragged", (5, 300), Role.DOWN),
        segment("rows", (7, 256), Role.UP),
        segment("short", (9, 64), Role.O),
    )
}
LINES = {"rows": 256, "ragged": 300, "short": 64, "columns": 512, "experts": 130, "kernels": 105}
RULES = {
    "adamw": {"storage": "int8-dynamic"},
    "adamw linear": {"storage": "int8-linear", "allow_unstable": True, "eps": 1e-3},
    "adam-mini": {"storage": "int8-dynamic-2048"},
    "lion": {"storage": "int8-linear"},
    "sgd": {"storage": "int8-linear-2048", "momentum": 0.9},
    "sgd-sai": {"storage": "int8-dynamic"},
}


def model_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(s.shape, generator=generator).to(dtype) for n, s in SHAPES.items()}
    return nn.ParameterDict({n: nn.Parameter(t) for n, t in tensors.items()})


def optimizer_of(model, rule, **options):
    return sharpwise.create_optimizer(
        model, rule.split()[0], lr=1e-2, blocks=BlockMap(tuple(SHAPES.values())), **{**RULES[rule], **options}
    )


def codes_of(optimizer):
    return [t for own in optimizer.state.values() for t in own.values() if t.dtype in (torch.int8, torch.uint8)]


def by_hand(x, size):
    """The largest of each block of each line."""
    lines = x.reshape(-1, x.shape[-1])
    return torch.tensor([[float(part.abs().max()) for part in line.split(size)] for line in lines])


@pytest.mark.parametrize("storage", ["int8-dynamic", "int8-linear", "int8-dynamic-2048"])
@pytest.mark.parametrize("compiled", [False, None], ids=["reference", "kernels"])
def test_what_is_stored_is_what_the_equations_say(storage, compiled):
    """Step by step: the momentum of SGD, in fp64, of what was stored before."""
    model = model_of()
    optimizer = optimizer_of(model, "sgd", storage=storage, compile=compiled)
    code, size = Int8.named(storage), Int8.named(storage).block
    held = {name: torch.zeros(s.shape, dtype=torch.float64) for name, s in SHAPES.items()}
    for t in range(4):
        before = {name: p.detach().double().clone() for name, p in model.items()}
        fill_gradients(model, t)
        optimizer.step()
        for name, p in model.items():
            m = (held[name] * 0.9 if t else 0.0) + p.grad.double()
            torch.testing.assert_close(p.detach().double(), before[name] - 1e-2 * m, rtol=0, atol=3e-7)
            own = optimizer.state[p]
            if name not in LINES:
                assert set(own) == {"step", "momentum_buffer"} and own["momentum_buffer"].dtype == torch.float32
                held[name] = own["momentum_buffer"].double()
                continue
            lines = m.reshape(-1, LINES[name])
            absmax = own["momentum_buffer_absmax"]
            assert absmax.shape == (*p.shape[: p.dim() - 1 if name == "experts" else 1], -(-LINES[name] // size))
            torch.testing.assert_close(absmax.view(len(lines), -1), by_hand(lines, size), rtol=3e-7, atol=0)
            wide = absmax.view(len(lines), -1).repeat_interleave(size, 1)[:, : LINES[name]]
            back = code.decode(own["momentum_buffer"].view(lines.shape), wide)
            step = 1 / 127 if code.code == "linear" else 0.07  # the widest gap between two codes, in absmax
            assert ((back - lines).abs() <= wide * step / 2 * 1.001).all(), name
            held[name] = back.view(p.shape).double()


OPTIONS = itertools.cycle(
    [{}, {"block_lr": "layer_decay", "max_grad_norm": 1.0}, {"on_nonfinite": "skip"}, {"cautious_decay": True}]
)
KERNELS = [
    (rule, dtype, options)
    for (dtype, rule), options in zip(itertools.product((torch.float32, torch.bfloat16), RULES), OPTIONS, strict=False)
]


@pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
@pytest.mark.parametrize(("rule", "dtype", "options"), KERNELS, ids=str)
def test_kernels_are_the_reference(rule, dtype, options):
    more = {"decoupled_weight_decay": True} if rule == "sgd" else {}
    options = {**options, **more, "stochastic_rounding": dtype == torch.bfloat16, "weight_decay": 0.1}
    pair = []
    for compiled in (None, False):
        model = model_of(dtype)
        optimizer = optimizer_of(model, rule, compile=compiled, **options)
        run(model, optimizer, range(4))
        pair.append((model, optimizer))
    (mine, kernels), (other, reference) = pair
    assert {row["backend"].split()[0] for row in kernels.explain()} == {"cpp"}
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        assert (p - q).float().norm() <= (1e-5 if dtype == torch.float32 else 1e-3) * q.float().norm()
    # A sum that rounds the other way may take the next code, and around zero the one after that.
    differ = [(a.int() - b.int()).abs() for a, b in zip(codes_of(kernels), codes_of(reference), strict=True)]
    assert differ and sum(int((d > 0).sum()) for d in differ) <= 3
    assert all(int(torch.minimum(d, 256 - d).max()) <= 2 for d in differ)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_same_to_the_bit(rule):
    model = model_of()
    optimizer = optimizer_of(model, rule)
    run(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    again = optimizer_of(twin, rule)
    again.load_state_dict(torch.load(file, weights_only=True))
    for one, other in ((model, optimizer), (twin, again)):
        run(one, other, range(3, 6))
    assert same(model, twin) and all(map(torch.equal, codes_of(optimizer), codes_of(again)))


def test_nan_is_never_a_silent_code():
    """A gradient that is NaN makes numbers of its block NaN, as long as the run goes on, and of no other block."""
    for compiled in (None, False):
        model = model_of()
        optimizer = optimizer_of(model, "adamw", compile=compiled)
        run(model, optimizer, range(2))
        fill_gradients(model, 2)
        model["ragged"].grad[1, 280] = float("nan")
        optimizer.step()
        run(model, optimizer, range(3, 5))
        bad = model["ragged"].detach().isnan()
        expected = torch.zeros_like(bad)
        expected[1, 256:] = True
        assert torch.equal(bad, expected)
        assert all(p.isfinite().all() for name, p in model.items() if name != "ragged")


@pytest.mark.parametrize(
    ("keep", "quantized"),
    [
        (None, ("mlp", "attn")),
        ((), ("mlp", "attn", "wte", "wpe")),
        (("head",), ("mlp", "attn", "wpe")),  # wte is the head too
        (("tok_emb", "up"), ("attn", "wpe", "c_proj")),
    ],
    ids=str,
)
def test_roles_that_stay(keep, quantized):
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    optimizer = sharpwise.AdamW8bit(model, lr=1e-3, keep_fp32=keep)
    run(model, optimizer, range(1))
    found = {row["name"] for row in optimizer.explain() if row["storage"] == "int8-dynamic"}
    assert found and all(any(part in name for part in quantized) for name in found)
    assert all(any(part in name for name in found) for part in quantized)


@pytest.mark.parametrize("before", ["fp32", "bf16", "int8-dynamic", "int8-linear", "int8-linear-2048"])
@pytest.mark.parametrize("after", ["fp32", "bf16", "int8-dynamic", "int8-linear", "int8-linear-2048"])
def test_a_run_changes_its_storage(before, after, caplog):
    model = model_of()
    optimizer = optimizer_of(model, "lion", storage=before)
    run(model, optimizer, range(3))
    twin = copy.deepcopy(model)
    again = optimizer_of(twin, "lion", storage=after)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (f"was saved as {before}, and goes on as {after}" in caplog.text) == (before != after)
    assert again.param_groups[0].get("storage") == (after if "int8" in after else None)
    for one, other in zip(optimizer._bind().views, again._bind().views, strict=True):
        a, b = (view.stored_as("exp_avg").decode(torch.float32) for view in (one, other))
        assert (a - b).abs().max() <= a.abs().max() / (25 if "dynamic" in before + after else 120)
    run(twin, again, range(3, 5))


def test_state_of_bitsandbytes_is_loaded():
    """Flat blocks of 256, a table of values beside the codes; small tensors in fp32; by position."""
    model = model_of()
    table = torch.linspace(-1, 1, 256)
    squares = torch.linspace(0, 1, 256)
    state, numbers = {}, {}
    for i, (name, p) in enumerate(model.items()):
        if p.numel() < 1000:
            numbers[name] = torch.randn_like(p), torch.rand_like(p)
            state[i] = {"step": 3, "state1": numbers[name][0].detach(), "state2": numbers[name][1].detach()}
            continue
        blocks = -(-p.numel() // 256)
        codes = [torch.randint(0, 256, p.shape, dtype=torch.uint8) for _ in range(2)]
        absmax = [torch.rand(blocks) for _ in range(2)]
        state[i] = {"step": 3}
        for n, values in ((0, table), (1, squares)):
            state[i] |= {f"state{n + 1}": codes[n], f"absmax{n + 1}": absmax[n], f"qmap{n + 1}": values}
        wide = [a.repeat_interleave(256)[: p.numel()].view(p.shape) for a in absmax]
        numbers[name] = table[codes[0].long()] * wide[0], squares[codes[1].long()] * wide[1]
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(range(len(model)))}
    optimizer = optimizer_of(model, "adamw", storage="fp32")
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    for name, p in model.items():
        own = optimizer.state[p]
        assert own["step"] == 3
        for key, expected in zip(("exp_avg", "exp_avg_sq"), numbers[name], strict=True):
            assert torch.equal(own[key], expected), (name, key)
    quantized = optimizer_of(model, "adamw")
    quantized.load_state_dict({"state": state, "param_groups": [group]})
    run(model, quantized, range(2))
    state[0]["state1"] = state[0]["state1"].view(-1)[: model["columns"].numel() // 2]
    with pytest.raises(
        ValueError, match=r"saved state of columns has 10240 codes in 80 blocks.* 8-bit state of bitsandbytes"
    ):
        optimizer.load_state_dict({"state": state, "param_groups": [group]})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda m: sharpwise.AdamW(m, storage="int8"), ValueError, "AdamW: no storage is called 'int8'.*int8-dynamic"),
        (
            lambda m: sharpwise.AdamW(m, storage="int8-linear"),
            ValueError,
            "int8-linear for second moments .*allow_unst",
        ),
        (
            lambda m: sharpwise.Muon8bit(m, aux_storage="int8-linear"),
            ValueError,
            "Muon: int8-linear for second moments .*aux_storage='int8-dynamic'",
        ),
        (
            lambda m: sharpwise.AdamW8bit(m, keep_fp32=("embeding",)),
            ValueError,
            "keep_fp32 takes roles, got 'embeding'",
        ),
        (lambda m: sharpwise.AdamW8bit(m, keep_fp32=5), TypeError, "keep_fp32 takes names"),
        (lambda m: sharpwise.Lion(m, storage=8), ValueError, "Lion: no storage is called 8"),
    ],
)
def test_what_is_refused(make, error, says):
    with pytest.raises(error, match=says):
        make(tiny_model())


def test_codes_that_nobody_knows_are_not_loaded():
    model = model_of()
    optimizer = optimizer_of(model, "lion")
    run(model, optimizer, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["storage"] = "int8-cubic"
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="codes of storage 'int8-cubic'; those that can be read are int8-linear"):
        optimizer.load_state_dict(saved)
    assert all(
        map(
            torch.equal,
            codes_of(optimizer),
            [t for own in before["state"].values() for t in own.values() if t.dtype == torch.int8],
        )
    )
    saved["param_groups"][0].pop("storage")
    with pytest.raises(ValueError, match="codes of storage None"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("storage", ["int8-dynamic", "int8-linear-2048"])
@pytest.mark.parametrize("cuts", [(0, 300, 700), (0, 1, 255, 256, 257, 700), (0, 0, 512, 512, 700)], ids=str)
def test_parts_of_lines_have_the_codes_of_the_whole(storage, cuts):
    """What processes hold of lines: the largest of blocks from all of them, then their codes put together."""
    format = Int8.named(storage)
    x = torch.randn(3, 700, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(3, -(-700 // format.block))
    whole = Stored(format, torch.empty(3, 700, dtype=format.dtype_for(x.dtype)), empty).encode(x)
    parts = [Stored(format, whole.codes[:, a:b], empty, a) for a, b in itertools.pairwise(cuts)]
    pieces = [x[:, a:b] for a, b in itertools.pairwise(cuts)]
    absmax = torch.stack([part.measured(piece) for part, piece in zip(parts, pieces, strict=True)]).amax(0)
    assert torch.equal(absmax, whole.absmax)
    coded = [part.encode(piece, absmax=absmax) for part, piece in zip(parts, pieces, strict=True)]
    assert torch.equal(torch.cat([one.codes for one in coded], 1), whole.codes)
    assert torch.equal(torch.cat([one.decode(x.dtype) for one in coded], 1), whole.decode(x.dtype))


def test_a_parameter_in_fp64_keeps_its_state_in_fp64():
    model = nn.ParameterDict({"w": nn.Parameter(torch.randn(8, 256, dtype=torch.float64))})
    optimizer = sharpwise.AdamW8bit(model, lr=1e-3)
    run(model, optimizer, range(2))
    assert optimizer.state[model["w"]]["exp_avg"].dtype == torch.float64


@pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
def test_blocks_that_no_stack_holds_are_left_to_the_reference():
    model = torch.nn.Linear(2**18 + 8, 2, bias=False)
    model.weight.grad = torch.randn_like(model.weight)
    for block, backend in ((2**18, "cpp"), (2**22, "reference")):
        optimizer = sharpwise.Lion(model, lr=1e-3, storage=Int8("dynamic", block), keep_fp32=())
        optimizer.step()
        assert [row["backend"] for row in optimizer.explain()] == [backend]
