"""Curves that are drawn with fewer points than they have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sharpwise.report.curves import averaged, rounded, thinned

VALUES = st.floats(-1e6, 1e6) | st.just(float("nan"))


@given(arrays(np.float64, st.integers(0, 400), elements=VALUES), st.integers(4, 60))
def test_thinning_keeps_extremes_ends_and_order(y: np.ndarray, points: int) -> None:
    index = thinned(y, points)
    known = np.flatnonzero(np.isfinite(y))
    assert len(index) <= points
    assert set(index) <= set(known)
    assert (np.diff(index) > 0).all()
    if len(known):
        assert y[index].min() == y[known].min()
        assert y[index].max() == y[known].max()
        assert (index[0], index[-1]) == (known[0], known[-1])


def test_a_single_spike_in_a_long_run_stays() -> None:
    y = np.zeros(100_000)
    y[[31_234, 77_777]] = 9.0, -9.0
    index = thinned(y)
    assert len(index) <= 2000
    assert {31_234, 77_777} <= set(index.tolist())


def test_means_leave_out_what_is_not_finite() -> None:
    nan = float("nan")
    assert averaged([1, 2, 3], [nan, nan, 4.0], 2) == ([3.0], [4.0])
    assert averaged([], [], 5) == ([], [])
    assert averaged([1, 2, 3], [1.0, 2.0, 3.0], 1) == ([1, 2, 3], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("values", [[1e-9, 123.456789, -5.0, 0.0], []])
def test_rounding_is_to_significant_digits(values: list[float]) -> None:
    assert rounded(values, 4) == pytest.approx(values, rel=1e-3)
