"""8 bits per element, and the largest magnitude of each block in fp32.

Linear: "On quantizing the state of the Muon optimizer", arXiv 2509.23106. Dynamic: Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; values as in bitsandbytes. With y = |x| / absmax,

    linear    code = round(127 y) with the sign of x; x' = code / 127 absmax; unsigned 255 for 127
    dynamic   x' = v absmax, v the nearest of 0, 1 and 10^(i-7) (9 (n + j + 1/2) - 8 n) / n with both signs, where
              i = 0..6 is a decade, n = 2^i its number of cells, j = 0..n-1; unsigned n = 2^(i+1)

Dynamic magnitudes are numbered in order: v of decade i is number n + j (unsigned: one less), 1 the last. The line
through a decade's values is steeper than that of the decade below, and they meet at its end: the largest of all lines
is the value, and the smallest of the inverse lines f_i(y) = (8 + 10^(7-i) y) n / 9, cut to a whole number, is the
number. Corrected is where cells are not of one size: from a decade's begin at f = n to n + 1/5 the last value of the
decade below is nearer; in the last quarter of the last cell 1 is.

Departs: dynamic codes are rotated, so that zeros mean zero: 0 is 0, 1 to 128 the positive, 255 down to 129 the negative
numbers. Unsigned ones of what is above 0 are at least 1: a second moment that is rounded to 0 stays there while a row
has no gradient, and its momentum, divided by eps alone, moves it by thousands of lr. No stochastic rounding: of
momentum it made the error of a step 1.4 times as large.
"""

from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sharpwise.storage.base import Format

_SMALLEST = 2.0**-126
"""The smallest normal fp32: the reciprocal of a smaller number may be infinite."""
_BITS_OF_1 = 0x3F800000
_DECADES = range(7)


@dataclass(frozen=True)
class Int8(Format):
    """8-bit codes with an absmax per block.

    Zeros stay zeros, and the largest magnitude of a block comes back exactly (dynamic: if it is positive, as there is
    no -1). A block with NaN comes back as NaN, one with infinities as these and NaN. A block whose absmax is below
    2^-126 comes back as zeros.

    Args:
        code: "linear" (int8; unsigned: uint8) or "dynamic" (uint8).
        block: elements of a line that share an absmax.
        unsigned: nothing is below zero, as of second moments: the codes of negative numbers refine the positive.

    Raises:
        ValueError: `code` is another word, or `block` is below 1.
    """

    name: str = field(init=False)
    code: Literal["linear", "dynamic"]
    block: int = 256
    unsigned: bool = False

    def __post_init__(self) -> None:
        if self.code not in ("linear", "dynamic"):
            raise ValueError(f'code is {self.code!r}: it may be "linear" or "dynamic"')
        if self.block < 1:
            raise ValueError(f"block is {self.block}: it has to be 1 or more elements")
        object.__setattr__(self, "name", f"int8-{self.code}" + f"-{self.block}" * (self.block != 256))

    @staticmethod
    def named(name: str) -> "Int8 | None":
        """The format of a name; None if it is of none."""
        before, code, size = (*name.split("-"), "256")[:3] if name.count("-") in (1, 2) else ("", "", "")
        fits = before == "int8" and code in ("linear", "dynamic") and size.isdecimal() and int(size) > 0
        return Int8(cast(Any, code), int(size)) if fits else None

    def for_squares(self) -> "Int8":
        return replace(self, unsigned=True)

    def dtype_for(self, compute: torch.dtype) -> torch.dtype:
        return torch.int8 if self.code == "linear" and not self.unsigned else torch.uint8

    def decode(self, codes: Tensor, absmax: Any = None, compute: torch.dtype = torch.float32) -> Tensor:
        c = codes.to(torch.float32)
        unit = _values(c, self.unsigned) if self.code == "dynamic" else c * (1 / (255 if self.unsigned else 127))
        return (unit * absmax).to(compute)

    def encode(self, x: Tensor, absmax: Any = None, noise: tuple[Tensor, Any] | None = None) -> Tensor:
        # To the nearest: noise is not used.
        x = x.to(torch.float32)
        inverse = torch.where(absmax >= _SMALLEST, absmax.reciprocal(), absmax * 0.0)
        # Of infinity / infinity and NaN this is 1: what becomes a whole number is always a number.
        bits = (_bits(x * inverse) & 0x7FFFFFFF).clamp(0, _BITS_OF_1)
        y = bits.view(torch.float32)
        if self.code == "dynamic":
            below, above = _numbers(y, self.unsigned)
            if self.unsigned:
                above = _larger(above, bits.clamp(0, 1))  # as integers, without a comparison
        else:
            below = above = (y * (255.0 if self.unsigned else 127.0)).round().to(torch.int32)
        codes = above if self.unsigned else torch.where(x < 0.0, -below, above)
        return codes.to(self.dtype_for(torch.float32))


def _values(codes: Tensor, unsigned: bool) -> Tensor:
    """Dynamic values of codes (fp32), within an ulp: all is exact but for one product. A look-up takes a CPU twice as
    long, and the kernels a table."""
    nine = 9.0 * (codes if unsigned else 128.0 - (codes - 128.0).abs())
    lines = [(nine + (4.5 - 8 * n + 9 * unsigned)) * (1 / (10.0 ** (7 - i) * n)) for i, n in _cells(unsigned)]
    v = reduce(_larger, map(_bits, lines)).clamp(0, _BITS_OF_1).view(torch.float32)
    return v if unsigned else torch.where(codes > 128.0, -v, v)


def _numbers(y: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
    """Numbers (int32) of the dynamic magnitudes nearest to y in [0, 1]: without 1 (there is no -1), and with it."""
    lines = []
    for i, n in _cells(unsigned):
        slope, offset = 10.0 ** (7 - i) * n / 9, 8 / 10.0 ** (7 - i)
        if i == 0:  # half of the smallest value is n + 1/5 too, and the end of its cell n + 1
            half, end = 1e-7 * (0.5 + 2.25 / n), 1e-7 * (1 + 9 / n)
            slope = 0.8 / (end - half)
            offset = (n + 1) / slope - end
        lines.append(_bits((y + offset) * slope))
    least = reduce(_smaller, lines)
    f, begin = least.view(torch.float32), (least & 0x7F800000).view(torch.float32)  # the power of two below
    below = torch.where(f - begin < 0.2, f - 0.5, f).to(torch.int32)
    last = 256.0 if unsigned else 128.0
    above = below + (f * (1 / (last - 0.25))).to(torch.int32)  # a comparison here keeps GCC from using vectors
    return (below - 1, above - 1) if unsigned else (below, above)


def _bits(x: Tensor) -> Tensor:
    """fp32 as int32: in the same order unless negative, NaN last. GPUs have the smaller of two in one instruction."""
    return x.view(torch.int32)


def _cells(unsigned: bool) -> list[tuple[int, int]]:
    """Decades, and how many cells each has."""
    return [(i, 2 ** (i + unsigned)) for i in _DECADES]


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, a, b)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > b, a, b)
