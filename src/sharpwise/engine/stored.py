"""A tensor of state, or a weight, as it rests in memory: codes, and what the blocks of its lines share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sharpwise.storage import Dense, Format

ABSMAX = "_absmax"
"""What the name of a state tensor is followed by for the largest element of each of its blocks."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic is fp32 whatever the parameter's type; only fp64 parameters are moved in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Line(NamedTuple):
    """Lines of a tensor: contiguous memory at one index of its first `lead` dimensions.

    Attributes:
        begin, columns: what is held of one here; length: of a whole one.
    """

    lead: int
    begin: int
    columns: int
    length: int

    def blocks(self, size: int) -> int:
        """Of a whole one."""
        return -(-self.length // size)


class Stored(NamedTuple):
    """A tensor in a format, or some rows of it.

    Attributes:
        codes: [..., columns]; absmax: [..., blocks of a whole line], None for a format without.
        begin: the first of the columns held here, in the whole line.
    """

    format: Format
    codes: Tensor
    absmax: Tensor | None = None
    begin: int = 0

    @staticmethod
    def dense(tensor: Tensor) -> "Stored":
        """Numbers as they are."""
        return Stored(Dense.of(tensor.dtype), tensor)

    @property
    def parts(self) -> list[Tensor]:
        """Its tensors."""
        return [self.codes] if self.absmax is None else [self.codes, self.absmax]

    def piece(self, rows: Any) -> "Stored":
        """Some of it, along the first dimension: views."""
        return self._replace(codes=self.codes[rows], absmax=None if self.absmax is None else self.absmax[rows])

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The numbers."""
        return self.format.decode(self.codes, self._by_column(self.absmax), dtype)

    def encode(self, x: Tensor, noise: tuple[Tensor, Any] | None = None, absmax: Tensor | None = None) -> "Stored":
        """Numbers of the same shape in the same format.

        Args:
            absmax: of the blocks of whole lines, where these are not all held here.
        """
        if self.absmax is None:
            return self._replace(codes=self.format.encode(x, None, noise))
        absmax = self.measured(x) if absmax is None else absmax
        return self._replace(codes=self.format.encode(x, self._by_column(absmax), noise), absmax=absmax)

    def measured(self, x: Tensor) -> Tensor:
        """The largest |x| in each block of whole lines, 0 where nothing of a block is held here."""
        assert self.absmax is not None
        size, count = self.format.block, self.absmax.shape[-1]
        # Not -x.shape[-1] % size on the right: whole lines, of which other processes hold the rest.
        padded = pad(x.abs(), (self.begin, size * count - self.begin - x.shape[-1]))
        return padded.unflatten(-1, (count, size)).amax(-1).to(self.absmax.dtype)

    def copy_(self, new: "Stored", ok: Any = True) -> None:
        """Take over what another one holds, where `ok`."""
        for target, value in zip(self.parts, new.parts, strict=True):
            target.copy_(value if ok is True else torch.where(ok, value, target))

    def _by_column(self, absmax: Tensor | None) -> Tensor | None:
        """One number per block -> one per column held here."""
        if absmax is None:
            return None
        columns = torch.arange(self.begin, self.begin + self.codes.shape[-1], device=self.codes.device)
        return absmax[..., columns // self.format.block]
