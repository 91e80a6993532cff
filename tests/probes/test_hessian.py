"""Trace, diagonal and norms against the exact Hessian, and how often their intervals cover it."""

from functools import partial

import numpy as np
import pytest
import torch

from probes.exact import Dense, cover, exact
from sharpwise import probes
from sharpwise.probes.hessian import median_bias

KINDS = ("Emb", "QK", "VO", "FFN", "Norm")


@pytest.fixture(scope="module")
def dense():
    return Dense(exact().hessian, exact().selection)


def blocks_of(quantity):
    """The exact value of every type, and of everything."""
    e = exact()
    found = {"model": quantity(e.hessian, list(range(364)))}
    return found | {kind: quantity(e.hessian, e.rows(kind)) for kind in KINDS}


TRUE = {
    "trace": lambda h, rows: float(h.diagonal()[rows].sum()),
    "frobenius": lambda h, rows: float(h[rows].norm()),
    "norm_11": lambda h, rows: float(h[rows].abs().sum()) / len(rows),
    "diagonal": lambda h, rows: float(h.diagonal()[rows].mean()),
}


@pytest.mark.parametrize("name", TRUE)
def test_products_of_the_model_give_what_the_matrix_gives(name, dense):
    e = exact()
    c = probes.Curvature(e.model, e.batch, blocks=e.blocks)
    one, other = (getattr(probes, name)(m, samples=20, seed=5) for m in (c, dense))
    assert [f.value for f in one] == pytest.approx([f.value for f in other], rel=1e-8, abs=1e-9)
    assert one.settings["products"] == 20 and one.cost.gradients == 3 + 19 * 2 and one.settings["tokens"] == 15
    assert {f.by for f in one} == {"model", "type", "role", "layer", "segment"}


@pytest.mark.parametrize("name", TRUE)
@pytest.mark.parametrize(("repetitions", "lowest"), [(15, 0.6), pytest.param(200, 0.9, marks=pytest.mark.slow)])
def test_intervals_cover_as_often_as_they_say(name, repetitions, lowest, dense):
    truth = blocks_of(TRUE[name])
    probe = partial(getattr(probes, name), samples=60)
    inside = []
    for seed in range(repetitions):
        found = probe(dense, seed=seed)
        chosen = [*found.select(by="model"), *found.select(by="type")]
        inside.append([cover(f, truth[f.of]) for f in chosen])
    rates = dict(zip((f.of for f in chosen), np.mean(inside, axis=0), strict=True))
    assert all(lowest <= rate <= (0.99 if repetitions > 50 else 1) for rate in rates.values()), rates


def test_diagonal_by_element(dense):
    found = probes.diagonal(dense, samples=400)
    values = dense.selection.join(found.values)
    errors = dense.selection.join(found.errors)
    truth = exact().hessian.diagonal()
    wrong = (values - truth).abs() > errors
    assert 0.01 <= wrong.double().mean() <= 0.1
    assert float((values - truth).norm() / truth.norm()) < found.settings["relative_error"]
    name = "transformer.h.0.attn.c_attn.weight[q]"
    assert found.values[name].shape == (4, 4)
    few = probes.diagonal(dense, samples=400, rtol=0.9)
    assert few[0].samples < 400 and few.settings["relative_error"] <= 0.9 and not few.warnings
    assert "take more samples" in probes.diagonal(dense, samples=20, rtol=0.01).warnings[0]


@pytest.mark.parametrize("n", [3, 4, 9, 10, 50])
def test_bias_of_the_median(n):
    draws = np.abs(np.random.default_rng(0).standard_cauchy((400_000 // n, n)))
    medians = np.median(draws, axis=1)
    if n > 4:  # fewer have a mean, but no variance
        assert medians.mean() == pytest.approx(median_bias(n), abs=5 * medians.std() / np.sqrt(len(medians)))
    assert median_bias(n) > median_bias(n + 2) > 1


def test_bias_of_the_median_of_few_and_many():
    """For n = 3 it is 6 int_0^1 tan(pi u / 2) u (1 - u) du."""
    u = (np.arange(10**6) + 0.5) / 10**6
    assert median_bias(3) == pytest.approx(6 * np.mean(np.tan(np.pi * u / 2) * u * (1 - u)), rel=1e-6)
    assert [median_bias(n) for n in (10, 20, 50, 100)] == pytest.approx([1.155, 1.07, 1.026, 1.0125], abs=2e-3)
    with pytest.raises(ValueError, match="median of 2 Cauchy variables has no mean"):
        median_bias(2)


def test_some_rows_stand_for_all(dense):
    inside = []
    truth = blocks_of(TRUE["norm_11"])
    for seed in range(20):
        found = probes.norm_11(dense, rows=6, seed=seed)
        inside.append([cover(f, truth[f.of]) for f in (*found.select(by="model"), *found.select(by="type"))])
    assert np.mean(inside) >= 0.9
    assert found.settings["rows"] == 6
    every = probes.norm_11(dense, rows=1000, seed=3)
    assert [f.value for f in every] == pytest.approx([f.value for f in probes.norm_11(dense, seed=3)], rel=0.5)


@pytest.mark.parametrize("name", ["trace", "frobenius", "norm_11"])
def test_stops_at_the_relative_error(name, dense):
    probe = getattr(probes, name)
    found = probe(dense, samples=4000, rtol=0.2)
    assert not found.warnings and found[0].samples < 4000
    assert found[0].error <= 0.21 * abs(found[0].value)
    short = probe(dense, samples=20, rtol=0.01)
    assert "0.01 was asked for" in short.warnings[0] and "take more samples" in short.warnings[0]
    assert short[0].samples == 20


def test_trace_of_gauss_newton_is_the_sharpness():
    e = exact()
    found = probes.trace(probes.Curvature(e.model, e.batch, "gauss-newton", blocks=e.blocks), samples=20)
    total = found.select(by="model")[0]
    assert cover(total, float(e.fisher.trace()))


def test_a_selection_is_all_there_is(dense):
    e = exact()
    c = probes.Curvature(e.model, e.batch, select="QK", blocks=e.blocks)
    found = probes.trace(c, samples=5)
    assert {f.of for f in found.select(by="type")} == {"QK"}
    assert found.select(by="model")[0].elements == c.dim == len(e.rows("QK"))


def test_one_sample_has_no_error(dense):
    for probe in (probes.trace, probes.frobenius, probes.diagonal):
        found = probe(dense, samples=1)
        assert {f.error for f in found} == {None}
    assert found.errors is None


def test_same_seed_same_numbers(dense):
    random = torch.get_rng_state()
    for probe in (probes.trace, probes.frobenius, probes.diagonal, probes.norm_11):
        first, again, other = (probe(dense, samples=20, seed=s) for s in (1, 1, 2))
        assert list(first) == list(again) != list(other)
    assert (torch.get_rng_state() == random).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: probes.trace(m, samples=0), ValueError, "samples must be at least 1, got 0"),
        (lambda m: probes.trace(m, rtol=0), ValueError, "rtol is a relative error between 0 and 1, as 0.05, got 0"),
        (lambda m: probes.norm_11(m, samples=10), ValueError, "samples must be at least 20, got 10"),
        (lambda m: probes.norm_11(m, rows=1), ValueError, "rows must be at least 2, got 1"),
        (lambda m: probes.trace(m.matrix), TypeError, "got Tensor, expected a Curvature"),
    ],
)
def test_bad_arguments(call, error, message, dense):
    with pytest.raises(error, match=message):
        call(dense)
