"""What a format is: how one tensor rests in memory, whatever engine, rule or device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Format:
    """Base of all formats.

    A format works on tiles of a line: vectors of neighbours, as long as the engine likes. What it does to them is
    printed as C++ and Triton from a trace, so that it may use arithmetic, a maximum over the tile, comparisons,
    rounding and look-up in a constant table, and no branch. Zeros decode to zeros: so state begins.

    So far the engine takes formats of one part, a number per element, and moves by torch what is not `Dense`.
    """

    name: str

    def parts(self, compute: torch.dtype) -> dict[str, torch.dtype]:
        """Types of its tensors by name, for arithmetic in `compute`; "" is called as the state itself."""
        raise NotImplementedError

    def dtype_for(self, compute: torch.dtype) -> torch.dtype:
        """The type of its only part, for a parameter whose arithmetic runs in `compute`."""
        (dtype,) = self.parts(compute).values()
        return dtype

    def decode(self, parts: Mapping[str, Tensor], compute: torch.dtype = torch.float32) -> Tensor:
        """A tile out of its parts."""
        raise NotImplementedError

    def encode(self, x: Tensor, noise: tuple[Tensor, Any] | None = None) -> dict[str, Tensor]:
        """The parts of a tile.

        Args:
            noise: global numbers of its elements and a key, where it is to be rounded stochastically.
        """
        raise NotImplementedError
