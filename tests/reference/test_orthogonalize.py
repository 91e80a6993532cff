"""Orthogonalization and the normalization of rows against the equations in float64, and against torch's Muon."""

import numpy as np
import pytest
import torch
from torch.optim import _muon

from reference import orthogonalize as oracle
from sharpwise.rules import orthogonalize
from sharpwise.rules.orthogonalize import newton_schulz, normalize_rows, polar_express

METHODS = {
    "newton_schulz": (newton_schulz, oracle.newton_schulz, (0.68, 1.21)),
    "polar_express": (polar_express, oracle.polar_express, (0.85, 1.15)),
}
LOOPED = orthogonalize.BATCHED + 4
SHAPES = [(24, 40), (40, 24), (32, 32), (1, 7), (7, 1), (LOOPED, LOOPED + 40), (LOOPED + 40, LOOPED)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5}  # at 1 terms of Polar Express cancel to a fifteenth, twice

methods = pytest.mark.parametrize("method", METHODS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def matrices(shape, n=3, dtype=torch.float64, seed=0):
    """[n, rows, columns], of singular values that fall by a factor of 100."""
    random = np.random.default_rng(seed)
    U, _, V = np.linalg.svd(random.standard_normal((n, *shape)), full_matrices=False)
    S = np.logspace(0, -2, U.shape[-1])
    return torch.from_numpy((U * S) @ V).to(dtype)


def distance(got, expected):
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@shapes
@methods
def test_equations(method, shape, dtype):
    function, reference, _ = METHODS[method]
    m = matrices(shape, dtype=dtype)
    before = m.clone()
    got = function(m)
    assert got.dtype == dtype and got.shape == m.shape and m.equal(before)
    for one, result in zip(m, got, strict=True):
        expected = reference(one.double().numpy())
        assert distance(result, expected) < TOLERANCE[dtype]
        assert distance(function(one), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@methods
def test_singular_values_lie_in_the_band(method, precision):
    function, _, (low, high) = METHODS[method]
    # A hundredth of the largest of 64 singular values is 2e-3 of the norm and more.
    values = torch.linalg.svdvals(function(matrices((64, 96), dtype=torch.float32), precision=precision).double())
    slack = 0.005 if precision == "bf16" else 0
    assert low - slack < float(values.min()) and float(values.max()) < high + slack


@shapes
def test_newton_schulz_is_that_of_torch(shape):
    one = matrices(shape, dtype=torch.float32)[0]
    expected = _muon._zeropower_via_newtonschulz(one, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert distance(newton_schulz(one), expected) < 0.05
    assert distance(newton_schulz(one, precision="bf16"), expected) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@shapes
@methods
def test_a_batch_is_its_matrices_one_by_one(method, shape, precision):
    function = METHODS[method][0]
    m = matrices(shape, n=5, dtype=torch.float32)
    got = function(m, precision=precision)
    for one, result in zip(m, got, strict=True):
        # Polar Express makes forty of a last bit of the norm.
        assert distance(result, function(one, precision=precision)) < (4e-6 if precision == "fp32" else 0.02)


@pytest.mark.parametrize("shape", [(24, 40), (LOOPED + 40, LOOPED)], ids=str)
@methods
def test_nan_stays_in_its_matrix_and_zeros_stay_zeros(method, shape):
    function = METHODS[method][0]
    m = matrices(shape, n=4, dtype=torch.float32)
    m[0, 3, 5], m[1], m[2, 1, 1] = torch.nan, 0, torch.inf
    got = function(m)
    assert bool(got[0].isnan().all()) and bool((got[1] == 0).all()) and bool(got[2].isnan().all())
    assert distance(got[3], function(m[3])) < 1e-6


@pytest.mark.parametrize("shape", [(24, 40), (LOOPED + 40, LOOPED)], ids=str)
@methods
def test_views_are_as_good_as_copies(method, shape):
    """Of a Conv1D the transpose, of a fused matrix some rows or columns, of stacked experts every second one."""
    function = METHODS[method][0]
    m = matrices(shape, n=4, dtype=torch.float32)
    for view in (m.mT, m[:, 3:-4], m[..., 5:-1], m[::2], m[:, ::2, ::3]):
        before = view.clone()
        assert distance(function(view), function(view.contiguous())) < 1e-5
        assert view.equal(before)


@methods
def test_rank_one(method):
    function, reference, _ = METHODS[method]
    u, v = torch.arange(1.0, 9), torch.arange(-5.0, 7)
    m = torch.outer(u, v)
    assert distance(function(m), reference(m.double().numpy())) < TOLERANCE[torch.float32]
    # phi(1) along the one direction there is, nothing elsewhere.
    scale = float(function(m.double().norm()[None, None]))
    assert distance(function(m), scale * m / m.norm()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("scale", [1e-45, 1e-12, 1e-7, 1e-6, 1e25, 1e38])
@methods
def test_any_size_of_finite_elements(method, scale):
    function, reference, _ = METHODS[method]
    m = (matrices((24, 40), n=1, dtype=torch.float64)[0] * scale).float()
    expected = reference(m.double().numpy())
    assert np.linalg.norm(function(m).double().numpy() - expected) <= 1e-5 * np.linalg.norm(expected)


def test_fewer_steps():
    m = matrices((24, 40))[0]
    once = newton_schulz(m, steps=1)
    X = m / m.norm()
    a, b, c = 3.4445, -4.7750, 2.0315
    assert distance(once, a * X + (b * X @ X.T + c * X @ X.T @ X @ X.T) @ X) < 1e-12


def test_precision_is_what_products_are_in():
    m = matrices((24, 40), dtype=torch.float32)
    exact, coarse = newton_schulz(m, precision="fp32"), newton_schulz(m, precision="bf16")
    assert newton_schulz(m).equal(exact) and coarse.dtype == torch.float32
    assert 1e-3 < distance(coarse, exact) < 0.05
    assert coarse.equal(coarse.bfloat16().float())
    wide = m.double()
    assert newton_schulz(wide, precision="bf16").equal(newton_schulz(wide))
    assert newton_schulz(m.bfloat16()).dtype == torch.bfloat16


@methods
def test_messages(method):
    function = METHODS[method][0]
    with pytest.raises(ValueError, match=r"expected matrices .*, got shape \(3,\)"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match=r"got 'fp16'; allowed are 'fp32', 'bf16' and None"):
        function(torch.ones(3, 3), precision="fp16")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_are_normalized(dtype):
    random = np.random.default_rng(0)
    v = torch.zeros(2, 24, dtype=dtype)
    expected = [np.zeros(24), np.zeros(24)]
    for _ in range(5):
        o = torch.from_numpy(random.standard_normal((2, 24, 40)) * random.gamma(1.0, size=(2, 24, 1))).to(dtype)
        u, new = normalize_rows(o, v, 0.9, 1e-10)
        alone = normalize_rows(o[1], v[1], 0.9, 1e-10)
        for i in range(2):
            result, expected[i] = oracle.normalize_rows(o[i].double().numpy(), expected[i], 0.9, 1e-10)
            assert distance(u[i], result) < TOLERANCE[dtype] and distance(new[i], expected[i]) < TOLERANCE[dtype]
        assert distance(alone[0], u[1]) < 1e-6 and alone[1].equal(new[1])
        v = new


def test_rows_of_zeros_and_nan():
    o = matrices((6, 9), n=3, dtype=torch.float32)
    o[0], o[1, 2, 3], o[2, 4] = 0, torch.nan, 0
    u, v = normalize_rows(o, torch.zeros(3, 6))
    assert bool((u[0] == 0).all()) and bool((v[0] == 0).all())
    assert bool(u[1].isnan().all()) and int(v[1].isnan().sum()) == 1
    assert bool(u[2].isfinite().all()) and bool((u[2, 4] == 0).all())
    assert float(u[2].norm()) == pytest.approx(float(o[2].norm()), rel=1e-5)
