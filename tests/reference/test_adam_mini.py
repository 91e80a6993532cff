"""Adam-mini against the equations, over literal index sets: Conv1D, fused, interleaved, grouped-query attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sharpwise
from reference import adam_mini, cuts, driver, models
from reference.test_rules import MAX_NORM

HYPER = {"lr": 3e-3, "betas": (0.83, 0.961), "eps": 1e-4, "weight_decay": 0.23}


def setup(model_name, dtype=torch.float32, v_by="row", hyper=HYPER, **options):
    model = models.build(model_name, dtype)
    named = list(model.named_parameters())
    pieces = driver.pieces_of(model_name, named)
    blocks = {name: cuts.mini_blocks(parts, v_by) for name, parts in pieces.items()}
    optimizer = sharpwise.AdamMini(model, **hyper, v_by=v_by, **options)
    twin = driver.Twin(adam_mini, named, [(driver.names_of(named), hyper)], blocks=blocks)
    return optimizer, named, twin


def biases_are_elementwise(optimizer, named, twin):
    """A bias' second moment may have the bias' own shape or be a vector: the same thing for a vector."""
    for name, p in named:
        assert optimizer.state[p]["exp_avg"].shape == p.shape, name
        assert optimizer.state[p]["exp_avg_sq"].shape == (len(twin.blocks[name]),), name


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", models.BUILD)
def test_adam_mini(model, dtype, compiled):
    optimizer, named, twin = setup(model, dtype, compile=compiled)
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(HYPER["lr"], t)], steps=13)
    biases_are_elementwise(optimizer, named, twin)


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("model", models.BUILD)
def test_clipping(model, compiled):
    """Block sums are taken before the factor is known, which they have twice."""
    optimizer, named, twin = setup(model, max_grad_norm=MAX_NORM, compile=compiled)
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(HYPER["lr"], t)], max_norm=MAX_NORM)


@pytest.mark.parametrize("compiled", [None, False], ids=lambda c: f"compile={c}")
@pytest.mark.parametrize("model", models.BUILD)
def test_cautious_decay(model, compiled):
    """Blocks and decay in one pass: the sign of an update is known only as it moves."""
    optimizer, named, twin = setup(model, hyper={**HYPER, "cautious_decay": True}, compile=compiled)
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(HYPER["lr"], t)])


@pytest.mark.parametrize("model", models.BUILD)
def test_v_as_one_block(model):
    optimizer, named, twin = setup(model, v_by="tensor")
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(HYPER["lr"], t)])


def test_number_of_blocks_is_the_state():
    """Bytes of state: fp32 m, one number per block, one counter per parameter."""
    optimizer, named, twin = setup("gpt2")
    optimizer.init_state()
    want = 4 * (sum(p.numel() for _, p in named) + sum(len(b) for b in twin.blocks.values()) + len(named))
    assert optimizer.state_bytes() == want


@pytest.mark.parametrize("model", models.BUILD)
def test_the_explanation_is_what_happens(model):
    """Rule, cut, blocks, decay and bytes, which add up to what the state takes without the counters."""
    optimizer, named, twin = setup(model, no_decay=("norm", "bias"))
    optimizer.init_state()
    table = list(optimizer.explain())
    assert sum(row["bytes"] for row in table) + 4 * len(named) == optimizer.state_bytes()
    for name, _ in named:
        rows = [row for row in table if row["name"] == name]
        pieces = driver.pieces_of(model, named)[name]
        assert sum(row["blocks"] for row in rows) == len(twin.blocks[name])
        assert [row["role"] for row in rows] == [piece.role for piece in pieces]
        for row, piece in zip(rows, pieces, strict=True):
            cut = "element" if piece.bias else {"q": "head", "k": "head", "norm": "tensor", "pos_emb": "tensor"}
            assert row["cut"] == (cut if piece.bias else cut.get(piece.role, "row"))
            assert row["rule"] == ("adamw" if piece.bias else "adam-mini")
            assert row["decay"] == (0.0 if piece.bias or piece.role == "norm" else HYPER["weight_decay"])
            assert (row["multiplier"], row["storage"]) == (1.0, "fp32")
    plain = sharpwise.Lion(models.build(model), lr=1e-3)
    assert {(row["rule"], row["cut"]) for row in plain.explain()} == {("lion", "element")}


def test_state_of_gpt2_124m_on_meta():
    """475.5 MiB, exactly as computed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    optimizer = sharpwise.AdamMini(model)
    optimizer.init_state()
    assert optimizer.state_bytes() == cuts.gpt2_124m_state()[1]


def test_parameter_groups():
    model = models.build("llama")
    named = list(model.named_parameters())
    tensors = dict(named)
    pieces = driver.pieces_of("llama", named)
    matrices, vectors = driver.split_groups(named)
    second = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.7, 0.9)}
    optimizer = sharpwise.AdamMini(
        [{"params": [tensors[n] for n in matrices]}, {"params": [tensors[n] for n in vectors], **second}],
        model=model,
        **HYPER,
    )
    twin = driver.Twin(
        adam_mini,
        named,
        [(matrices, HYPER), (vectors, {**HYPER, **second})],
        blocks={name: cuts.mini_blocks(parts) for name, parts in pieces.items()},
    )
    driver.run(optimizer, named, twin, lambda t: [driver.schedule(HYPER["lr"], t), driver.schedule(1e-3, t + 3)])


def test_published_counts():
    """Blocks of nanoGPT's GPT-2 124M: 115,130, which decides that positions are one block."""
    model = models.GPT.__new__(models.GPT)
    nn.Module.__init__(model)

    class Config:
        n_layer, n_head, n_embd, vocab_size, block_size, dropout, bias = 12, 12, 768, 50304, 1024, 0.0, False

    with torch.device("meta"):
        model = models.GPT(Config())
    optimizer = sharpwise.AdamMini(model)
    optimizer.init_state()
    assert sum(optimizer.state[p]["exp_avg_sq"].numel() for p in model.parameters()) == 115_130


class Bag(nn.Module):
    """Parameters of any shapes, not a transformer."""

    def __init__(self, shapes):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    zeros=st.sampled_from([0.0, 0.5, 1.0]),
    exponent=st.integers(-6, 4),
    cut=st.sampled_from(["tensor", "element"]),
)
def test_any_shape_any_gradient(shapes, seed, zeros, exponent, cut):
    """One block per tensor, or per element: scalars, empty tensors, zero gradients."""
    model = Bag(shapes)
    named = list(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    grads = [
        {
            name: torch.randn(p.shape, generator=generator)
            * 10.0**exponent
            * (torch.rand(p.shape, generator=generator) >= zeros)
            for name, p in named
        }
        for _ in range(4)
    ]
    optimizer = sharpwise.AdamMini(model, cut=cut, **HYPER)
    twin = Flat(cut, named)
    for t, recorded in enumerate(grads):
        for name, p in named:
            p.grad = recorded[name]
        optimizer.step()
        twin.step(recorded, [HYPER["lr"]])
        for name, p in named:
            assert driver.error(p, twin.p[name]) <= 1e-6, f"{name}, step {t + 1}"
            v = optimizer.state[p]["exp_avg_sq"].reshape(-1)
            if p.numel():
                assert driver.error(v, twin.state[name]["exp_avg_sq"]) <= 1e-6, f"{name}, step {t + 1}"


class Flat(driver.Twin):
    """The reference with one block per tensor or per element."""

    def __init__(self, cut, named):
        blocks = {
            name: [torch.arange(p.numel()).numpy()]
            if cut == "tensor"
            else list(torch.arange(p.numel())[:, None].numpy())
            for name, p in named
        }
        blocks = {name: [block for block in parts if block.size] for name, parts in blocks.items()}
        super().__init__(adam_mini, named, [(driver.names_of(named), HYPER)], blocks=blocks)
