"""8-bit codes, traced and printed as C++, are those of torch: to the bit, of a million numbers."""

import ctypes

import pytest
import torch
from engine.test_formats import loop

from sharpwise.engine.backends import loops
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.backends.cpp_print import CPP
from sharpwise.engine.program import Arithmetic
from sharpwise.storage.int8 import Int8

FORMATS = [Int8(code, unsigned=unsigned) for code in ("linear", "dynamic") for unsigned in (False, True)]
formats = pytest.mark.parametrize("own", FORMATS, ids=lambda own: own.name + "-unsigned" * own.unsigned)
BLOCKS = 4096


def blocks(own, n=BLOCKS):
    """Blocks [n, 256] of numbers of many sizes, special ones and numbers between codes among them; their absmax."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 256, generator=generator)
    x[1::4] *= 10.0 ** (-8 * torch.rand(x[1::4].shape, generator=generator))
    if own.unsigned:
        x = x.abs()
    values = own.decode(torch.arange(256).to(own.dtype_for(torch.float32)), torch.tensor(1.0)).sort()[0]
    x[2::4] = values
    x[3::4, 1:] = (
        (values[1:] + values[:-1]) / 2 * (1 + torch.randint(-3, 4, (n // 4, 255), generator=generator) / 2**23)
    )
    x[3::4, 0] = 1.0
    x *= 10.0 ** torch.randint(-30, 30, (n, 1), generator=generator)
    inf, nan = float("inf"), float("nan")
    specials = [[0.0, -0.0], [inf, 1.0], [1.0, nan], [inf, nan], [1e-39, 1e-45], [3.4e38, -3.4e38], [2.0**-126, 1e-40]]
    x[: len(specials)] = 0.0
    x[: len(specials), :2] = torch.tensor(specials).abs() if own.unsigned else torch.tensor(specials)
    return x, x.abs().amax(1, keepdim=True)


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


def traced(own):
    kinds = {"x": torch.float32, "absmax": torch.float32}
    encode = Arithmetic.of(lambda v: {"codes": own.encode(**v)}, kinds, tiles={"x"})
    kinds = {"codes": own.dtype_for(torch.float32), "absmax": torch.float32}
    return encode, Arithmetic.of(lambda v: {"x": own.decode(**v)}, kinds, tiles={"codes"})


@formats
def test_as_cpp(own):
    if not compiler_present():
        pytest.skip("needs a C++ compiler")
    encode, decode = traced(own)
    kind = CPP.types[own.dtype_for(torch.float32)]
    source = loops.text("sums") + loop("encode", encode, {"x": "const float", "absmax": "float", "out": kind})
    source += loop("decode", decode, {"codes": f"const {kind}", "absmax": "float", "out": "float"})
    library = loops.library(source)
    x, absmax = blocks(own)
    expected = own.encode(x, absmax)
    codes, back = torch.empty_like(expected), torch.empty_like(x)
    for i in range(BLOCKS):
        scale, rows = ctypes.c_float(float(absmax[i])), [ctypes.c_void_p(t[i].data_ptr()) for t in (x, codes, back)]
        library.encode(ctypes.c_int64(256), rows[0], scale, rows[1])
        library.decode(ctypes.c_int64(256), rows[1], scale, rows[2])
    assert int((codes != expected).sum()) == 0
    assert same(back, own.decode(expected, absmax))
