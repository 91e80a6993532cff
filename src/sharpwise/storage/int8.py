"""8 bits per element, and the largest magnitude of each block in fp32.

Linear: "On quantizing the state of the Muon optimizer", arXiv 2509.23106. Dynamic: Dettmers et al.,
"8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; values as in bitsandbytes. With y = |x| / absmax,

    linear    code = round(127 y) with the sign of x; x' = code / 127 absmax; unsigned 255 for 127
    dynamic   x' = v absmax, v the nearest of 0, 1 and 10^(i-7) (9 (n + j + 1/2) - 8 n) / n with both signs, where
              i = 0..6 is a decade, n = 2^i its number of cells, j = 0..n-1; unsigned n = 2^(i+1)

Dynamic magnitudes are numbered in order: v of decade i is number k = n + j (unsigned: one less), 1 the last. Each way
what is small is scaled up to the last decades, and one line serves all:

    v = 10^(i-6) (0.9 (k + 1/2) / n - 0.8), where n is the power of two below k
    k = f cut to a whole number, f = (8 + 10^(7-i) y) n / 9

Corrected is where cells are not of one size: from a decade's begin at f = n to n + 1/5 the last value of the decade
below is nearer (in the first decade 0, to half of its first value); in the last quarter of the last cell 1 is.

Departs: dynamic codes are rotated, so that zeros mean zero: 0 is 0, 1 to 128 the positive, 255 down to 129 the negative
numbers. Unsigned ones of what is above 0 are at least 1: a second moment that is rounded to 0 stays there while a row
has no gradient, and its momentum, divided by eps alone, moves it by thousands of lr. No stochastic rounding: of
momentum it made the error of a step 1.4 times as large.
"""

import struct
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sharpwise.storage.base import Format

_SMALLEST = 2.0**-126
"""The smallest normal fp32: the reciprocal of a smaller number may be infinite."""
_BITS_OF_1 = 0x3F800000
_MOST, _SIGN = 0x7FFFFFFF, -(2**31)
"""All bits but that of the sign, and that."""


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
        if self.code == "dynamic":
            return _values(codes.to(torch.int32), absmax, self.unsigned).to(compute)
        return (codes.to(torch.float32) * (1 / (255 if self.unsigned else 127)) * absmax).to(compute)

    def encode(self, x: Tensor, absmax: Any = None, noise: tuple[Tensor, Any] | None = None) -> Tensor:
        # To the nearest: noise is not used.
        x = x.to(torch.float32)
        inverse = torch.where(absmax >= _SMALLEST, absmax.reciprocal(), absmax * 0.0)
        if self.code == "dynamic":
            return _numbers(x, inverse, self.unsigned).to(torch.uint8)
        # Of infinity / infinity and NaN this is 1: what becomes a whole number is always a number.
        y = (_bits(x * inverse) & _MOST).clamp(0, _BITS_OF_1).view(torch.float32)
        codes = (y * (255.0 if self.unsigned else 127.0)).round().to(torch.int32)
        codes = codes if self.unsigned else torch.where(x < 0.0, -codes, codes)
        return codes.to(self.dtype_for(torch.float32))


# Of a condition that is used again after other arithmetic GCC makes two paths, in twice the time.


def _values(codes: Tensor, absmax: Tensor, unsigned: bool) -> Tensor:
    """Numbers of dynamic codes (int32), within 3 ulps (20 if absmax is below 1e-36). A look-up would need a table."""
    unit = 2.0**-16 if unsigned else 2.0**-15  # decade 0 begins at 2^-15: absmax is scaled by little
    c = (codes + _bits_of(2.0**23 * unit)).view(torch.float32)  # code and 2^23, in units
    left = (2.0**23 + 128) * unit - c
    k = c - (2.0**23 - 1.5) * unit if unsigned else 128.5 * unit - left.abs()
    levels = []
    for decades in (4, 2, 1):
        levels.append((k >= 2.0 ** (decades - 15), 10.0**decades))
        k = (_bits(k) & ~(decades << 23)).view(torch.float32)  # 2^decades times as small if it is above
    v = _bits(k - 8 / 9 * 2.0**-15).clamp(0, _MOST).view(torch.float32)  # the code 0 is below
    for above, power in levels:
        v = torch.where(above, v * power, v)
    x = v * (absmax * (0.9e-6 * 2.0**15))
    x = torch.where(absmax < x, absmax, x)  # the last number; NaN stays
    return x if unsigned else (_bits(x) ^ (_bits(left) & _SIGN)).view(torch.float32)


def _numbers(x: Tensor, inverse: Tensor, unsigned: bool) -> Tensor:
    """Dynamic codes (int32, negative ones below 0) of x; `inverse` is 1 / absmax."""
    n = 128.0 if unsigned else 64.0
    y = (bits := _bits(x * inverse) & _MOST).view(torch.float32)
    one = inverse * 0.0 + 1.0  # which a compiler does not know: of constants it would select among four
    cells, times = one * (n / 0.9), one * 100.0
    below = y < 1e-4
    y, cells = torch.where(below, y * 1e4, y), torch.where(below, cells * 0.0625, cells)
    if not unsigned:  # half of the smallest value becomes n + 1/5; more of its decade is not told apart
        times = torch.where(below, times * (2.8 / 2.75), times)
    below = y < 1e-2
    y, cells = torch.where(below, y * times, y), torch.where(below, cells * 0.25, cells)
    # Two decades are left: the lower has the smaller line where it holds.
    f = _smaller(_bits(y + 0.8), _bits(y * 5.0 + 0.4)).view(torch.float32) * cells
    begin = (_bits(f) & 0x7F800000).view(torch.float32)  # the power of two below
    f = torch.where(f - begin < 0.2, f - 0.5, f)
    # Of infinity / infinity and NaN too: what becomes a whole number is always a number.
    f = f.masked_fill(bits >= _bits_of(1 - 0.225 / n), 2 * n)
    if unsigned:
        return _larger((f - 1.0).to(torch.int32), bits.clamp(0, 1))  # as integers, without a comparison
    return ((_bits(x) & _SIGN) ^ _bits(f)).view(torch.float32).to(torch.int32).clamp(-127, _MOST)  # there is no -1


def _bits(x: Tensor) -> Tensor:
    """fp32 as int32: in the same order unless negative, NaN last. GPUs have the smaller of two in one instruction."""
    return x.view(torch.int32)


def _bits_of(x: float) -> int:
    return int(struct.unpack("i", struct.pack("f", x))[0])


def _smaller(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a < b, a, b)


def _larger(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > b, a, b)
