"""What a format is made of, in torch and as C++: one of the test's own, in int8 with a scale per tile and a table."""

import ctypes

import pytest
import torch

from sharpwise.engine.backends import loops
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.backends.cpp_print import CPP
from sharpwise.engine.program import Arithmetic
from sharpwise.storage.base import Format
from sharpwise.storage.dense import BF16, FP32, Dense

TABLE = torch.linspace(-1, 1, 255).pow(3)


class Cubic(Format):
    """Codes of cubes of equally spaced numbers, in units of the largest: every operation that a format may need."""

    name = "cubic"
    block = 100

    def dtype_for(self, compute):
        return torch.uint8

    def decode(self, codes, absmax=None, compute=torch.float32):
        return TABLE[codes.to(torch.int64)].to(compute) * absmax

    def encode(self, x, absmax=None, noise=None):
        whole = torch.where(absmax > 0, x / absmax, x * 0.0)
        return torch.round(127.0 + 127.0 * _cube_root(whole).clamp(-1.0, 1.0)).to(torch.uint8)


def coded(x):
    """Codes of one block, and its largest element."""
    absmax = x.abs().amax(0)
    return {"codes": Cubic().encode(x, absmax), "absmax": absmax}


def _cube_root(x):
    """By Newton's method: arithmetic alone."""
    y = torch.where(x.abs() > 0.0, torch.where(x > 0, x.abs().sqrt(), -x.abs().sqrt()), x)
    for _ in range(40):
        y = torch.where(y != 0.0, (2.0 * y + x / (y * y)) / 3.0, y)
    return y


TILES = [torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.zeros(7), torch.tensor([-3e4, 1e-3, 0.0])]


@pytest.mark.parametrize("x", TILES, ids=lambda x: f"{len(x)} elements")
def test_codes_come_back(x):
    parts = coded(x)
    assert parts["codes"].dtype == Cubic().dtype_for(torch.float32)
    assert torch.equal(parts["codes"], coded(Cubic().decode(**parts))["codes"])
    assert (Cubic().decode(**parts) - x).abs().max() <= 0.02 * x.abs().max()


def traced():
    kinds = {"x": torch.float32, "absmax": torch.float32}
    encode = Arithmetic.of(lambda v: {"codes": Cubic().encode(**v)}, kinds, tiles={"x"})
    kinds = {"codes": torch.uint8, "absmax": torch.float32}
    return encode, Arithmetic.of(lambda v: {"x": Cubic().decode(**v)}, kinds, tiles={"codes"}, constants=True)


def test_a_trace_is_the_format():
    encode, decode = traced()
    for x in TILES:
        parts = coded(x)
        assert torch.equal(encode(x=x, absmax=parts["absmax"])["codes"], parts["codes"])
        assert torch.equal(decode(**parts)["x"], Cubic().decode(**parts))


def loop(name, own, kinds):
    """A function of C++ over a tile: pointers, and `absmax` by value."""
    tables = {node.target: node.meta["val"] for node in own.graph.nodes if node.op == "get_attr"}
    numbers = [f"static const float {n}[] = {{{', '.join(map(str, t.tolist()))}}};" for n, t in tables.items()]
    inputs = {n: n if n == "absmax" else f"{n}_[i]" for n in own.inputs}
    body, found = own.printed(CPP, inputs | {n: n for n in tables})
    arguments = ", ".join(f"{kind} {n}" if n == "absmax" else f"{kind}* {n}_" for n, kind in kinds.items())
    stores = " ".join(f"out_[i] = {value};" for value in found.values())
    head = f'extern "C" void {name}(int64_t n, {arguments})'
    return f"{' '.join(numbers)}\n{head} {{\n  for (int64_t i = 0; i < n; ++i) {{\n{body}\n{stores}\n  }}\n}}\n"


@pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
def test_printed_as_cpp_it_is_the_format():
    encode, decode = traced()
    source = loops.text("sums")
    source += loop("encode", encode, {"x": "const float", "absmax": "float", "out": "uint8_t"})
    source += loop("decode", decode, {"codes": "const uint8_t", "absmax": "float", "out": "float"})
    library = loops.library(source)

    def at(tensor):
        return ctypes.c_void_p(tensor.data_ptr())

    for x in TILES:
        parts, n = coded(x), ctypes.c_int64(len(x))
        absmax = ctypes.c_float(float(parts["absmax"]))
        codes, back = torch.empty(len(x), dtype=torch.uint8), torch.empty_like(x)
        library.encode(n, at(x), absmax, at(codes))
        assert (codes.int() - parts["codes"].int()).abs().max() <= 1
        assert (codes == parts["codes"]).float().mean() >= 0.999
        library.decode(n, at(codes), absmax, at(back))
        assert torch.equal(back, Cubic().decode(codes, parts["absmax"]))


@pytest.mark.parametrize("own", [FP32, BF16], ids=lambda own: own.name)
def test_dense_formats(own):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert own.dtype_for(torch.float32) == own.dtype
    assert torch.equal(own.decode(own.encode(x)), x.to(own.dtype).float())
    assert Dense.of(own.dtype) == own
    index = torch.arange(1000)
    noisy = own.encode(x, noise=(index, 5))
    assert torch.equal(noisy, x) if own is FP32 else not torch.equal(noisy, x.bfloat16())


def test_a_table_in_a_rule_is_refused():
    with pytest.raises(NotImplementedError, match="comes from elsewhere"):
        Arithmetic.of(lambda v: {"y": v["x"] * TABLE[0]}, {"x": torch.float32})
