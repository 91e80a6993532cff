"""8-bit codes against their definition in float64, their bounds, and what they do to orthogonalized momentum."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import int8
from sharpwise.rules.orthogonalize import newton_schulz
from sharpwise.storage.int8 import Int8

FORMATS = [Int8(code, unsigned=unsigned) for code in ("linear", "dynamic") for unsigned in (False, True)]
SIGNED = [own for own in FORMATS if not own.unsigned]
EPS = 2.0**-23
formats = pytest.mark.parametrize("own", FORMATS, ids=lambda own: own.name + "-unsigned" * own.unsigned)
signed = pytest.mark.parametrize("own", SIGNED, ids=lambda own: own.name)
scales = st.floats(math.log(1e-37), math.log(1e37)).map(lambda x: torch.tensor(math.exp(x)))


def all_codes(own):
    return torch.from_numpy(int8.meaning(own.code, own.unsigned)[0]).to(own.dtype_for(torch.float32))


def coded_and_back(own, x):
    """One block."""
    absmax = x.abs().amax()
    return own.decode(own.encode(x, absmax), absmax)


@formats
def test_values_are_those_of_the_definition(own):
    values = int8.meaning(own.code, own.unsigned)[1]
    got = own.decode(all_codes(own), torch.tensor(1.0)).double().numpy()
    assert len(set(got)) == len(got) == 256 - (own in SIGNED and own.code == "linear")
    assert (np.abs(got - values) <= (1.5 if own.code == "dynamic" else 1) * EPS * np.abs(values)).all()
    assert got.max() == 1.0
    assert got[all_codes(own) == 0] == 0.0


@pytest.mark.parametrize(
    ("unsigned", "least", "smallest"), [(False, -0.99297, 5.5e-7), (True, 0.0, 3.25e-7)], ids=["signed", "unsigned"]
)
def test_dynamic_values_are_those_of_bitsandbytes(unsigned, least, smallest):
    values = int8.dynamic(unsigned)
    assert values.min() == pytest.approx(least, abs=1e-5) and values.max() == 1.0
    assert values[values > 0].min() == pytest.approx(smallest)
    functional = pytest.importorskip("bitsandbytes.functional", exc_type=ImportError)
    theirs = functional.create_dynamic_map(signed=not unsigned).double().numpy()
    assert (np.abs(theirs - values) <= 2 * EPS * np.abs(values)).all()


def hard_numbers(own):
    """Of [0, 1], signed too where there are signs: codes, what lies between two, ends of decades, and random ones."""
    values = torch.from_numpy(np.sort(int8.meaning(own.code, own.unsigned)[1])).float()
    edges = torch.cat([values, (values[1:] + values[:-1]) / 2, 10.0 ** -torch.arange(13.0), torch.zeros(1)]).abs()
    near = [edges * (1 + k * EPS) for k in range(-4, 5)]
    random = torch.cat([torch.rand(4000), 10.0 ** (-12 * torch.rand(4000)), torch.randn(2000).abs() / 4])
    y = torch.cat([*near, random]).clamp(max=1.0)
    return y if own.unsigned else torch.cat([y, -y])


@pytest.mark.parametrize("absmax", [1.0, 3.7, 0.123, 1e-30, 1e30])
@formats
def test_the_nearest_code_is_found(own, absmax):
    """Of two that are about as near it may be either: x / absmax in fp32 is off by an ulp.

    Of dynamic unsigned codes 0 is that of 0 alone.
    """
    absmax = torch.tensor(absmax)
    x = hard_numbers(own) * absmax
    error = (own.decode(own.encode(x, absmax), absmax).double() - x.double()).abs().numpy() / float(absmax)
    y = x.double().numpy() / float(absmax)
    values = int8.meaning(own.code, own.unsigned)[1]
    nearest, least = int8.smallest_error(y, 1.0, values), 0.0
    if own == Int8("dynamic", unsigned=True):
        least = values[values > 0].min()
        nearest = np.where(y > 0, int8.smallest_error(y, 1.0, values[values > 0]), nearest)
    excess = error - nearest
    assert excess.max() <= 6 * EPS
    if own.code == "dynamic":
        assert (excess <= 16 * EPS * np.maximum(np.abs(y), least)).all()


@formats
@given(absmax=scales)
def test_every_code_comes_back(own, absmax):
    codes = all_codes(own)
    assert torch.equal(own.encode(own.decode(codes, absmax), absmax), codes)


@formats
@given(x=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), absmax=scales)
def test_bounds(own, x, absmax):
    x = (torch.tensor([*x, 1.0]) * absmax).abs() if own.unsigned else torch.tensor([*x, 1.0]) * absmax
    back = coded_and_back(own, x)
    off = (back.double() - x.double()).abs()
    step = 1 / (255 if own.unsigned else 127)
    if own.code == "linear":
        assert (off <= absmax.double() * (step / 2 + 2 * EPS)).all()
    else:  # half of a cell: of a number's decade at the most, whose begin is a tenth of its end
        cell, least = (0.25, 3.3e-7) if own.unsigned else (0.57, 2.8e-7)
        half = x.abs().double() * cell + absmax.double() * least
        assert (off <= half).all()
    assert (back[x == 0] == 0).all() and (back[-1] == absmax)
    assert (back >= 0).all() if own.unsigned else ((back * x.sign()) >= 0).all()


@formats
@pytest.mark.parametrize("absmax", [1e-37, 0.3, 1e37, 3.4028234e38])
def test_the_largest_comes_back_exactly(own, absmax):
    x = torch.tensor([absmax, 0.0])
    assert torch.equal(coded_and_back(own, x), x)
    if own == Int8("linear"):
        assert torch.equal(coded_and_back(own, -x), -x)


@formats
def test_zeros_are_zero(own):
    codes = torch.zeros(3, dtype=own.dtype_for(torch.float32))
    absmax = torch.tensor([0.0, 1.0, 3e38])
    for found in (own.decode(codes, absmax), own.decode(all_codes(own), torch.tensor(0.0))):
        assert torch.equal(found.abs(), torch.zeros_like(found))
    assert torch.equal(own.encode(torch.tensor([0.0, -0.0, 1e-39]), torch.tensor([0.0, 1.0, 1e-39])), codes)


def test_what_is_above_zero_does_not_become_zero():
    """As second moments are divided by; bitsandbytes' loops on CPU round small ones up too."""
    own, x = Int8("dynamic", unsigned=True), torch.tensor([1e-30, 1e-12, 1.6e-7, 0.0, 1.0])
    assert own.encode(x, torch.tensor(1.0)).tolist() == [1, 1, 1, 0, 255]


@formats
def test_what_is_not_finite_stays_visible(own):
    inf, nan = math.inf, math.nan
    assert coded_and_back(own, torch.tensor([0.0, 1.0, nan, inf])).isnan().all()
    back = coded_and_back(own, torch.tensor([0.0, 1.0, 3e38, inf]))
    assert not back.isfinite().any() and back[3] == inf
    if not own.unsigned:
        assert coded_and_back(own, torch.tensor([-inf, 1.0]))[0] == -inf


def test_names_and_bad_arguments():
    assert [Int8("linear").name, Int8("dynamic", 2048).name] == ["int8-linear", "int8-dynamic-2048"]
    assert Int8("dynamic", 64).for_squares() == Int8("dynamic", 64, unsigned=True)
    with pytest.raises(ValueError, match=r"code is 'log': it may be"):
        Int8("log")
    with pytest.raises(ValueError, match=r"block is 0: it has to be 1"):
        Int8("linear", 0)


@formats
def test_blocks_and_other_types(own):
    x = torch.rand(5, 3, 8, dtype=torch.bfloat16)
    absmax = x.abs().amax(-1, keepdim=True).float()
    codes = own.encode(x, absmax)
    assert torch.equal(codes, own.encode(x.double(), absmax))
    assert torch.equal(codes[2, 1], own.encode(x[2, 1], absmax[2, 1]))
    back = own.decode(codes, absmax, torch.float64)
    assert back.dtype == torch.float64 and torch.equal(back.float(), own.decode(codes, absmax))


def momentum(power, outliers):
    """256 x 2048 with singular values i^-power; 1% of rows and of columns are so many times as large."""
    u, v = (torch.linalg.qr(torch.randn(n, 256))[0] for n in (256, 2048))
    m = u * torch.arange(1.0, 257.0) ** -power @ v.T
    m[torch.randperm(256)[:2]] *= outliers
    m[:, torch.randperm(2048)[:20]] *= outliers
    return m


def relative_errors(m):
    """Of momentum, and of what Newton-Schulz makes of it, by code and block."""
    found = {}
    for code, block in product(("linear", "dynamic"), (256, 2048)):
        own, lines = Int8(code, block), m.reshape(256, -1, block)
        absmax = lines.abs().amax(-1, keepdim=True)
        back = own.decode(own.encode(lines, absmax), absmax).reshape(m.shape)
        pairs = (back, m), (newton_schulz(back), newton_schulz(m))
        found[code, block] = [float((got - exact).norm() / exact.norm()) for got, exact in pairs]
    return found


@pytest.mark.parametrize(
    ("power", "outliers", "least", "most"),
    [(0.5, 1, 0.008, 0.03), (1.0, 1, 0.07, 0.18), (1.0, 7, 0.19, 0.45), (1.5, 7, 0.55, 1.4)],
)
def test_errors_of_orthogonalized_momentum(power, outliers, least, most):
    """Newton-Schulz magnifies the error of momentum (1 to 4%) by as much as its spectrum is steep.

    Reported were .01 (power 1/2), .10 to .14 (1), .2 to .38 (1, outliers), above .7 (1.5, outliers). Of outliers seven
    times as large so it is here, but for .6 to 1.2 in place of "above .7".
    """
    found = relative_errors(momentum(power, outliers))
    assert all(0.005 <= of_m <= 0.04 for of_m, _ in found.values())
    after = {key: of_u for key, (_, of_u) in found.items()}
    assert all(least <= error <= most for error in after.values()), after
    if outliers == 1:
        assert max(after["linear", b] for b in (256, 2048)) < min(after["dynamic", b] for b in (256, 2048))
        assert all(after[code, 2048] <= 1.25 * after[code, 256] for code in ("linear", "dynamic"))
    else:
        assert 1.4 <= after["linear", 2048] / after["linear", 256] <= 2.0
        assert after["dynamic", 256] == pytest.approx(after["linear", 256], rel=0.15)
        assert after["dynamic", 2048] < 0.85 * after["linear", 2048]
