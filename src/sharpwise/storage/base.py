"""What a format is: how one tensor rests in memory, whatever engine, rule or device."""

from typing import Any

import torch
from torch import Tensor


class Format:
    """Base of all formats: a *code* per element, and for some a number per block.

    Arithmetic of one element: it is printed as C++ and Triton from a trace, so that it may use arithmetic, comparisons,
    rounding and look-up in a constant table, and no branch. Zeros decode to zeros, whatever the block: so state begins.

    Attributes:
        block: elements of a line that share an `absmax`, the largest |x| among them, fp32; NaN if one is NaN. 0: there
            is none. A line is contiguous memory at one index of dimension 0 (0 and 1 for experts); its last block may
            be shorter.
    """

    name: str
    block: int = 0

    def for_squares(self) -> "Format":
        """The same for numbers that are never below 0."""
        return self

    def dtype_for(self, compute: torch.dtype) -> torch.dtype:
        """The type of the codes, for a parameter whose arithmetic runs in `compute`."""
        raise NotImplementedError

    def decode(self, codes: Tensor, absmax: Any = None, compute: torch.dtype = torch.float32) -> Tensor:
        """Numbers out of codes; `absmax` is a number, or broadcasts against them."""
        raise NotImplementedError

    def encode(self, x: Tensor, absmax: Any = None, noise: tuple[Tensor, Any] | None = None) -> Tensor:
        """Codes of numbers.

        Args:
            noise: global numbers of its elements and a key, where it is to be rounded stochastically.
        """
        raise NotImplementedError
