"""A segment: the part of one parameter that has one role, and how it is cut into blocks."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from sharpwise.blocks.names import IN_LAYER
from sharpwise.blocks.roles import BLOCK_TYPE, HIDDEN, BlockType, Role

Cut = Literal["element", "row", "head", "tensor", "layer", "role", "model"]
CUTS: tuple[Cut, ...] = get_args(Cut)
SPANNING: tuple[Cut, ...] = ("layer", "role", "model")
"""Cuts whose blocks span parameters."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Equally spaced ranges of output rows of one parameter, all of one role.

    An *output row* is one index along `dim`, with everything that feeds that output: a row of a Linear weight
    (`dim=0`), a column of a Hugging Face Conv1D weight (`dim=1`), one element of a bias or norm.

    Args:
        name: canonical fully qualified name of the parameter (no wrapper prefixes).
        shape: shape of the whole parameter.
        role: what these rows do.
        layer: index of the transformer layer, None outside the stack.
        dim: the output dimension of the parameter.
        start, length, stride, count: the rows `start + i*stride + j` for i < count, j < length, in that order.
            `length=-1` means all rows.
        heads: how many attention heads the rows hold (q, k, v), else None. Rows divide evenly among them, in order.
        stacked: the leading dimension counts stacked copies (experts), each cut on its own; then `dim` >= 1.
        merged: all dimensions up to `dim` count the output rows, as of [4, width, width] with queries, keys, values
            and output, which has 4 width of them.
        bias: a vector that is added; it has the role of its matrix.
        source: who says so: a family ("gpt2"), "override", or "" when no source explains the parameter.
        tied: other names of the same tensor.
        frozen: it required no gradient when the map was made; only maps with `include_frozen` have such segments.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = Role.OTHER
    layer: int | None = None
    dim: int = 0
    start: int = 0
    length: int = -1
    stride: int = 0
    count: int = 1
    heads: int | None = None
    stacked: bool = False
    merged: bool = False
    bias: bool = False
    source: str = ""
    tied: tuple[str, ...] = ()
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.shape and not 0 <= self.dim < len(self.shape):
            raise ValueError(f"{self.name}: dim={self.dim} is not a dimension of shape {self.shape}")
        out = self.output_size
        if self.length < 0:
            object.__setattr__(self, "length", out)
        if self.stride == 0:
            object.__setattr__(self, "stride", self.length)
        if self.stacked and self.dim == 0:
            raise ValueError(
                f"{self.name}: a stacked parameter has its copies along dimension 0, got dim=0; say dim=1 or more"
            )
        if self.merged and (self.dim == 0 or self.stacked):
            raise ValueError(
                f"{self.name}: merged rows run over the dimensions up to dim, got dim={self.dim}, "
                f"stacked={self.stacked}; say dim=1 or more, stacked=False"
            )
        end = self.start + (self.count - 1) * self.stride + self.length
        if self.start < 0 or self.count < 1 or end > out or (self.count > 1 and self.stride < self.length):
            raise ValueError(
                f"{self.name}: ranges start={self.start} length={self.length} stride={self.stride} "
                f"count={self.count} do not fit {out} output rows"
            )
        if self.heads is not None and (self.heads < 1 or self.rows % self.heads):
            raise ValueError(f"{self.name}: {self.rows} {self.role} rows do not divide into {self.heads} heads")

    @property
    def block_type(self) -> BlockType:
        """The paper's block type."""
        return BLOCK_TYPE[self.role]

    @property
    def output_size(self) -> int:
        """Output rows of the whole parameter (of one copy, if stacked)."""
        return math.prod(self.shape[self.first_dim : self.dim + 1])

    @property
    def first_dim(self) -> int:
        """The first of the dimensions that count the output rows; `dim` is the last."""
        return 0 if self.merged else self.dim

    @property
    def geometry(self) -> tuple[object, ...]:
        """What all segments of a parameter have in common: its shape, and where its rows are."""
        return self.shape, self.dim, self.stacked, self.merged

    @property
    def is_matrix(self) -> bool:
        """Whether its output rows are vectors: not so of norms and biases."""
        return not self.bias and len(self.shape) - self.stacked >= 2

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix of attention or MLP, with more than one row and column."""
        two = self.is_matrix and len(self.inputs) == 1
        return two and self.role in HIDDEN and min(self.rows, self.shape[self.inputs[0]]) > 1

    @property
    def copies(self) -> int:
        """Stacked copies (experts), 1 if not stacked."""
        return self.shape[0] if self.stacked else 1

    @property
    def rows(self) -> int:
        """Output rows in this segment (of one copy, if stacked)."""
        return self.length * self.count

    @property
    def numel(self) -> int:
        """Elements in this segment."""
        out = self.output_size
        return math.prod(self.shape) // out * self.rows if out else 0

    @property
    def whole(self) -> bool:
        """Whether the segment is the whole parameter."""
        return self.rows == self.output_size

    def row_index(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Indices of the rows along `first_dim` of `as_rows`, in segment order: int64 tensor [rows]."""
        begin = self.start + self.stride * torch.arange(self.count, device=device)
        return (begin[:, None] + torch.arange(self.length, device=device)[None, :]).reshape(-1)

    # -- of tensors of the whole parameter --------------------------------------------------------------------------

    @property
    def inputs(self) -> list[int]:
        """Dimensions of the parameter that are neither output rows nor stacked copies."""
        own = range(self.first_dim, self.dim + 1)
        return [d for d in range(len(self.shape)) if d not in own and not (self.stacked and d == 0)]

    def as_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole parameter with all output rows along its dimension `first_dim`: itself unless `merged`."""
        return tensor.flatten(0, self.dim) if self.merged else tensor

    def rows_in(self, region: Sequence[slice]) -> slice:
        """The output rows of the whole parameter that a region of it holds, or holds a part of.

        Raises:
            ValueError: rows that are `merged` do not lie together in it.
        """
        if not self.merged:
            return region[self.dim]
        outer, inner = region[0], self.shape[1 : self.dim + 1]
        if any((part.start, part.stop) != (0, n) for part, n in zip(region[1:], inner, strict=False)):
            raise ValueError(
                f"{self.name}: a mesh cuts the matrices of shape {self.shape} inside; shard it along dimension 0"
            )
        return slice(outer.start * math.prod(inner), outer.stop * math.prod(inner))

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of the segment out of the whole parameter, a view where they lie at equal distances."""
        tensor = self.as_rows(tensor)
        if not self.shape or (self.whole and self.count == 1):
            return tensor
        if self.count == 1 or self.stride == self.length:
            return tensor.narrow(self.first_dim, self.start, self.rows)
        return tensor.index_select(self.first_dim, self.row_index(tensor.device))

    def matrices(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """The matrices [rows, inputs] of the segment, one for each stacked copy, out of the whole parameter."""
        rows = self.take(tensor)
        for i in range(self.copies):
            one = rows[i] if self.stacked else rows
            yield one.movedim(self.first_dim - self.stacked, 0).flatten(1)

    def row_sums(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over everything but the output rows of the whole parameter: fp64 [copies, output rows]."""
        others = self.inputs
        sums = tensor.sum(others, dtype=torch.float64) if others else tensor.double()
        return sums.reshape(self.copies, self.output_size)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def blocks(self, cut: Cut) -> int:
        """How many blocks `cut` makes of this segment; its part of one that spans parameters counts as one."""
        if cut in SPANNING:
            return 1
        return self.copies * {"element": self.numel // self.copies, "row": self.rows}.get(cut, self._units(cut))

    def block_of_row(self, cut: Cut, device: torch.device | str = "cpu") -> torch.Tensor:
        """Block number of each row of one copy, in segment order: int64 tensor [rows], 0-based within the copy."""
        if cut == "element" and self.numel != self.rows * self.copies:
            raise ValueError(f"{self.name}: elements of a matrix are not unions of rows")
        units = self.rows if cut in ("row", "element") else self._units(cut)
        return torch.arange(self.rows, device=device) // max(self.rows // units, 1)

    def joint(self, cut: Cut) -> tuple[object, ...] | None:
        """By what a block that spans parameters is known; None for blocks of this segment alone.

        Cut by layer, what lies outside of the layers is such a block.
        """
        if cut == "layer" and self.layer is not None:
            found = IN_LAYER.fullmatch(self.name)
            return cut, self.layer, found["stem"] if found else None  # an encoder's and a decoder's differ
        return (cut, self.role) if cut == "role" else (cut,) if cut == "model" else None

    def _units(self, cut: Cut) -> int:
        if cut == "head":
            if self.heads is None:
                raise TypeError(
                    f"{self.name}: cutting {self.role} by head needs the number of heads, which is not known; say it "
                    f"where the map is made: overrides={{{self.name!r}: {{'role': '{self.role}', 'heads': N}}}}"
                )
            return self.heads
        return 1

    def describe_shape(self) -> str:
        """The shape of the whole parameter in words, `768 x 2304` or `scalar`."""
        return " x ".join(map(str, self.shape)) or "scalar"

    def describe_dims(self) -> str:
        """Along which dimensions the rows lie, in words."""
        return f"rows along dimensions 0 to {self.dim}" if self.merged else f"rows along dimension {self.dim}"

    def describe_rows(self) -> str:
        """The rows in words, `all`, `0:768` or `12 x 64 from 64 every 192`."""
        if self.whole and self.count == 1:
            return "all"
        if self.count == 1:
            return f"{self.start}:{self.start + self.length}"
        return f"{self.count} x {self.length} from {self.start} every {self.stride}"


def segment_sums(tensor: torch.Tensor, segments: Sequence[Segment]) -> list[torch.Tensor]:
    """The sum of each segment of one parameter, fp64 0-d, out of the whole parameter."""
    if len(segments) == 1 and segments[0].whole:
        return [tensor.sum(dtype=torch.float64)]
    sums = segments[0].row_sums(tensor)
    return [sums.index_select(1, segment.row_index(sums.device)).sum() for segment in segments]
