"""Lanczos and stochastic Lanczos quadrature on matrices of known spectrum, and on the exact Hessian."""

import numpy as np
import pytest
import torch

from probes.exact import Dense, exact
from sharpwise import probes
from sharpwise.probes.lanczos import Lanczos


def with_spectrum(values, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return Dense((q * torch.as_tensor(np.array(values), dtype=torch.float64) @ q.T).to(dtype))


SPECTRA = {
    "even": np.linspace(-1, 3, 80),
    "outliers": np.concatenate([[-30.0, -4.0], np.linspace(-0.1, 0.1, 70), [5.0, 50.0, 400.0]]),
    "decaying": 2.0 ** -np.arange(60),
    "positive": np.linspace(1, 2, 50) ** 4,
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_eigenvalues_lie_within_their_bounds(name, dtype):
    values = np.sort(SPECTRA[name])
    for seed in range(10):
        found = probes.eigenvalues(with_spectrum(values, seed, dtype), 2, rtol=1e-4, steps=80, seed=seed)
        assert not found.warnings
        scale = np.abs(values).max()
        rounding = 1e-6 * scale if dtype == torch.float32 else 1e-12 * scale
        for of, true in (("largest 1", values[-1]), ("largest 2", values[-2]), ("smallest 1", values[0])):
            one = found.select(of=of)[0]
            assert abs(one.value - true) <= one.error + rounding
            assert one.kind == "residual" and one.error <= 2e-4 * scale


def test_no_ghosts():
    """Rounding makes copies of converged eigenvalues where the basis is not kept orthogonal."""
    values = np.concatenate([np.linspace(0, 1, 150), [1000.0]])
    matrix = with_spectrum(values, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    process = Lanczos(matrix, torch.randn(151, generator=generator), 100)
    while process.step():
        pass
    assert np.sum(process.ritz()[0] > 2) == 1
    gram = process.basis @ process.basis.T
    assert float((gram - torch.eye(100)).abs().max()) < 1e-5


def test_magnitude_and_one_end():
    matrix = with_spectrum([-9.0, -5.0, *np.linspace(0, 1, 30), 7.0])
    found = probes.eigenvalues(matrix, 3, which="magnitude", rtol=1e-6)
    assert [e.value for e in found] == pytest.approx([-9, 7, -5], abs=1e-4)
    assert [e.of for e in found] == ["magnitude 1", "magnitude 2", "magnitude 3"]
    assert [e.of for e in probes.eigenvalues(matrix, 2, which="smallest")] == ["smallest 1", "smallest 2"]
    assert [e.of for e in probes.eigenvalues(matrix, which="largest")] == ["largest 1"]


def test_invariant_subspaces_are_left():
    """Five different eigenvalues: after five steps nothing is left of the start vector, and each direction more finds
    one of the ones that are there several times."""
    found = probes.eigenvalues(with_spectrum([1.0] * 10 + [2.0] * 10 + [3.0, 4.0, 9.0]), 5, which="largest", steps=23)
    assert [e.value for e in found][:4] == pytest.approx([9, 4, 3, 2]) and not found.warnings
    process = Lanczos(with_spectrum([1.0] * 10 + [2.0] * 10 + [9.0]), start := torch.randn(21).double(), 21)
    while process.step():
        pass
    assert process.steps == 3
    again = Lanczos(process.matrix, start, 21, restart=torch.Generator().manual_seed(0))
    while again.step():
        pass
    assert again.ritz()[0] == pytest.approx([1] * 10 + [2] * 10 + [9])
    zero = probes.eigenvalues(Dense(torch.zeros(6, 6, dtype=torch.float64)), 2)
    assert [e.value for e in zero] == [0, 0, 0, 0] and not zero.warnings


def test_says_that_it_did_not_converge():
    found = probes.eigenvalues(with_spectrum(np.linspace(0, 1, 200)), rtol=1e-6, steps=10)
    assert "not converged: after 10 steps a residual is" in found.warnings[0]
    assert all(e.error > 1e-6 for e in found)
    tiny = probes.eigenvalues(with_spectrum([1.0, 2.0]), 5)
    assert "the selection has 2 elements" in tiny.warnings[0] and len(tiny) == 4


def test_of_the_model():
    e = exact()
    for kind, matrix in (("hessian", e.hessian), ("gauss-newton", e.fisher)):
        for select, rows in ((None, range(364)), ("FFN", e.rows("FFN"))):
            rows = list(rows)
            truth = torch.linalg.eigvalsh(matrix[rows][:, rows])
            c = probes.Curvature(e.model, e.batch, kind, select=select, blocks=e.blocks)
            found = probes.eigenvalues(c, 1, rtol=1e-3)
            largest, smallest = found
            assert abs(largest.value - float(truth[-1])) <= largest.error + 1e-9
            assert abs(smallest.value - float(truth[0])) <= smallest.error + 1e-9
            assert found.settings["products"] == largest.samples + 2
            shares = [v for k, v in largest.notes.items() if k.startswith("share ")]
            assert sum(shares) == pytest.approx(1) and (select is None or list(largest.notes) == ["share FFN"])


def test_quadrature_is_exact_in_low_moments():
    values = np.linspace(-1, 2, 40)
    matrix = with_spectrum(values)
    found = probes.density(matrix, samples=3, steps=5, seed=1)
    assert found.nodes.shape == (3, 5) and found.weights.sum(1) == pytest.approx([1, 1, 1])
    generator = torch.Generator().manual_seed(1)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        v = torch.randn(40, generator=generator, dtype=torch.float64)
        v /= v.norm()
        power = v
        for degree in range(10):  # 2m - 1 = 9
            assert float(np.sum(weights * nodes**degree)) == pytest.approx(float(v @ power))
            power = matrix.matrix @ power


@pytest.mark.slow
@pytest.mark.parametrize("name", ["even", "outliers"])
def test_moments_cover_as_often_as_they_say(name):
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    truth = [values.mean(), np.sqrt(np.mean(values**2))]
    inside = []
    for seed in range(200):
        found = probes.density(matrix, samples=30, steps=2, seed=seed)
        inside.append([abs(e.value - true) <= e.error for e, true in zip(found, truth, strict=False)])
    rates = np.mean(inside, axis=0)
    assert all(0.9 <= rate <= 0.99 for rate in rates), rates


def test_shares_with_as_many_steps_as_rows():
    """Then nodes are the eigenvalues, and weights the squared parts of the start vector in them."""
    values = np.linspace(-1, 2, 12)
    matrix = with_spectrum(values)
    found = probes.density(matrix, samples=20, steps=12, seed=2)
    assert np.allclose(found.nodes, values)
    share, error = found.share(1, np.inf)
    assert abs(share - 4 / 12) <= error and found.share(-9, 9) == pytest.approx((1, 0), abs=1e-9)
    assert found.value(quantity="share of negative eigenvalues") == pytest.approx(found.share(-9, -1e-9)[0])


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_the_share_of_negative_eigenvalues_knows_how_coarse_it_is(steps):
    """Most eigenvalues of a Hessian are next to zero, where few steps do not tell them apart."""
    e = exact()
    true = float(
        (torch.linalg.eigvalsh(e.hessian) < -1e-6 * torch.linalg.eigvalsh(e.hessian).abs().max()).double().mean()
    )
    share = probes.density(Dense(e.hessian), samples=20, steps=steps).select(quantity="share of negative eigenvalues")[
        0
    ]
    assert abs(share.value - true) <= share.error


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name", ["even", "outliers", "of a model"])
def test_shares_cover_the_exact_ones_as_often_as_they_say(name, steps):
    """Ends in the middle of the spectrum, where a node stands for eigenvalues on both sides."""
    matrix = Dense(exact().hessian) if name == "of a model" else with_spectrum(SPECTRA[name])
    values = np.sort(torch.linalg.eigvalsh(matrix.matrix).numpy())
    middle, step = values[len(values) // 2], 1e-3 * np.ptp(values)
    ends = [
        (np.quantile(values, 0.3) + 1e-9, np.quantile(values, 0.7) - 1e-9),
        (-np.inf, np.quantile(values, 0.5) + 1e-9),
        (np.quantile(values, 0.9) - 1e-9, np.inf),
        (middle - step, middle + step),
    ]
    truth = [np.mean((values >= low) & (values <= high)) for low, high in ends]
    inside = []
    for seed in range(20):
        found = [probes.density(matrix, samples=10, steps=steps, seed=seed).share(*end) for end in ends]
        inside.append([abs(share - true) <= error for (share, error), true in zip(found, truth, strict=True)])
        assert all(0 <= error <= 1 for _, error in found)
    rates = np.mean(inside, axis=0)
    assert all(rate >= 0.9 for rate in rates), rates


def test_a_share_between_isolated_nodes_is_known_as_before():
    """What coarseness adds is the weight of the nodes next to an end, and nothing where the end is open."""
    found = probes.density(with_spectrum(SPECTRA["outliers"]), samples=10, steps=30, seed=1)
    assert found.share(-np.inf, np.inf) == pytest.approx((1, 0), abs=1e-9)
    share, error = found.share(20, np.inf)  # 50 and 400 are nodes of their own, and 5
    alone = (found.weights * (found.nodes >= 20)).sum(1)
    next_to_it = [w[np.abs(n - 5) < 1].sum() for n, w in zip(found.nodes, found.weights, strict=True)]
    assert share == pytest.approx(alone.mean())
    assert error < 3 * alone.std(ddof=1) / np.sqrt(10) + max(np.mean(next_to_it), alone.mean())
    for ends in ((1.0, 0.0), (np.nan, 1.0), (0.0, np.nan)):
        with pytest.raises(ValueError, match="expected low <= high, got low="):
            found.share(*ends)


def test_a_density_comes_back_from_json():
    found = probes.density(with_spectrum(SPECTRA["even"]), samples=3, steps=7)
    back = probes.Density.of(probes.Measurement.from_json(found.at(5).to_json()))
    assert back.step == 5 and [e.value for e in back] == [e.value for e in found]
    assert np.array_equal(back.nodes, found.nodes) and np.array_equal(back.weights, found.weights)
    assert all(np.array_equal(a, b) for a, b in zip(back.curve(), found.curve(), strict=True))
    with pytest.raises(KeyError):
        probes.Density.of(probes.trace(with_spectrum([1.0, 2.0])))


def test_the_curve_is_the_smoothed_density():
    values = SPECTRA["even"]
    found = probes.density(with_spectrum(values), samples=30, steps=80)
    x, y, error = found.curve(sigma=0.2)
    smooth = np.exp(-(((x[:, None] - values) / 0.2) ** 2) / 2).mean(1) / (0.2 * np.sqrt(2 * np.pi))
    assert np.sum(y) * (x[1] - x[0]) == pytest.approx(1, abs=1e-3)
    assert np.mean(np.abs(y - smooth) <= error) > 0.8
    at = found.curve([0.0, 1.0], sigma=0.2)[1]
    assert at == pytest.approx(np.interp([0.0, 1.0], x, y), rel=1e-2)


def test_density_stops_and_says_where_it_did_not():
    matrix = with_spectrum(SPECTRA["even"])
    found = probes.density(matrix, samples=2000, steps=20, rtol=0.3)
    assert 10 <= len(found.nodes) < 2000 and not found.warnings
    assert "0.05 was asked for" in probes.density(matrix, samples=12, steps=20, rtol=0.05).warnings[0]
    assert "10 samples are needed" in probes.density(matrix, samples=3, steps=20, rtol=0.9).warnings[0]
    assert probes.density(matrix, samples=1)[0].error is None


def test_density_of_a_multiple_eigenvalue():
    found = probes.density(Dense(2 * torch.eye(9, dtype=torch.float64)), samples=3)
    assert found.value(quantity="mean eigenvalue") == pytest.approx(2)
    assert found.share(1.9, 2.1) == pytest.approx((1.0, 0.0))
    x, y, _ = found.curve()
    assert np.sum(y) * (x[1] - x[0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: probes.eigenvalues(m, 0), "k must be at least 1, got 0"),
        (lambda m: probes.eigenvalues(m, 5, steps=3), "steps=3 find no more than as many eigenvalues, got k=5"),
        (lambda m: probes.eigenvalues(m, which="top"), "which must be 'largest', 'smallest', 'both' or 'magnitude'"),
        (lambda m: probes.eigenvalues(m, rtol=1.0), "rtol is a relative error between 0 and 1"),
        (lambda m: probes.density(m, samples=0), "samples must be at least 1"),
        (lambda m: probes.density(m, steps=0), "steps must be at least 1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(with_spectrum([1.0, 2.0, 3.0]))
