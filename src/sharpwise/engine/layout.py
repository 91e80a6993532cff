"""Rows, segments and blocks of what a process holds of a parameter: geometry, worked out once on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sharpwise.blocks import Cut, Segment
from sharpwise.shards import Shard

Rows = slice | Tensor | None
"""Rows of a local tensor: a range, int64 indices, or None for all."""


class Run(NamedTuple):
    """Blocks of the same number of adjacent rows, one after the other: seen as rows, they need no table.

    Attributes:
        rows, blocks: which; size: rows of a block.
    """

    rows: slice
    blocks: slice
    size: int


class Rectangle(NamedTuple):
    """Elements of one segment as a rectangle of memory; where there are blocks, those one after the other.

    Attributes:
        start, own: its first element in the parameter, and in state that is of the view alone.
        rows, columns, pitch: of the rectangle.
        segment, first, blocks: the number of its segment, its first block, its blocks (0: a rule without).
        size: columns of a block; 0: a block is a row of the rectangle.
        whole: whether all of its blocks lie here alone.
    """

    start: int
    own: int
    rows: int
    columns: int
    pitch: int
    segment: int
    first: int = 0
    blocks: int = 0
    size: int = 0
    whole: bool = True


@dataclass(frozen=True)
class Layout:
    """Rows of a view.

    Attributes:
        rows: of the local parameter, that are the view's.
        segment_of_row, block_of_row: int64 [rows], None where all rows are alike, or every row is its own block.
        gathers: where the rows of the blocks are, in order: runs, or tables [blocks, rows] with -1 where not local.
        counts: elements of every block of the whole parameter, fp64 [n_blocks].
        segment_of_block: int64 [n_blocks], None where there is one segment.
    """

    rows: Rows = None
    segment_of_row: Tensor | None = None
    block_of_row: Tensor | None = None
    gathers: "list[Run | Tensor]" = field(default_factory=list)
    counts: Tensor | None = None
    segment_of_block: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        """Sums per row [rows] -> sums per block [n_blocks], rows elsewhere counted as 0."""
        if self.block_of_row is None:
            return rows
        parts = []
        padded: Tensor | None = None
        for where in self.gathers:
            if isinstance(where, Run):
                own = rows[where.rows]
                parts.append(own if where.size == 1 else own.view(-1, where.size).sum(1))
            else:
                padded = torch.cat((rows, rows.new_zeros(1))) if padded is None else padded
                parts.append(padded[where].sum(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to(self, device: torch.device) -> "Layout":
        """The same on a device."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        gathers = [move(where) for where in self.gathers]
        rows, segments, blocks, counts = map(move, (self.rows, self.segment_of_row, self.block_of_row, self.counts))
        return Layout(rows, segments, blocks, gathers, counts, move(self.segment_of_block))


class Layouts:
    """Layouts by geometry: the layers of a model share theirs."""

    def __init__(self) -> None:
        self._known: dict[Any, Layout] = {}

    def of(
        self,
        segments: Sequence[Segment],
        cuts: tuple[Cut, ...] | None,
        whole: bool,
        shape: tuple[int, ...],
        shard: Shard,
        device: torch.device,
    ) -> Layout:
        """The layout of some segments of a parameter, of which `shape` is held here.

        Args:
            cuts: of the segments into blocks, None for a rule without blocks.
            whole: whether the segments are all of the parameter.
        """
        plain = tuple(replace(s, name="", layer=None, source="", tied=(), frozen=False) for s in segments)
        key = plain, cuts, whole, shape, shard.offset, device
        if key not in self._known:
            with torch.inference_mode(False):
                self._known[key] = _lay_out(segments, cuts, whole, shape, shard).to(device)
        return self._known[key]


def _lay_out(
    segments: Sequence[Segment], cuts: tuple[Cut, ...] | None, whole: bool, shape: tuple[int, ...], shard: Shard
) -> Layout:
    first = segments[0]
    copies, out = first.copies, first.output_size
    mine = _local_rows(first, shape, shard)
    segment_of = torch.full((copies, out), -1, dtype=torch.int64, device="cpu")
    for i, segment in enumerate(segments):
        segment_of[:, segment.row_index("cpu")] = i
    segment_of_row, rows = segment_of.view(-1)[mine], None
    if not whole:
        held = segment_of_row >= 0
        by_copy = held.view(shape[0], -1) if first.stacked and first.dim > 1 and shape[0] else held.view(1, -1)
        rows = _as_rows(by_copy[0])  # where rows are columns, those of one copy: all are alike
        mine, segment_of_row = mine[held], segment_of_row[held]
    several = segment_of_row if len(segments) > 1 else None
    if cuts is None:
        return Layout(rows, several)
    sizes = [segment.blocks(cut) for segment, cut in zip(segments, cuts, strict=True)]
    elements = [s.numel / max(n, 1) for s, n in zip(segments, sizes, strict=True)]
    numbers = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    counts = torch.tensor(elements, dtype=torch.float64, device="cpu").repeat_interleave(numbers).clamp(min=1)
    owner = torch.arange(len(segments), device="cpu").repeat_interleave(numbers) if len(segments) > 1 else None
    if cuts == ("row",) and len(mine) == copies * out:  # every row is its own block
        return Layout(rows, several, None, [Run(slice(0, len(mine)), slice(0, len(mine)), 1)], counts, owner)
    block_of = torch.zeros(copies, out, dtype=torch.int64, device="cpu")
    begin, where = 0, []
    for segment, cut, n in zip(segments, cuts, sizes, strict=True):
        copy = (n // copies) * torch.arange(copies, device="cpu")[:, None]
        block_of[:, segment.row_index("cpu")] = begin + segment.block_of_row(cut, "cpu") + copy
        where.append((begin, n))
        begin += n
    block_of_row = block_of.view(-1)[mine]
    return Layout(rows, several, block_of_row, gathers_of(block_of_row, where), counts, owner)


def _as_rows(held: Tensor) -> Rows:
    """Rows from a mask: a range if they are adjacent."""
    rows = torch.nonzero(held).view(-1)
    if len(rows) and int(rows[-1]) - int(rows[0]) + 1 != len(rows):
        return rows
    return slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)


def _local_rows(first: Segment, own: tuple[int, ...], shard: Shard) -> Tensor:
    """Which of all [copies * out] rows this process holds, or holds a part of."""
    copies, out, offset = first.copies, first.output_size, shard.offset
    if first.merged:
        held = tuple(slice(begin, begin + n) for begin, n in zip(offset, own, strict=True))[: first.dim + 1]
        return torch.arange(out, device="cpu").view(first.shape[: first.dim + 1])[held].reshape(-1)
    everything = torch.arange(copies * out, device="cpu").view(copies, out)
    if not own:
        return everything.view(-1)
    if first.stacked:
        everything = everything[offset[0] : offset[0] + own[0]]
    return everything[:, offset[first.dim] : offset[first.dim] + own[first.dim]].reshape(-1)


def gathers_of(block_of_row: Tensor, where: Sequence[tuple[int, int]]) -> list[Run | Tensor]:
    """Where the rows of blocks are, for ranges of blocks given by their first and their number; see `Layout`."""
    found: list[Run | Tensor] = []
    for begin, n in where:
        table = rows_of_blocks(block_of_row, begin, n)
        flat, size = table.view(-1), table.shape[1]
        if not n or flat[0] < 0 or not torch.equal(flat, torch.arange(n * size, device=flat.device) + flat[0]):
            found.append(table)
            continue
        rows, blocks = slice(int(flat[0]), int(flat[-1]) + 1), slice(begin, begin + n)
        last = found[-1] if found and isinstance(found[-1], Run) else None
        if last is not None and last.size == size and last.rows.stop == rows.start:
            found.pop()  # q and k, cut into heads alike
            rows, blocks = slice(last.rows.start, rows.stop), slice(last.blocks.start, blocks.stop)
        found.append(Run(rows, blocks, size))
    return found


def rows_of_blocks(block_of_row: Tensor, begin: int, n: int) -> Tensor:
    """Local rows of the blocks begin .. begin + n, padded with -1 (the appended zero): int64 [n, most rows]."""
    rows = torch.nonzero((block_of_row >= begin) & (block_of_row < begin + n)).view(-1)
    order = rows[torch.argsort(block_of_row[rows], stable=True)]
    owner = block_of_row[order] - begin
    sizes = torch.bincount(owner, minlength=n)
    table = torch.full((n, max(int(sizes.max()), 1) if n else 1), -1, dtype=torch.int64, device=rows.device)
    starts = torch.cumsum(sizes, 0) - sizes
    table[owner, torch.arange(len(order), device=rows.device) - starts[owner]] = order
    return table


def rectangles(layout: Layout, shape: tuple[int, ...], by_row: bool, has_blocks: bool, cut: bool) -> list[Rectangle]:
    """A view as rectangles of a parameter, in the order of its rows.

    Args:
        shape: of all that is held of the parameter, seen as the view is; by_row: its rows are those of a matrix.
        cut: whether blocks may lie on several processes.
    """
    out = shape[0] if by_row else shape[-1]
    index = on_host(layout.rows, np.arange(out))
    copies = 1 if by_row or len(shape) == 2 else shape[0]
    tall = 1 if by_row else shape[-2]
    n, width = len(index), shape[1] if by_row else 1
    segments = on_host(layout.segment_of_row, np.zeros(copies * n, np.int64)).reshape(copies, n)
    blocks = on_host(layout.block_of_row, np.arange(copies * n)).reshape(copies, n)
    # Pieces of adjacent rows of one segment and block.
    ends = np.ones((copies, n), bool)
    ends[:, 1:] = (np.diff(index) != 1) | (np.diff(segments) != 0) | ((np.diff(blocks) != 0) & has_blocks)
    copy, begins = np.nonzero(ends)
    lengths = np.diff(np.concatenate((copy * n + begins, [copies * n])))
    starts, segment, block = index[begins], segments[copy, begins], blocks[copy, begins]
    whole = np.bincount(block)[block] == 1 if has_blocks else np.ones(len(begins), bool)
    # Pieces that are blocks of one length, one after the other, are one rectangle.
    full = lengths == out  # of columns: all of a copy, which lies in one piece
    alike = (np.diff(lengths) == 0) & (np.diff(segment) == 0) & (np.diff(block) == 1) & has_blocks
    next_to = (np.diff(copy) == 0) & (starts[1:] == starts[:-1] + lengths[:-1])
    if not cut:
        alike &= whole[1:] == whole[:-1]
        next_to |= full[1:] & full[:-1] & (np.diff(copy) == 1)
    heads = np.flatnonzero(~np.concatenate(([False], alike & next_to)))
    counts = np.diff(np.concatenate((heads, [len(begins)])))
    found = []
    for i, count in zip(heads.tolist(), counts.tolist(), strict=True):
        at, own, size, start = int(copy[i]) * tall * out, int(begins[i]), int(lengths[i]), int(starts[i])
        more = (int(segment[i]), int(block[i]) * has_blocks, count * has_blocks)
        if by_row or full[i]:
            each = size * width * tall
            one = Rectangle(at + start * width, at + own * width, count, each, each, *more, 0, bool(whole[i]))
        else:
            one = Rectangle(at + start, at + own, tall, count * size, out, *more, size * has_blocks, bool(whole[i]))
        found.append(one)
    return found


def on_host(rows: Rows, otherwise: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """A table of rows, or what None stands for."""
    if isinstance(rows, slice):
        return np.arange(rows.start, rows.stop)
    return otherwise if rows is None else np.array(rows.cpu().tolist(), dtype=np.int64)
