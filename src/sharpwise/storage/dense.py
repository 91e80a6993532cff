"""Dense storage: one number per element in fp32 or bf16, and rounding by hash.

Stochastic rounding to bf16 adds a uniform 16-bit number to the mantissa bits that are cut off, so that the mean of
the rounded value is the value. The number is a hash of (seed, step, tensor, global element index): the same whatever
the shards, compiled or not, resumed or not.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpwise.storage.base import Format

_MASK = 0xFFFFFFFF
STEP_FACTOR, SEED_FACTOR = 0x9E3779B1, 0x85EBCA6B
"""Of the number of the step and of the seed in a key."""


@dataclass(frozen=True)
class Dense(Format):
    """One number per element, in one floating-point type. fp64 parameters keep fp64 state under `fp32`."""

    name: str
    dtype: torch.dtype

    @staticmethod
    def of(dtype: torch.dtype) -> "Dense":
        """The format of a tensor of a type: a weight, say."""
        return {torch.float32: FP32, torch.bfloat16: BF16}.get(dtype) or Dense(str(dtype).removeprefix("torch."), dtype)

    def dtype_for(self, compute: torch.dtype) -> torch.dtype:
        return compute if self.dtype == torch.float32 else self.dtype

    def decode(self, codes: Tensor, absmax: Any = None, compute: torch.dtype = torch.float32) -> Tensor:
        return codes.to(compute)

    def encode(self, x: Tensor, absmax: Any = None, noise: tuple[Tensor, Any] | None = None) -> Tensor:
        index, key = noise or (None, 0)
        return round_to(x, self.dtype, index, key)


FP32 = Dense("fp32", torch.float32)
"""One fp32 number per element: what optimizers keep unless told otherwise."""
BF16 = Dense("bf16", torch.bfloat16)
"""One bf16 number per element, rounded to nearest or stochastically."""


def mix(x: Any) -> Any:
    """A 32-bit finalizer of two multiplications; for ints and int64 tensors, whose products stay below 2**63, and for
    int32 tensors, which wrap: the same bits, of which the highest is the sign.

    >>> mix(1) != mix(2) and 0 <= mix(12345) < 2**32
    True
    """
    mask = -1 if isinstance(x, Tensor) and x.dtype == torch.int32 else _MASK
    x = x & mask
    x = ((x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD) & mask
    x = ((x ^ ((x >> 15) & 0x1FFFF)) * 0x735A2D97) & mask
    return x ^ ((x >> 15) & 0x1FFFF)


def step_key(step: Any, seed: int) -> Any:
    """The part of the key that all tensors have of a step; that of a tensor is the sum with its own, in 32 bits."""
    return (step * STEP_FACTOR + seed * SEED_FACTOR) & _MASK


def round_to(x: Tensor, dtype: torch.dtype, index: Tensor | None, key: Any) -> Tensor:
    """x in `dtype`: to nearest, or stochastically when `index` (global element numbers, int64) is given.

    Only bf16 is ever rounded stochastically; infinities and NaN pass through.
    """
    if index is None or dtype != torch.bfloat16:
        return x.to(dtype)
    # In int32, of which a GPU does several times as many as of int64.
    key = key.to(torch.int32) if isinstance(key, Tensor) else (key + 2**31) % 2**32 - 2**31
    noise = mix(index.to(torch.int32) ^ key ^ (index >> 32).to(torch.int32) * 0x5BD1E995) & 0xFFFF
    x = x.float()
    bits = x.view(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return torch.where(finite, ((bits + noise) & -0x10000).view(torch.float32), x).to(dtype)
