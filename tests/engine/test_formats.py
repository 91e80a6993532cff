"""What a format is made of, in torch and as C++: one of the test's own, in int8 with a scale per tile and a table."""

import ctypes

import pytest
import torch

from sharpwise.engine.backends import loops
from sharpwise.engine.backends.base import compiler_present
from sharpwise.engine.program import Arithmetic
from sharpwise.storage.base import Format
from sharpwise.storage.dense import BF16, FP32, Dense

TABLE = torch.linspace(-1, 1, 255).pow(3)


class Cubic(Format):
    """Codes of cubes of equally spaced numbers, in units of the largest: every operation that int8 needs."""

    name = "cubic"

    def parts(self, compute):
        return {"codes": torch.uint8, "scale": torch.float32}

    def decode(self, parts, compute=torch.float32):
        return TABLE[parts["codes"].to(torch.int64)].to(compute) * parts["scale"]

    def encode(self, x, noise=None):
        scale = x.abs().amax(0)
        return {"codes": _codes(x, scale), "scale": scale}


def _codes(x, scale):
    whole = torch.where(scale > 0, x / scale, x * 0.0)
    return torch.round(127.0 + 127.0 * _cube_root(whole).clamp(-1.0, 1.0)).to(torch.uint8)


def _cube_root(x):
    """By Newton's method: arithmetic alone."""
    y = torch.where(x.abs() > 0.0, torch.where(x > 0, x.abs().sqrt(), -x.abs().sqrt()), x)
    for _ in range(40):
        y = torch.where(y != 0.0, (2.0 * y + x / (y * y)) / 3.0, y)
    return y


TILES = [torch.randn(1000, generator=torch.Generator().manual_seed(0)), torch.zeros(7), torch.tensor([-3e4, 1e-3, 0.0])]


@pytest.mark.parametrize("x", TILES, ids=lambda x: f"{len(x)} elements")
def test_codes_come_back(x):
    parts = Cubic().encode(x)
    assert {name: t.dtype for name, t in parts.items()} == Cubic().parts(torch.float32)
    again = Cubic().encode(Cubic().decode(parts))
    assert torch.equal(parts["codes"], again["codes"])
    assert (Cubic().decode(parts) - x).abs().max() <= 0.02 * x.abs().max()


def traced():
    encode = Arithmetic.of(lambda v: Cubic().encode(v["x"]), {"x": torch.float32}, tiles={"x"})
    decode = Arithmetic.of(
        lambda v: {"x": Cubic().decode(v)}, Cubic().parts(torch.float32), tiles={"codes"}, constants=True
    )
    return encode, decode


def test_a_trace_is_the_format():
    encode, decode = traced()
    for x in TILES:
        parts = Cubic().encode(x)
        found = encode(x=x)
        assert torch.equal(found["codes"], parts["codes"])
        assert torch.equal(found["scale"], parts["scale"])
        assert torch.equal(decode(**parts)["x"], Cubic().decode(parts))


def loop(name, own, kinds):
    """A function of C++ over a tile: pointers, and `scale` by value."""
    tables = {node.target: node.meta["val"] for node in own.graph.nodes if node.op == "get_attr"}
    numbers = [f"static const float {n}[] = {{{', '.join(map(str, t.tolist()))}}};" for n, t in tables.items()]
    inputs = {n: n if n == "scale" else f"{n}_[i]" for n in own.inputs}
    body, found = own.printed(loops.CPP, inputs | {n: n for n in tables})
    arguments = ", ".join(f"{kind} {n}" if n == "scale" else f"{kind}* {n}_" for n, kind in kinds.items())
    stores = " ".join(f"out_[i] = {value};" for value in found.values())
    head = f'extern "C" void {name}(int64_t n, {arguments})'
    return f"{' '.join(numbers)}\n{head} {{\n  for (int64_t i = 0; i < n; ++i) {{\n{body}\n{stores}\n  }}\n}}\n"


@pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler")
def test_printed_as_cpp_it_is_the_format():
    encode = Arithmetic.of(
        lambda v: {"codes": _codes(v["x"], v["scale"])}, {"x": torch.float32, "scale": torch.float32}, tiles={"x"}
    )
    decode = traced()[1]
    source = loops._text("sums")
    source += loop("encode", encode, {"x": "const float", "scale": "float", "out": "uint8_t"})
    source += loop("decode", decode, {"codes": "const uint8_t", "scale": "float", "out": "float"})
    library = loops._built(source)

    def at(tensor):
        return ctypes.c_void_p(tensor.data_ptr())

    for x in TILES:
        parts, n = Cubic().encode(x), ctypes.c_int64(len(x))
        scale = ctypes.c_float(float(parts["scale"]))
        codes, back = torch.empty(len(x), dtype=torch.uint8), torch.empty_like(x)
        library.encode(n, at(x), scale, at(codes))
        assert (codes.int() - parts["codes"].int()).abs().max() <= 1
        assert (codes == parts["codes"]).float().mean() >= 0.999
        library.decode(n, at(codes), scale, at(back))
        assert torch.equal(back, Cubic().decode({"codes": codes, "scale": parts["scale"]}))


@pytest.mark.parametrize("own", [FP32, BF16], ids=lambda own: own.name)
def test_dense_formats(own):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert own.parts(torch.float32) == {"": own.dtype}
    assert torch.equal(own.decode(own.encode(x)), x.to(own.dtype).float())
    assert Dense.of(own.dtype) == own
    index = torch.arange(1000)
    noisy = own.encode(x, (index, 5))[""]
    assert torch.equal(noisy, x) if own is FP32 else not torch.equal(noisy, x.bfloat16())


def test_a_table_in_a_rule_is_refused():
    with pytest.raises(NotImplementedError, match="comes from elsewhere"):
        Arithmetic.of(lambda v: {"y": v["x"] * TABLE[0]}, {"x": torch.float32})
