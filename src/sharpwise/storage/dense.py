"""Dense storage: one number per element in fp32 or bf16, and rounding by hash.

Stochastic rounding to bf16 adds a uniform 16-bit number to the mantissa bits that are cut off, so that the mean of
the rounded value is the value. The number is a hash of (seed, step, tensor, global element index): the same whatever
the shards, compiled or not, resumed or not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpwise.storage.base import Format

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Dense(Format):
    """One number per element, in one floating-point type. fp64 parameters keep fp64 state under `fp32`."""

    name: str
    dtype: torch.dtype

    @staticmethod
    def of(dtype: torch.dtype) -> "Dense":
        """The format of a tensor of a type: a weight, say."""
        return {torch.float32: FP32, torch.bfloat16: BF16}.get(dtype) or Dense(str(dtype).removeprefix("torch."), dtype)

    @staticmethod
    def stores(tensor: Tensor, storage: Format) -> Format:
        """The format of a state tensor of an optimizer with this storage: of numbers as they are, their own type's, as
        users may have put them there."""
        return Dense.of(tensor.dtype) if type(storage) is Dense else storage

    def parts(self, compute: torch.dtype) -> dict[str, torch.dtype]:
        return {"": compute if self.dtype == torch.float32 else self.dtype}

    def decode(self, parts: Mapping[str, Tensor], compute: torch.dtype = torch.float32) -> Tensor:
        return parts[""].to(compute)

    def encode(self, x: Tensor, noise: tuple[Tensor, Any] | None = None) -> dict[str, Tensor]:
        index, key = noise or (None, 0)
        return {"": round_to(x, self.dtype, index, key)}


FP32 = Dense("fp32", torch.float32)
BF16 = Dense("bf16", torch.bfloat16)


def mix(x: Any) -> Any:
    """A 32-bit finalizer of two multiplications; for ints and int64 tensors, whose products stay below 2**63.

    >>> mix(1) != mix(2) and 0 <= mix(12345) < 2**32
    True
    """
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def step_key(step: Any, seed: int) -> Any:
    """The part of the key that all tensors have of a step; that of a tensor is the sum with its own, in 32 bits."""
    return (step * 0x9E3779B1 + seed * 0x85EBCA6B) & _MASK


def round_to(x: Tensor, dtype: torch.dtype, index: Tensor | None, key: Any) -> Tensor:
    """x in `dtype`: to nearest, or stochastically when `index` (global element numbers, int64) is given.

    Only bf16 is ever rounded stochastically; infinities and NaN pass through.
    """
    if index is None or dtype != torch.bfloat16:
        return x.to(dtype)
    noise = mix(index ^ key ^ ((index >> 32) * 0x5BD1E995)) & 0xFFFF
    bits = (x.float().view(torch.int32).to(torch.int64) & _MASK) + noise
    bits = bits & 0xFFFF0000
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    return torch.where(torch.isfinite(x), bits.view(torch.float32), x.float()).to(dtype)
