"""What every format must do: a part of the battery in `sharpwise.testing`."""

import math
from typing import Any

import torch
from torch import Tensor

from sharpwise.storage.base import Format
from sharpwise.storage.dense import Dense, round_to

_PLACE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
"""Whatever the defaults are."""


def check_storage(storage: Format) -> None:
    """Zero is exactly zero, and what is stored is stored again as it is.

    Of floating point, rounding is within one unit in the last place, and unbiased if stochastic; of blocks, the largest
    is kept, zeros decode to zeros whatever it is, and no number is NaN where one in its block is.
    """
    numbers = torch.randn(4096, generator=torch.Generator("cpu").manual_seed(0), **_PLACE)
    x = torch.cat((torch.zeros(3, **_PLACE), numbers))
    if isinstance(storage, Dense):
        _check_dense(storage, x)
        return
    for own, values in ((storage, x), (storage.for_squares(), x * x)):
        absmax = values.abs().max() if storage.block else None
        codes = own.encode(values, absmax)
        assert codes.dtype == own.dtype_for(torch.float32)
        back = own.decode(codes, absmax)
        assert (back[:3] == 0).all() and not own.decode(torch.zeros_like(codes), absmax).any()
        assert torch.equal(own.encode(back, absmax), codes), "what is stored changes when it is stored again"
        if absmax is not None:
            assert not own.decode(torch.zeros_like(codes), absmax * 0).any()
            assert own.decode(codes, absmax * math.nan).isnan().all(), "NaN became numbers"


def _check_dense(storage: Dense, x: Tensor) -> None:
    dtype = storage.dtype_for(torch.float32)
    stored = round_to(x, dtype, None, 0)
    assert (stored[:3] == 0).all() and torch.equal(round_to(stored.float(), dtype, None, 0), stored)
    step = torch.finfo(dtype).eps
    assert ((stored.float() - x).abs() <= x.abs() * step / 2 + 1e-30).all(), "rounding is off by more than half a unit"
    index = torch.arange(len(x), device="cpu")
    noisy = [round_to(x, dtype, index, key).float() for key in range(256)]
    assert all(((n - x).abs() <= x.abs() * step + 1e-30).all() for n in noisy), "off by more than a unit"
    mean = torch.stack(noisy).double().mean(0)
    assert ((mean - x).abs() <= x.abs() * step * 0.5 * 5 / 16 + 1e-30).all(), "stochastic rounding is biased"
