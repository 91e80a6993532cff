"""Curvature along a direction, and the two uses of a tied embedding, against exact matrices and untied models."""

import copy

import numpy as np
import pytest
import torch
from reference import driver
from reference.rig import named, steps
from torch import nn
from torch.nn import functional as F

import sharpwise
from probes.exact import exact, gpt2, tokens
from sharpwise.blocks import BlockMap, Role, Segment
from sharpwise.probes import Curvature, directional, norm_11, sharpness
from sharpwise.probes.directional import probed

TABLE = "transformer.wte.weight"


def untied(model: nn.Module) -> nn.Module:
    """The same function, of which the head is a parameter of its own."""
    other = copy.deepcopy(model)
    other.lm_head.weight = nn.Parameter(other.transformer.wte.weight.detach().clone())
    other.config.tie_word_embeddings = False
    return other


def direction(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
@pytest.mark.parametrize("by", ["model", "type", "role", "segment"])
def test_against_the_exact_matrix(kind, by):
    e = exact()
    whole = e.fisher if kind == "gauss-newton" else e.hessian
    u = direction(e.model)
    flat = e.selection.gather(u)
    owners = np.repeat(np.arange(len(e.selection.segments)), e.selection.sizes)
    found = directional(Curvature(e.model, e.batch, kind, blocks=e.blocks), u, by=by)
    assert sum(estimate.elements for estimate in found) == 364
    labels = e.selection.labels
    for estimate in found:
        names = {
            "model": ["model"] * len(labels),
            "type": [str(s.block_type) for s in e.selection.segments],
            "role": [str(s.role) for s in e.selection.segments],
            "segment": labels,
        }[by]
        rows = torch.from_numpy(np.array([names[i] == estimate.of for i in owners]))
        v = torch.where(rows, flat, 0.0)
        assert estimate.value == pytest.approx(float(v @ whole @ v / (v @ v)), rel=1e-9), estimate.of


def test_what_does_not_move_has_none():
    model = gpt2()
    u = {name: tensor for name, tensor in direction(model).items() if "mlp" in name}
    found = {e.of: e.value for e in directional(Curvature(model, tokens(), "gauss-newton"), u)}
    assert found["FFN"] > 0 and all(np.isnan(value) for of, value in found.items() if of != "FFN")
    with pytest.raises(ValueError, match=r"directional: the direction of .*c_fc.bias has shape \(5,\), the parameter"):
        directional(Curvature(model, tokens()), {"transformer.h.0.mlp.c_fc.bias": torch.ones(5)})


# Tied embeddings


@pytest.mark.parametrize(("use", "name"), [("lookup", TABLE), ("head", "lm_head.weight")])
def test_each_use_of_a_tied_embedding_is_that_of_an_untied_one(use, name):
    """The gradient through one of them; of all else nothing changes. Labels are drawn alike."""
    model = gpt2()
    other = untied(model)
    settings = {"samples": 3, "seed": 5}
    half, both = (sharpness(model, tokens(), tied=tied, **settings) for tied in (use, "both"))
    apart = sharpness(other, tokens(), **settings)
    value = lambda found, of: found.value(by="segment", of=of, quantity="sharpness")  # noqa: E731
    assert value(half, TABLE) == pytest.approx(value(apart, name), rel=1e-9)
    assert value(half, TABLE) != pytest.approx(value(both, TABLE), rel=1e-2)
    for estimate in both.select(by="segment"):
        if estimate.of != TABLE:
            assert value(half, estimate.of) == pytest.approx(estimate.value, rel=1e-9)
    assert half.settings["tied"] == use and "tied" not in both.settings
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["gauss-newton", "hessian"])
@pytest.mark.parametrize(("use", "name"), [("lookup", TABLE), ("head", "lm_head.weight")])
def test_products_of_each_use(use, name, kind):
    """Rows and columns of the whole matrix of the untied model, the other use left out."""
    model = gpt2()
    other = untied(model)
    blocks = BlockMap.of(other)
    chosen = [s for s in blocks if s.name == name or s.name not in (TABLE, "lm_head.weight")]
    half, apart = Curvature(model, tokens(), kind, tied=use), Curvature(other, tokens(), kind, select=chosen)
    u = direction(model)
    twin = {**u, "lm_head.weight": u[TABLE]}
    found = half.selection.scatter(half @ half.selection.gather(u))
    wanted = apart.selection.scatter(apart @ apart.selection.gather(twin))
    for key in u:
        assert torch.allclose(found[key], wanted[name if key == TABLE else key], atol=1e-12), key


class Shared(nn.Module):
    """One name for both uses."""

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(7, 4)

    def forward(self, tokens):
        return F.linear(self.wte(tokens), self.wte.weight)


def test_uses_that_cannot_be_told_apart():
    model = Shared()
    assert sharpness(model, tokens(), blocks={"wte.weight": "tok_emb"}).value(by="model", quantity="sharpness") > 0
    with pytest.raises(ValueError, match="sharpness: tied must be one of both, lookup, head, got 'table'"):
        sharpness(model, tokens(), tied="table")
    blocks = BlockMap([Segment("wte.weight", (7, 4), role=Role.TOK_EMB, tied=("head.weight",))])
    with pytest.raises(
        ValueError, match=r"tied=.head. is one use of wte\.weight, and of its names wte\.weight not one is"
    ):
        Curvature(model, tokens(), blocks=blocks, tied="head")


def test_another_tied_pair_stays_tied():
    """Norms that are one parameter, under two names: both uses count, whatever is asked of the embedding."""
    model = gpt2()
    model.transformer.h[1].ln_1.weight = model.transformer.h[0].ln_1.weight
    both, half = (sharpness(model, tokens(), tied=tied) for tied in ("both", "lookup"))
    name = {"by": "segment", "of": "transformer.h.0.ln_1.weight", "quantity": "sharpness"}
    assert half.value(**name) == pytest.approx(both.value(**name), rel=1e-9)


# As a block_lr asks


BATCHES = [tokens(seed=1), tokens(seed=2)]


@pytest.mark.parametrize("rule", ["adamw", "adam-mini"])
@pytest.mark.parametrize("tied", ["both", "lookup", "head"])
def test_the_rule_goes_along_its_own_update(rule, tied):
    """Multipliers from u^T G u / |u|^2 with u worked out here from the moments."""
    model = gpt2().float()
    block_lr = sharpwise.SharpnessLR(
        source="directional", tied=tied, start=2, every=1, stop=3, soft=0, ema=0.0, power=0.5, normalize="geometric"
    )
    optimizer = sharpwise.create_optimizer(
        model, rule, lr=1e-2, betas=(0.8, 0.9), block_lr=block_lr, probe_batches=BATCHES, compile=False
    )
    grads = driver.gradients(named(model), 4)
    for t, recorded in enumerate(grads):
        if t == 3:
            before = copy.deepcopy(model)
            state = {name: dict(optimizer.state[p]) for name, p in named(model)}
            state = copy.deepcopy(state)
        steps(optimizer, named(model), [recorded])
    blocks = optimizer.blocks
    u = {}
    for name, _ in named(before):
        own = state[name]
        m, v, t = own["exp_avg"].double(), own["exp_avg_sq"].double(), float(own["step"])
        if v.shape != m.shape:  # a number per block, in the order of the segments
            whole, counts = torch.zeros_like(m), v.split([s.blocks(cut) for s, cut in cuts_of(optimizer, name)])
            for (segment, cut), numbers in zip(cuts_of(optimizer, name), counts, strict=True):
                index = segment.row_index()
                shape = [-1 if d == segment.dim else 1 for d in range(m.dim())]
                rows = numbers[segment.block_of_row(cut)].view(shape)
                whole.index_copy_(segment.dim, index, rows.expand_as(whole.index_select(segment.dim, index)))
            v = whole
        u[name] = m / (1 - 0.8**t) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
    matrix = Curvature(before.double(), BATCHES, "gauss-newton", blocks=blocks, tied=tied)
    flat = matrix.selection.gather(u)
    kinds = ["pos_emb" if s.role == "pos_emb" else str(s.block_type) for s in matrix.selection.segments]
    S = {}
    for kind in dict.fromkeys(kinds):
        rows = torch.cat([torch.full((n,), k == kind) for k, n in zip(kinds, matrix.selection.sizes, strict=True)])
        v = torch.where(rows, flat, 0.0)
        S[kind] = float(v @ (matrix @ v) / (v @ v))
    logs = {kind: -0.5 * np.log(value) for kind, value in S.items()}
    sizes = {
        kind: sum(s.numel for s, k in zip(matrix.selection.segments, kinds, strict=True) if k == kind) for kind in S
    }
    mean = sum(logs[k] * sizes[k] for k in S) / sum(sizes.values())
    want = [np.exp(np.clip(logs[k] - mean, -np.log(10), np.log(10))) for k in kinds]
    got = [row["multiplier"] for row in optimizer.lr_multipliers()]
    assert got == pytest.approx(want, rel=1e-3)
    assert len(set(got)) == len(S)


def cuts_of(optimizer, name):
    return [pair for v in optimizer._bind().views if v.name == name for pair in zip(v.segments, v.cuts, strict=True)]


def test_every_module_along_its_own_update():
    model = gpt2()
    blocks = BlockMap.of(model)
    u = direction(model)
    found = probed(model, BATCHES, blocks, statistic="directional", by="module", updates=u)
    one = directional(Curvature(model, BATCHES, "gauss-newton"), u, by="segment")
    values = [value for name in blocks.names() for value in found[name]]
    assert values == pytest.approx([e.value for e in one], rel=1e-9)


def test_rows_of_the_matrix():
    model = gpt2()
    blocks = BlockMap.of(model)
    found = probed(model, BATCHES, blocks, statistic="norm_11", tied="head", seed=3)
    one = norm_11(Curvature(model, BATCHES, "gauss-newton", tied="head"), samples=20, seed=3).select(by="segment")
    assert [value for name in blocks.names() for value in found[name]] == [e.value for e in one]


@pytest.mark.parametrize("source", ["directional", "norm_11"])
@pytest.mark.parametrize("cut_at", [1, 3])
def test_resumed_in_mid_run(source, cut_at):
    spelling = f"sharpness(source={source}, start=1, every=1, soft=2, tied=lookup, normalize=geometric, max_ratio=4)"
    make = lambda m: sharpwise.AdamW(m, lr=1e-3, block_lr=spelling, probe_batches=BATCHES)  # noqa: E731
    whole, part, resumed = gpt2().float(), gpt2().float(), gpt2().float()
    grads = driver.gradients(named(whole), 4)
    one, two = make(whole), make(part)
    steps(one, named(whole), grads)
    steps(two, named(part), grads[:cut_at])
    three = make(resumed)
    resumed.load_state_dict(part.state_dict())
    three.load_state_dict(two.state_dict())
    steps(three, named(resumed), grads[cut_at:])
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert len({row["multiplier"] for row in three.lr_multipliers()}) > 3
    assert [r["multiplier"] for r in one.lr_multipliers()] == [r["multiplier"] for r in three.lr_multipliers()]
