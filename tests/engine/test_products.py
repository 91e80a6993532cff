"""Products with thin matrices by our own loops, against float64."""

import pytest
import torch

from sharpwise.engine.backends.products import OwnProducts

SHAPES = [(1, 1), (1, 70), (70, 1), (7, 15), (8, 16), (9, 17), (64, 48), (65, 49), (130, 1000), (1100, 96)]


@pytest.fixture(scope="module")
def products():
    return OwnProducts()


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lying(how, copies, rows, columns):
    """Matrices, and places for others, whose rows lie, or columns, whole or within larger ones."""
    if how == "columns":
        return numbers(copies, columns, rows).mT, torch.full((copies, columns, rows), torch.nan).mT
    if how == "within":
        return numbers(copies, rows, columns + 5)[:, :, 3:-2], torch.full((copies, rows, columns), torch.nan)
    return numbers(copies, rows, columns), torch.full((copies, rows, columns), torch.nan)


def assert_close(found, expected):
    assert found.shape == expected.shape and found.isfinite().all()
    assert (found.double() - expected).norm() <= 5e-7 * expected.norm()


@pytest.mark.parametrize("rank", [1, 16, 20])
@pytest.mark.parametrize("how", ["rows", "columns", "within"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(products, shape, how, rank):
    (rows, columns), copies = shape, 2
    m, x = lying(how, copies, rows, columns)
    left, right = numbers(copies, rows, rank, seed=1), numbers(copies, columns, rank, seed=2)
    assert_close(products.right(m, right), m.double() @ right.double())
    assert_close(products.left(left, m), left.double().mT @ m.double())
    expected = left.double() @ right.double().mT + 0.3 * m.double()
    squares = products.fill(x, left, right.mT, m, 0.3)
    assert_close(x, expected)
    assert_close(squares, expected.square().sum(-1))


def test_a_right_factor_that_lies_either_way(products):
    m, thin = numbers(1, 40, 33), numbers(1, 16, 33)
    assert_close(products.right(m, thin.mT), m.double() @ thin.double().mT)


@pytest.mark.parametrize("how", ["rows", "columns"])
def test_squares_beyond_fp32(products, how):
    m, x = lying(how, 1, 70, 60)
    squares = products.fill(x, torch.zeros(1, 70, 2), torch.zeros(1, 2, 60), m * 1e25, 1.0)
    assert_close(squares / 1e50, m.double().square().sum(-1))


@pytest.mark.parametrize("how", ["rows", "columns"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_large_ones(products, how, threads):
    m, x = lying(how, 1, 515, 301)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        thin, other = numbers(1, 301, 16), numbers(1, 515, 16, seed=1)
        assert_close(products.right(m, thin), m.double() @ thin.double())
        assert_close(products.left(other, m), other.double().mT @ m.double())
        squares = products.fill(x, other, thin.mT, m, -2.0)
    finally:
        torch.set_num_threads(before)
    expected = other.double() @ thin.double().mT - 2 * m.double()
    assert_close(x, expected)
    assert_close(squares, expected.square().sum(-1))


def test_what_it_does_not_take_goes_to_torch(products):
    m, thin = numbers(2, 9, 8).bfloat16().float().bfloat16(), numbers(2, 8, 3)
    x = torch.empty(2, 9, 8)
    assert products.fill(x, numbers(2, 9, 3), thin.mT, m, 0.5) is None
    assert_close(x, numbers(2, 9, 3).double() @ thin.double().mT + 0.5 * m.double())
    wide = numbers(2, 9, 8).double()
    assert torch.equal(products.right(wide, thin.double()), wide @ thin.double())
