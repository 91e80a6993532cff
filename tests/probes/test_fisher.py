"""Block sharpness against the exact Fisher matrix, its options, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from probes.exact import CONTEXT, VOCAB, cover, exact, gpt2, label_gradients, tokens
from sharpwise import probes
from sharpwise.blocks import BlockMap
from sharpwise.probes.estimate import Cost, t_interval
from sharpwise.probes.fisher import loss_direction
from sharpwise.probes.monte_carlo import Draws

SHARPNESS = {"quantity": "sharpness"}


def true_sharpness(found):
    """The exact Tr(F_b) / n_b of what an estimate is of."""
    e = exact()
    diagonal = e.fisher.diagonal()
    ends = np.cumsum([0, *e.selection.sizes])
    rows = [
        i
        for s, label, a, b in zip(e.selection.segments, e.selection.labels, ends, ends[1:], strict=False)
        if (found.by == "model" or found.of in (s.role, s.block_type, label)) and found.layer in (None, s.layer)
        for i in range(a, b)
    ]
    assert len(rows) == found.elements
    return float(diagonal[rows].mean())


def test_every_level_has_the_exact_value_within_its_error():
    e = exact()
    found = probes.sharpness(e.model, e.batch, blocks=e.blocks, samples=100, seed=1)
    within = [cover(f, true_sharpness(f)) for f in found.select(**SHARPNESS) if f.value > 1e-12]
    assert len(within) > 60 and np.mean(within) > 0.85  # they share their draws
    assert {f.by for f in found} == {"model", "type", "role", "layer", "segment"}
    labels = [f.of for f in found.select(by="segment")]
    assert "transformer.h.0.attn.c_attn.weight[q]" in labels and not any("lm_head" in label for label in labels)


@pytest.mark.slow
def test_intervals_cover_as_often_as_they_say():
    e = exact()
    kinds = ("Emb", "QK", "VO", "FFN", "Norm")
    inside = []
    for seed in range(200):
        found = probes.sharpness(e.model, e.batch, blocks=e.blocks, samples=10, seed=seed)
        types = [found.select(by="type", of=kind, **SHARPNESS)[0] for kind in kinds]
        inside.append([cover(f, true_sharpness(f)) for f in types])
    assert all(0.9 <= rate <= 0.99 for rate in np.mean(inside, axis=0)), np.mean(inside, axis=0)


@pytest.mark.slow
def test_intervals_over_batches_cover_the_text_that_they_are_drawn_from():
    e = exact()
    blocks, inside = e.blocks, []
    population = [tokens(1, seed) for seed in range(6)]
    parts = [label_gradients(e.model, one[:, :-1]) for one in population]
    truth = np.mean([float((g.square().mean(-1) * p).sum()) for g, p in parts])
    random = np.random.default_rng(0)
    for seed in range(200):
        drawn = [population[i] for i in random.integers(0, 6, 10)]
        found = probes.sharpness(e.model, drawn, blocks=blocks, seed=seed)
        inside.append(cover(found.select(by="model", **SHARPNESS)[0], truth))
    assert 0.9 <= np.mean(inside) <= 0.99, np.mean(inside)


def test_true_labels_weighted_by_their_probability_are_the_fisher_matrix():
    e = exact()
    one = e.batch[:1, :2]
    p = e.model(one[:, :1]).logits[0, 0].softmax(-1).tolist()
    values = [
        probes.sharpness(e.model, torch.tensor([[int(one[0, 0]), y]]), blocks=e.blocks, labels="true").value(
            by="model", **SHARPNESS
        )
        for y in range(VOCAB)
    ]
    gradients, weights = label_gradients(e.model, one[:, :1])
    trace = float((gradients.square() * weights[..., None]).sum())
    assert np.dot(p, values) == pytest.approx(trace / e.selection.dim, rel=1e-10)


def test_labels_come_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([[1.0, -torch.inf, 0.0, 3.0, -2.0]]).repeat(40_000, 1)
    generator = torch.Generator().manual_seed(0)
    direction = loss_direction(logits, torch.zeros(len(logits), dtype=torch.int64), "sampled", generator)
    p = logits[0].softmax(-1)
    drawn = (p - direction).argmax(-1).bincount(minlength=5) / len(logits)
    assert drawn[1] == 0
    assert torch.allclose(drawn, p, atol=4 * 0.5 / 200)


def test_the_direction_is_the_gradient_of_the_loss():
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 8, -100, 3, 3, -100])
    nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    assert torch.allclose(loss_direction(logits.detach(), targets, "true", None), logits.grad, atol=1e-15)


def true_value(batch, model=None, **options):
    return probes.sharpness(model or exact().model, batch, labels="true", **options).value(by="model", **SHARPNESS)


def test_forms_of_a_batch():
    batch = exact().batch
    whole = true_value(batch)
    pair = (batch[:, :-1], batch[:, 1:])
    for form in ([batch], batch.numpy(), batch.int(), pair, [pair]):
        assert true_value(form) == whole
    # Hugging Face's labels are shifted by the model, and its inputs may have as many positions as the model.
    ids = batch[:, :-1]
    asked = ids.masked_fill(torch.tensor([[False, False, False, True, False]]), -100)
    found = true_value({"input_ids": ids, "labels": asked, "attention_mask": torch.ones_like(ids)})
    targets = torch.cat([asked[:, 1:], torch.full((3, 1), -100)], 1)
    assert found == pytest.approx(true_value((ids, targets)), rel=1e-12)
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 0]] * 3)}
    labels = ids.masked_fill(padded["attention_mask"] == 0, -100)
    assert true_value(padded) == pytest.approx(true_value({**padded, "labels": labels}))


def test_two_batches_in_a_list_are_no_pair():
    first, second = tokens(2, 1), tokens(2, 2)
    found = probes.sharpness(exact().model, [first, second], labels="true")
    assert found.settings["batches"] == 2 and found.settings["tokens"] == 4 * CONTEXT


def test_micro_batches_give_the_same():
    batch = tokens(5)
    assert true_value(batch, micro=2) == pytest.approx(true_value(batch), rel=1e-12)
    ignored = batch[:, 1:].clone()
    ignored[:2] = -100  # a part without any target
    assert true_value((batch[:, :-1], ignored), micro=2) == pytest.approx(true_value(batch[2:]), rel=1e-12)


def test_sequences_as_the_unit():
    batch = tokens(4)
    assert true_value(batch, unit="sequence") == pytest.approx(true_value(batch) / CONTEXT)
    found = probes.sharpness(exact().model, batch, unit="sequence")
    assert {e.unit for e in found} == {"per sequence"}


def test_batches_weigh_by_their_tokens():
    parts = [tokens(1, 1), tokens(3, 2)]
    found = probes.sharpness(exact().model, parts, labels="true", blocks=exact().blocks)
    each = [true_value(part) for part in parts]
    assert found.value(by="model", **SHARPNESS) == pytest.approx((each[0] + 3 * each[1]) / 4)
    assert "5 to 15 tokens" in found.warnings[0]
    draws, values = Draws(), (1.0, 4.0, 2.5)  # not skewed
    for x in values:
        draws.add(np.array([x]), 3.0)
    mean, error = (float(x[0]) for x in draws.interval())
    assert (mean, error) == pytest.approx((2.5, stats.t.ppf(0.975, 2) * stats.sem(values)))


def test_intervals_of_skewed_draws_are_wider():
    """Johnson's for any draws, that of the logarithm for positive ones, and for their root."""
    values = np.array([0.5, 1.0, 1.25, 6.0, 2.0])
    mean, n, t = values.mean(), 5, stats.t.ppf(0.975, 4)
    half, cube = t * stats.sem(values), abs(np.mean((values - mean) ** 3))
    wanted = {
        "mean": (mean, half + cube * (1 + 2 * t**2) / (6 * values.var(ddof=1) * n)),
        "positive": (mean, mean * math.expm1(half / mean)),
        "root": (math.sqrt(mean), math.sqrt(mean) * math.expm1(half / mean / 2)),
    }
    for of, want in wanted.items():
        draws = Draws(of)
        for x in values:
            draws.add(np.array([x, 3.0]))
        mean, error = draws.interval()
        assert (mean[0], error[0]) == pytest.approx(want)
        assert error[1] == 0 and mean[1] == pytest.approx(3.0**0.5 if of == "root" else 3.0)
        assert draws.relative_error([0, 1]) == pytest.approx(want[1] / want[0])


@pytest.mark.parametrize("freedom", range(1, 201))
def test_intervals_are_students(freedom):
    """To 1.1e-4 at 5 degrees of freedom, where the series begins, and better by the fifth power beyond."""
    values = np.sqrt(np.arange(freedom + 1))
    mean, error = t_interval(values)
    assert mean == pytest.approx(values.mean())
    want = stats.t.ppf(0.975, freedom) * stats.sem(values)
    assert error == pytest.approx(want, rel=1e-10 + (freedom > 4) * 1.2e-4 * (5 / freedom) ** 5)


def test_geometric_mean_leaves_rounding_out():
    found = probes.sharpness(exact().model, exact().batch, blocks=exact().blocks, samples=3)
    for kind in ("QK", "VO", "FFN", "Norm", "Emb"):
        own = [e for e in found.select(by="segment") if e.of in labels_of(kind) and e.value > 1e-12]
        expected = np.exp(np.average([np.log(e.value) for e in own], weights=[e.elements for e in own]))
        geometric = found.select(by="type", of=kind, quantity="sharpness, geometric mean")[0]
        assert geometric.value == pytest.approx(expected)
        assert 0 < geometric.value < found.value(by="type", of=kind, **SHARPNESS) and geometric.error > 0


def test_the_error_of_a_geometric_mean_is_the_delta_methods():
    """Derivatives by the weight of each batch, in place of those by each sharpness; the wider side of the logarithm."""
    e = exact()
    parts = [tokens(n, seed) for seed, n in enumerate((1, 3, 2, 4))]
    own = [probes.sharpness(e.model, part, blocks=e.blocks, labels="true").select(by="segment") for part in parts]
    values = np.array([[estimate.value for estimate in one] for one in own])
    sizes = np.array([estimate.elements for estimate in own[0]])
    kinds = np.array([s.block_type for s in e.selection.segments])
    weights = np.array([1.0, 3.0, 2.0, 4.0])
    found = probes.sharpness(e.model, parts, blocks=e.blocks, labels="true")
    for kind in ("QK", "VO", "FFN", "Norm", "Emb", "model"):
        counts = (values.mean(0) > 1e-12) & ((kinds == kind) | (kind == "model"))

        def geometric(weights, counts=counts):
            mean = np.average(values[:, counts], axis=0, weights=weights)
            return np.exp(np.average(np.log(mean), weights=sizes[counts]))

        value, h = geometric(weights), 1e-5
        slopes = [(geometric(weights + h * d) - geometric(weights - h * d)) / (2 * h) for d in np.eye(4)]
        spread = np.sqrt(4 / 3 * np.sum((weights * np.array(slopes)) ** 2))
        got = found.select(of=kind, quantity="sharpness, geometric mean")[0]
        assert got.value == pytest.approx(value, rel=1e-9)
        assert got.error == pytest.approx(value * np.expm1(stats.t.ppf(0.975, 3) * spread / value), rel=1e-6)


def labels_of(kind):
    selection = exact().selection
    return [n for n, s in zip(selection.labels, selection.segments, strict=True) if s.block_type == kind]


def test_stops_at_the_relative_error():
    e = exact()
    found = probes.sharpness(e.model, e.batch, blocks=e.blocks, samples=1000, rtol=0.3)
    assert 10 <= found[0].samples < 1000 and not found.warnings
    assert all(t.error <= 0.3 * t.value for t in found.select(by="type", **SHARPNESS))
    endless = (tokens(2, seed) for seed in range(10**9))
    found = probes.sharpness(e.model, endless, blocks=e.blocks, rtol=0.3)
    assert found[0].samples == found.settings["batches"] and found.settings["interval_over"] == "batches"
    found = probes.sharpness(e.model, (tokens(1, s) for s in range(10**9)), blocks=e.blocks, rtol=0.01, max_batches=12)
    assert found[0].samples == 12 and "0.01 was asked for; take more batches" in found.warnings[0]
    found = probes.sharpness(e.model, e.batch, blocks=e.blocks, rtol=0.5, samples=2)
    assert "at least 10 samples are needed" in found.warnings[0]


def test_leaves_the_model_alone():
    model = gpt2()
    model.train()
    model.transformer.h[0].eval()
    parameter = model.transformer.wte.weight
    parameter.grad = torch.ones_like(parameter)
    parameter.register_hook(lambda grad: pytest.fail("a hook of the user's was called"))
    modes = [module.training for module in model.modules()]
    values, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    first = probes.sharpness(model, tokens(), seed=3)
    assert list(first) == list(probes.sharpness(model, tokens(), seed=3))
    assert list(first) != list(probes.sharpness(model, tokens(), seed=4))
    assert [module.training for module in model.modules()] == modes and model.config.use_cache
    assert (parameter.grad == 1).all() and model.transformer.wpe.weight.grad is None
    assert all((values[n] == t).all() for n, t in model.state_dict().items())
    assert (torch.get_rng_state() == random).all()


def test_frozen_parameters_are_left_out_and_wrappers_taken_off():
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    found = probes.sharpness(model, tokens())
    assert not found.select(of="tok_emb") and found.select(by="model")[0].elements == exact().selection.dim - 28
    with torch.no_grad():
        wrapped = probes.sharpness(nn.DataParallel(model), tokens())
    assert wrapped.value(by="model", **SHARPNESS) == pytest.approx(found.value(by="model", **SHARPNESS))


def test_separate_and_stacked_rows():
    """GPT-NeoX interleaves q, k and v per head."""
    from reference.models import gpt_neox

    model = gpt_neox().double()
    batch = torch.randint(11, (2, 6))
    found = probes.sharpness(model, batch, labels="true")
    model.eval()
    nn.functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    q, k, v = model.get_parameter(name).grad.view(3, 3, 4, 12).unbind(1)
    for role, rows in zip("qkv", (q, k, v), strict=True):
        value = found.value(by="segment", of=f"{name}[{role}]")
        assert value == pytest.approx(10 * float(rows.square().mean()), rel=1e-10)


def test_a_measurement_comes_back_from_json():
    """Whatever its values are, and with all that is said of it."""
    nan, inf = float("nan"), float("inf")
    pairs = [(1.5, 0.25), (inf, None), (-inf, nan), (nan, inf), (0.0, 0.0)]
    notes = {"role": "q", "rows": 3}
    measured = probes.Measurement(
        "test",
        [probes.Estimate("x", "segment", f"w[{i}]", v, e, layer=i, notes=notes) for i, (v, e) in enumerate(pairs)],
        settings={"seed": 1},
        cost=Cost(2.0, 3.0),
        step=7,
        warnings=["few"],
        arrays={"w": [1.0, 2.0]},
    )
    back = probes.Measurement.from_json(measured.to_json())
    for got, (value, error) in zip(back, pairs, strict=True):
        assert got.value == pytest.approx(value, nan_ok=True)
        assert got.error is None if error is None else got.error == pytest.approx(error, nan_ok=True)
        assert (got.layer, got.notes["role"], got.notes["rows"]) == (int(got.of[2]), "q", 3)
    assert (back.probe, back.settings, back.cost, back.step) == ("test", {"seed": 1}, Cost(2.0, 3.0), 7)
    assert (back.warnings, back.arrays) == (("few",), {"w": [1.0, 2.0]})
    assert [row["of"] for row in back.table()] == [row["of"] for row in back.rows()] == [e.of for e in measured]
    assert back.rows()[0] | {"step": 7, "note_role": "q", "value": 1.5, "samples": 1} == back.rows()[0]
    assert next(iter(back.table())) == {
        "quantity": "x", "of": "w[0]", "layer": 0, "value": 1.5, "error": 0.25, "samples": 1, "unit": "",
    }  # fmt: skip


class Broken(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)
        self.returns = returns

    def forward(self, inputs):
        return self.returns(self.table(inputs))


BAD = {
    "no model": (lambda: (3, tokens()), TypeError, "expected a torch.nn.Module"),
    "no batches": (lambda: (gpt2(), []), ValueError, "there are no batches"),
    "no tokens": (lambda: (gpt2(), 3), TypeError, "got int, expected batches"),
    "text": (lambda: (gpt2(), ["abc"]), TypeError, "batch 0: got str, expected int64 tokens"),
    "floats": (lambda: (gpt2(), torch.randn(2, 4)), TypeError, "got float32 values"),
    "a row": (lambda: (gpt2(), tokens()[0]), ValueError, r"shape \[6\], expected int64 tokens \[sequences"),
    "one token": (lambda: (gpt2(), tokens()[:, :1]), ValueError, "only a target; give 2 or more"),
    "shapes": (lambda: (gpt2(), (tokens()[:, :-1], tokens())), ValueError, "one per input"),
    "ignored": (lambda: (gpt2(), (tokens(), torch.full((3, 6), -100))), ValueError, "no target counts"),
    "vocabulary": (lambda: (gpt2(), tokens() + 1), ValueError, "input 7 is no token, the model knows 0 to 6"),
    "targets": (lambda: (Broken(lambda x: x[..., :3]), tokens()), ValueError, "gives logits for 3 tokens"),
    "negative": (lambda: (gpt2(), tokens() - 1), ValueError, "input -1 is no token"),
    "no input_ids": (lambda: (gpt2(), {"tokens": tokens()}), ValueError, "without 'input_ids'"),
    "too long": (lambda: (gpt2(), torch.zeros(1, 9, dtype=torch.int64)), ValueError, "the model fails on batch 0"),
    "no logits": (lambda: (Broken(lambda x: {"loss": 1}), tokens()), TypeError, "no loss per token .* dict"),
    "one loss": (lambda: (Broken(lambda x: x.sum()), tokens()), ValueError, "no loss per token"),
    "nan": (
        lambda: (Broken(lambda x: x * torch.nan), tokens()),
        FloatingPointError,
        "the loss is not finite on batch 0",
    ),
    "frozen": (lambda: (gpt2().requires_grad_(False), tokens()), ValueError, "no parameter requires a gradient"),
    "meta": (lambda: (gpt2().to("meta"), tokens()), ValueError, "on the meta device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        probes.sharpness(*make())


def test_impossible_labels():
    model = Broken(lambda x: x.index_fill(-1, torch.tensor([2]), -torch.inf))
    assert true_value(torch.tensor([[0, 1, 3]]), model) > 0
    with pytest.raises(FloatingPointError, match="at 1 of 2 tokens"):
        true_value(torch.tensor([[0, 1, 2]]), model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "real"}, "labels must be 'sampled' or 'true', got 'real'"),
        ({"unit": "word"}, "unit must be 'token' or 'sequence'"),
        ({"micro": 0}, "micro is the number of sequences"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"max_batches": 0}, "max_batches must be at least 1"),
        ({"rtol": 2.0}, "rtol is a relative error between 0 and 1"),
        ({"labels": "true", "samples": 2}, "true labels are the same at every draw"),
        ({"blocks": BlockMap.unknown([("w", torch.ones(3))])}, "the map of another model: transformer.wte.weight"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        probes.sharpness(exact().model, tokens(), **options)
