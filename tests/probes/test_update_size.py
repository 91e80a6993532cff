"""Update sizes, angles and relative changes of outputs against numpy in float64, down to steps of 1e-6 rad."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import driver, models
from torch import nn

from sharpwise.blocks import BlockMap, Segment
from sharpwise.probes.rrc import jackknife, rrc
from sharpwise.probes.update_size import UpdateSize


def angle(w, v):
    """Of two vectors in float64, from the part of one across the other: exact however small."""
    w, v = (x / np.linalg.norm(x) for x in (w.ravel().astype(np.float64), v.ravel().astype(np.float64)))
    return math.atan2(np.linalg.norm(v - (w @ v) * w), w @ v)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def moved(model, change, **arguments):
    sizes = UpdateSize(model, **arguments)
    sizes.before()
    with torch.no_grad():
        change()
    return sizes.after()


@pytest.mark.parametrize("size", [1e-6, 1e-5, 2.5e-3, 0.3, 3.0])
def test_angles_of_fp32_weights(size):
    """Turn a matrix of the size where the arc cosine in fp32 reads zero, and lengthen it as well."""
    draw = np.random.default_rng(0)
    w = draw.standard_normal((768, 768))
    across = draw.standard_normal(w.shape)
    across -= (across * w).sum() / (w * w).sum() * w
    across *= np.linalg.norm(w) / np.linalg.norm(across)
    target = 1.01 * (math.cos(size) * w + math.sin(size) * across)
    before, after = w.astype(np.float32), target.astype(np.float32)
    layer = linear(torch.from_numpy(before))
    found = moved(layer, lambda: layer.weight.copy_(torch.from_numpy(after)))
    exact = angle(before, after)
    assert found.value(quantity="angle", by="model") == pytest.approx(exact, rel=1e-7)
    assert exact == pytest.approx(size, rel=1e-2)  # fp32 weights hold so much of it
    rows = [angle(a, b) for a, b in zip(before, after, strict=True)]
    per_neuron = found.select(quantity="angle per neuron")[0]
    assert per_neuron.value == pytest.approx(np.mean(rows), rel=1e-7)
    assert per_neuron.notes["median"] == pytest.approx(np.quantile(rows, 0.5), rel=1e-7)
    assert per_neuron.notes["largest"] == pytest.approx(max(rows), rel=1e-7)
    assert (per_neuron.samples, per_neuron.unit, per_neuron.error) == (768, "rad", 0.0)


def test_a_step_along_the_weights_turns_nothing():
    layer = linear(torch.randn(30, 40))
    found = moved(layer, lambda: layer.weight.mul_(0.5))
    assert found.value(quantity="angle", by="model") == 0.0
    assert found.value(quantity="relative update", by="model") == 0.5
    found = moved(layer, lambda: layer.weight.mul_(1 - 1e-3))
    assert found.value(quantity="angle", by="model") < 1e-7  # the rounding of fp32 weights
    found = moved(layer, lambda: layer.weight.neg_())
    assert found.value(quantity="angle", by="model") == pytest.approx(math.pi)


@pytest.mark.parametrize("name", list(models.BUILD))
@pytest.mark.parametrize("chunk", [2**22, 50])
def test_every_group_against_numpy(name, chunk, monkeypatch):
    monkeypatch.setattr("sharpwise.probes.update_size.CHUNK", chunk)
    model = models.build(name)
    blocks = BlockMap.of(model)
    named = dict(model.named_parameters())
    before = {n: p.detach().double().numpy().copy() for n, p in named.items()}
    found = moved(model, lambda: [p.add_(0.01 * torch.randn_like(p)) for p in named.values()], blocks=blocks)
    parts = []
    for s in blocks:
        pair = [before[s.name], named[s.name].detach().double().numpy()]
        parts.append((s, [np.take(x, s.row_index().numpy(), s.dim) for x in pair]))
    groups = {}
    for s, pair in parts:
        keys = [("type", str(s.block_type), None), ("role", str(s.role), None), ("model", "model", None)]
        if s.layer is not None:
            keys += [("layer", str(s.block_type), s.layer), ("layer", str(s.role), s.layer)]
        for key in keys:
            groups.setdefault(key, []).append(pair)
    expected = {}
    for key, pairs in groups.items():
        w, v = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
        norm = np.linalg.norm
        for quantity, value in (
            ("update l2", norm(v - w)), ("relative update", norm(v - w) / norm(w)), ("angle", angle(w, v)),
        ):  # fmt: skip
            expected[quantity, *key] = value
    got = {(e.quantity, e.by, e.of, e.layer): e.value for e in found if e.by != "segment"}
    assert got == pytest.approx(expected, rel=1e-9)
    of_segments = found.select(by="segment", quantity="angle")
    assert [e.value for e in of_segments] == pytest.approx([angle(*pair) for _, pair in parts], rel=1e-9)
    assert [e.elements for e in of_segments] == [s.numel for s in blocks]
    # Of matrices, what each output row does: a row of a Linear, a column of a Conv1D.
    for quantity in ("angle per neuron", "relative update per neuron"):
        rows = [e.value for e in found.select(quantity=quantity)]
        wanted = []
        for s, (w, v) in parts:
            if w.ndim > 1:
                pairs = zip(np.moveaxis(w, s.dim, 0), np.moveaxis(v, s.dim, 0), strict=True)
                each = [
                    angle(a, b) if "angle" in quantity else np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in pairs
                ]
                wanted.append(np.mean(each))
        assert rows == pytest.approx(wanted, rel=1e-9)


def test_experts_and_scalars():
    model = nn.Module()
    model.w, model.scale = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.tensor(2.0))
    gate, up = (Segment("w", (3, 6, 4), r, dim=1, stacked=True, start=i, length=3) for i, r in ((0, "gate"), (3, "up")))
    blocks = BlockMap([gate, up, Segment("scale", ())])
    before = model.w.detach().double().clone()
    found = moved(model, lambda: (model.w.add_(torch.randn(3, 6, 4)), model.scale.add_(1)), blocks=blocks)
    d = (model.w.detach().double() - before)[:, 3:]
    assert found.value(quantity="update l2", of="w[up]") == pytest.approx(float(d.norm()))
    assert found.select(quantity="angle per neuron", of="w[up]")[0].samples == 9
    assert found.value(quantity="relative update", of="scale") == 0.5


def test_what_is_zero_or_not_finite_is_listed():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].bias.zero_()
        model[1].weight[0, 0] = math.nan
    model[0].weight.grad = torch.zeros(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sizes = UpdateSize(model)
    sizes.before()
    optimizer.step()
    found = sizes.after()
    assert found.value(quantity="update l2", of="0.weight") == 0.0
    assert found.value(quantity="angle", of="0.weight") == 0.0
    assert [e.quantity for e in found.select(of="0.bias")] == ["update l2"]
    assert len(found.select(of="1.weight", quantity="angle")) == 0
    assert [w.split(":")[0] for w in found.warnings] == ["0.bias", "1.weight"]
    assert all(math.isfinite(e.value) for e in found)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12))
@settings(max_examples=60, deadline=None)
def test_finite_or_listed(values):
    before, after = torch.tensor(values).reshape(2, 2, 3)
    layer = linear(before)
    found = moved(layer, lambda: layer.weight.copy_(after))
    assert all(math.isfinite(e.value) and e.value >= 0 for e in found)
    assert all(e.value <= math.pi + 1e-12 for e in found if "angle" in e.quantity)
    assert bool(found.select(of="weight", quantity="angle")) or found.warnings or not after.any()


def test_bad_input():
    model = models.gpt2()
    with pytest.raises(ValueError, match="select='attn' matches nothing"):
        UpdateSize(model, select="attn")
    sizes = UpdateSize(model)
    for early in (sizes.after, lambda: sizes.rrc(torch.zeros(1, 2, dtype=torch.long))):
        with pytest.raises(ValueError, match=r"call before\(\) first"):
            early()
    sizes.before()
    model.transformer.ln_f.weight = nn.Parameter(torch.ones(models.GPT2["d"]))
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight is another parameter"):
        sizes.after()
    sizes.before()
    del model.transformer.ln_f.weight
    with pytest.raises(ValueError, match=r"which has no 'transformer\.ln_f\.weight'"):
        sizes.after()


# --- RRC -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(models.BUILD))
def test_rrc_against_numpy(name):
    """Inputs taken by hooks of the test's own from a model that has not moved, and products of numpy."""
    model = models.build(name)
    blocks = BlockMap.of(model)
    vocabulary = next(p for n, p in model.named_parameters() if blocks[n][0].role == "tok_emb").shape[0]
    tokens = torch.randint(0, vocabulary, (3, 5))
    inputs = {}
    handles = [
        m.register_forward_hook(lambda m, a, o, path=path: inputs.update({path: a[0].detach()}))
        for path, m in model.named_modules()
        if path and getattr(m, "weight", None) is not None and m.weight.dim() == 2
    ]
    model.eval()(tokens)
    for handle in handles:
        handle.remove()
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    found = rrc(model, before, tokens, blocks=blocks)
    expected = {}
    modules = dict(model.named_modules())
    for path, X in inputs.items():
        after = modules[path].weight.detach().double().numpy()
        name_of = next(n for n, p in model.named_parameters() if p is modules[path].weight)
        W, X = before[name_of].double().numpy(), X.numpy()
        for s in blocks[name_of]:
            index = s.row_index().numpy()
            if X.dtype == np.int64:
                a, b = (after - W)[X], W[X]
            else:
                a, b = (X.astype(np.float64) @ np.take(np.moveaxis(t, s.dim, 0), index, 0).T for t in (after - W, W))
            part = "" if len(blocks[name_of]) == 1 else f"[{s.role}]"
            expected[f"{path}.weight{part}"] = np.linalg.norm(a) / np.linalg.norm(b)
    assert {e.of: e.value for e in found} == pytest.approx(expected, rel=2e-4)
    assert {e.samples for e in found if e.error is not None} == {3}
    assert not found.warnings
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())


def test_rrc_of_a_part_of_the_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    sizes = UpdateSize(model)
    batch = torch.randn(40, 16, 8)
    sizes.before()
    with torch.no_grad():
        model[0].weight.add_(0.1 * torch.randn(6, 8))
    few, every = sizes.rrc(batch, tokens=80)[0], sizes.rrc((batch,))[0]
    assert few.samples == every.samples == 40
    assert few.error > every.error > 0
    assert few.value == pytest.approx(every.value, abs=few.error + every.error)
    single = sizes.rrc({"input": batch[0]})[0]
    assert (single.unit, single.samples) == ("per token", 16)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize(
    ("sequences", "length", "tokens", "which"),
    [
        (3, 16, 12, [(s, t) for s in range(3) for t in (0, 4, 8, 12)]),
        (3, 16, 17, [(s, t) for s in range(3) for t in (0, 3, 6, 9, 12)]),
        (2, 5, 8, [(s, t) for s in range(2) for t in (0, 1, 2, 3)]),
        (12, 4, 3, [(0, 0), (4, 0), (8, 0)]),
        (2, 5, 1000, [(s, t) for s in range(2) for t in range(5)]),
    ],
)
def test_tokens_are_spaced_evenly(kind, sequences, length, tokens, which):
    """Tokens late in a sequence are moved more, and later sequences less: other tokens have another RRC."""
    random = np.random.default_rng(0)
    strength = 1.3 ** (np.arange(length)[None, :] - 2 * np.arange(sequences)[:, None])
    if kind == "linear":
        model = nn.Sequential(nn.Linear(2, 6, bias=False)).double()
        batch = torch.from_numpy(np.stack([np.ones_like(strength), strength], -1))
    else:  # each token once
        model = nn.Sequential(nn.Embedding(sequences * length, 6)).double()
        batch = torch.arange(sequences * length).view(sequences, length)
    before = driver.as_array(model[0].weight)
    change = random.standard_normal(before.shape) * (
        np.array([0.01, 1.0]) if kind == "linear" else strength.reshape(-1, 1)
    )
    sizes = UpdateSize(model)
    sizes.before()
    with torch.no_grad():
        model[0].weight += torch.from_numpy(change)
    found = sizes.rrc(batch, tokens=tokens)[0]
    rows = np.stack([batch[at].numpy() for at in which])
    moved, had = (rows @ W.T if kind == "linear" else W[rows] for W in (change, before))
    assert found.value == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(had), rel=1e-9)
    assert found.samples == len({s for s, _ in which})


def test_the_error_of_rrc_is_right_as_often_as_it_says():
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        bottom = draw.chisquare(4, 12)
        top = 0.3 * bottom * draw.uniform(0.5, 1.5, 12)
        value, error = jackknife(top, bottom, lambda a, b: math.sqrt(a / b))
        hits += abs(value - math.sqrt(0.3)) <= error
    assert 0.90 <= hits / 300 <= 0.99


def test_rrc_names_what_it_cannot_see():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen, self.zero = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x):
            return self.zero(self.seen(x)) + x @ self.unseen.weight

    model = Mixed()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = rrc(model, state, torch.randn(2, 3, 4))
    assert [e.of for e in found] == ["seen.weight"]
    assert found[0].value == 0.0
    assert [w.split(":")[0] for w in found.warnings] == ["zero.weight", "unseen.weight"]
    with pytest.raises(ValueError, match="before_state has no"):
        rrc(model, {}, torch.randn(2, 4))
    with pytest.raises(ValueError, match="has shape"):
        rrc(model, state | {"seen.weight": torch.ones(2, 2)}, torch.randn(2, 4))
    with pytest.raises(ValueError, match="applied none"):
        rrc(nn.LayerNorm(4), {"weight": torch.ones(4), "bias": torch.zeros(4)}, torch.randn(2, 4))
