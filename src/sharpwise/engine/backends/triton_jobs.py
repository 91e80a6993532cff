"""What the Triton kernels go over: views as rectangles of memory, and rectangles as jobs with chunks."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sharpwise.engine.backends.triton_print import FIELDS
from sharpwise.engine.view import ParamView
from sharpwise.shards import local

Array = np.ndarray[Any, Any]

SPAN, SUM_SPAN = 1 << 14, 1 << 16
"""Elements of a chunk that is moved, or only summed up: 8 or 20 bytes of tables each."""
BLOCK = 1 << 10
"""Elements of a tile."""
ONE_PROGRAM = 1 << 16
"""Elements up to which one program sums up and moves a block; larger ones in two passes."""
SHORT = 64
"""Blocks of so few elements are taken several at a time: in tiles of SHORT_TILE."""
SHORT_TILE = (64, 16)
WIDE, TALL = 64, 32
"""A tile of columns: that many of them, and rows."""


class Run(NamedTuple):
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

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.rows * self.columns


def runs_of(view: ParamView) -> list[Run]:
    """A view as rectangles, in the order of its rows; kept."""
    if "runs" not in view.kept:
        view.kept["runs"] = _runs(view) if view.numel else []
    found: list[Run] = view.kept["runs"]
    return found


def _runs(view: ParamView) -> list[Run]:
    layout, shape, by_row = view.layout, view.whole_shape, view.dim == 1 and len(view.shape) == 2
    out = shape[0] if by_row else shape[-1]
    index = np.arange(out) if layout.rows is None else _rows(layout.rows)
    copies = 1 if by_row or len(shape) == 2 else shape[0]
    tall = 1 if by_row else shape[-2]
    n, width = len(index), shape[1] if by_row else 1
    segments = _host(layout.segment_of_row, np.zeros(copies * n, np.int64)).reshape(copies, n)
    blocks = None
    if view.rule.has_blocks:
        blocks = _host(layout.block_of_row, np.arange(copies * n)).reshape(copies, n)
    pieces = []
    for number in range(copies):
        jump = (np.diff(index) != 1) | (np.diff(segments[number]) != 0)
        if blocks is not None:
            jump |= np.diff(blocks[number]) != 0
        begins = np.concatenate(([0], np.flatnonzero(jump) + 1))
        lengths = np.diff(np.concatenate((begins, [n])))
        firsts = np.zeros_like(begins) if blocks is None else blocks[number][begins]
        pieces.append((np.full_like(begins, number), begins, lengths, segments[number][begins], firsts))
    copy, begins, lengths, segment, block = map(np.concatenate, zip(*pieces, strict=True))
    whole = np.bincount(block)[block] == 1 if blocks is not None else np.ones(len(begins), bool)
    # Pieces that are blocks of one length, one after the other, are one run.
    starts = index[begins]
    full = lengths == out  # of columns: all of a copy, which lies in one piece
    merges = np.zeros(len(begins), bool)
    if blocks is not None and not view.shard.cut:
        same = (np.diff(lengths) == 0) & (np.diff(segment) == 0) & (np.diff(block) == 1) & (whole[1:] == whole[:-1])
        next_to = (np.diff(copy) == 0) & (starts[1:] == starts[:-1] + lengths[:-1])
        merges[1:] = same & (next_to | (full[1:] & full[:-1] & (np.diff(copy) == 1)))
    elif blocks is not None:
        same = (np.diff(lengths) == 0) & (np.diff(segment) == 0) & (np.diff(block) == 1)
        merges[1:] = same & (np.diff(copy) == 0) & (starts[1:] == starts[:-1] + lengths[:-1])
    heads = np.flatnonzero(~merges)
    counts = np.diff(np.concatenate((heads, [len(merges)])))
    runs = []
    for i, count in zip(heads.tolist(), counts.tolist(), strict=True):
        at, own, size = int(copy[i]) * tall * out, int(begins[i]), int(lengths[i])
        start, has = int(starts[i]), blocks is not None
        more = (int(segment[i]), int(block[i]), count * has)
        if by_row or full[i]:
            each = size * width * tall
            run = Run(at + start * width, at + own * width, count, each, each, *more, 0, bool(whole[i]))
        else:
            run = Run(at + start, at + own, tall, count * size, out, *more, size * has, bool(whole[i]))
        runs.append(run)
    return runs


def _rows(rows: slice | Tensor) -> Array:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else _host(rows, None)


def _host(tensor: Tensor | None, otherwise: Any) -> Array:
    return otherwise if tensor is None else np.array(tensor.cpu().tolist(), dtype=np.int64)


class Place(NamedTuple):
    """Where a view stands in the tables: its number, that of its scalars, its first step of a block."""

    number: int
    slots: tuple[int, ...]
    rates: int


@dataclass
class Jobs:
    """Jobs of one table, and their chunks by kernel."""

    numbers: int
    rows: list[list[int]] = field(default_factory=list)
    chunks: dict[Any, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kernel: Any, chunks: int, addresses: Sequence[int], **fields: int) -> None:
        """Add a job with so many chunks."""
        own = [fields.get(name, 0) for name in FIELDS] + list(addresses)
        self.chunks[kernel].append((len(self.rows), chunks))
        self.rows.append(own + [0] * (self.numbers - len(own)))

    def table(self) -> Array:
        """All of them."""
        return np.array(self.rows, dtype=np.int64)

    def chunk_table(self, kernel: Any) -> Array:
        """(job, number within it) of every chunk, int32."""
        jobs, counts = np.array(self.chunks[kernel], dtype=np.int64).T
        return np.stack((np.repeat(jobs, counts), _numbered(counts)), 1).astype(np.int32)


def _numbered(counts: Array) -> Array:
    """0 .. n - 1 for each n."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def tiling(run: Run, most: int = SPAN) -> dict[str, int]:
    """Rows and columns of a run that a chunk has."""
    return {"per": max(1, most // max(run.columns, 1)), "span": min(run.columns, most)}


def chunks_of(run: Run, per: int, span: int) -> int:
    """How many chunks that makes."""
    return -(-run.rows // per) * -(-run.columns // span)


class MoveJobs:
    """Jobs that move views of one kernel text.

    Args:
        stochastic, seed: of rounding.
    """

    def __init__(self, numbers: int, granule: int, stochastic: bool) -> None:
        self.jobs = Jobs(numbers)
        self.granule, self.stochastic = granule, stochastic

    def add(self, view: ParamView, place: Place, g: int, size: int, by_rate: bool) -> None:
        """A view.

        Args:
            g, size: address of its gradient, and bytes of an element.
            by_rate: its steps per block are worked out elsewhere.
        """
        p = local(view.param)
        elements = [(n, view.own[n]) for n, kind in view.rule.state.items() if kind == "element"]
        tensors = [(p.data_ptr(), p.element_size(), False)]
        tensors += [(local(t).data_ptr(), t.element_size(), view.state_key(n) != n) for n, t in elements]
        block = [
            (view.own[n].data_ptr(), view.own[n].element_size()) for n, k in view.rule.state.items() if k == "block"
        ]
        counts = 0 if view.layout.counts is None else view.layout.counts.data_ptr()
        common = {"view": place.number}
        if self.stochastic:
            common["key"] = (view.key + int(view.group["seed"]) * 0x85EBCA6B) & 0xFFFFFFFF
        lead = int(np.prod(view.param.shape[1:])) if view.shard.offset else 0
        for run in runs_of(view):
            addresses = [base + bytes_ * (run.own if own else run.start) for base, bytes_, own in tensors]
            at_g = size * run.start
            kernel = kernel_of(run, by_rate)
            aligned = not any(a % 16 for a in [*addresses, g + at_g]) and not any(
                n % self.granule
                for n in (run.columns, run.pitch, run.size if kernel == "columns" and run.size > 1 else 0)
            )
            fields = common | {
                "rows": run.rows,
                "columns": run.columns,
                "pitch": run.pitch,
                "size": max(run.size, 1),
                "slot": place.slots[run.segment],
                "counts": counts + 8 * run.first,
                "from_gradient": at_g,
                "noise": run.start + (view.shard.offset[0] * lead if lead else 0),
            }
            more = [base + bytes_ * run.first for base, bytes_ in block]
            if kernel == "rows":
                short = run.columns <= SHORT
                per = max(1, SPAN // run.columns)
                per += -per % SHORT_TILE[0] if short else 0
                self.jobs.add(("rows", short, aligned), -(-run.rows // per), addresses + more, per=per, **fields)
            elif kernel == "columns":
                span = run.size if run.size > 1 else WIDE
                chunks = -(-run.columns // span)
                self.jobs.add(("columns", aligned), chunks, addresses + more, span=span, **fields)
            else:
                cut = tiling(run)
                if kernel == "by rate":
                    fields |= {
                        "first": place.rates + run.first,
                        "by_row": int(not run.size),
                        "by_column": int(run.size > 0),
                    }
                chunks = chunks_of(run, **cut)
                self.jobs.add(("tiles", kernel == "by rate", aligned), chunks, addresses + more, **cut, **fields)

    def add_phases(self, view: ParamView, place: Place, starts: int) -> int:
        """The block state of a view's blocks that are summed up in pieces, whose partial sums are numbered from
        `starts` on; how many blocks these are."""
        names = [n for n, kind in view.rule.state.items() if kind == "block"]
        counts = view.layout.counts
        assert counts is not None
        none = [0] * (1 + sum(kind == "element" for kind in view.rule.state.values()))
        done = 0
        for first, blocks, segment in block_ranges(view):
            addresses = [view.own[n].data_ptr() + view.own[n].element_size() * first for n in names]
            self.jobs.add(
                "phase",
                blocks,
                none + addresses,
                first=starts + done,
                by_row=place.rates + first,
                slot=place.slots[segment],
                counts=counts.data_ptr() + 8 * first,
            )
            done += blocks
        return done


def kernel_of(run: Run, by_rate: bool) -> str:
    """Which kernel moves it."""
    if not run.blocks:
        return "tiles"
    if by_rate or not run.whole:
        return "by rate"
    if run.size:
        return "columns" if run.size <= WIDE else "by rate"
    return "rows" if run.columns <= ONE_PROGRAM else "by rate"


def in_pieces(view: ParamView) -> list[Run]:
    """Runs of blocks that are summed up by several programs."""
    return [run for run in runs_of(view) if kernel_of(run, False) == "by rate"]


def block_ranges(view: ParamView) -> list[tuple[int, int, int]]:
    """Blocks that are summed up in pieces, in order, as ranges of one segment: first, how many, the segment."""
    owner = {b: run.segment for run in in_pieces(view) for b in range(run.first, run.first + run.blocks)}
    found: list[tuple[int, int, int]] = []
    for b in sorted(owner):
        if found and found[-1][0] + found[-1][1] == b and found[-1][2] == owner[b]:
            found[-1] = found[-1][0], found[-1][1] + 1, owner[b]
        else:
            found.append((b, 1, owner[b]))
    return found


class SumJobs:
    """Jobs that sum up gradients: for blocks in pieces, for totals.

    Attributes:
        outputs: for which block (by its place among all that are summed up), or which total (-1, -2, ...), by chunk.
    """

    def __init__(self) -> None:
        self.jobs = Jobs(len(FIELDS))
        self.owners: dict[Any, list[Array]] = defaultdict(list)
        self.totals: dict[Any, int] = {}
        self.blocks = 0

    def add(self, view: ParamView, number: int, g: int, dtype: torch.dtype, total: bool, blocks: bool) -> None:
        """The gradient of a view, for a total, for its blocks in pieces, or for both."""
        pieces = in_pieces(view) if blocks else []
        places: dict[int, int] = {}
        for first, count, _ in block_ranges(view) if pieces else ():
            for b in range(first, first + count):
                places[b] = self.blocks + len(places)
        self.blocks += len(places)
        if total:  # blocks in pieces are of parameters that are not cut: their sums lie before this total's own
            self.totals.setdefault((), -1)
        owner = self.totals.setdefault(view.shard.holders, -1 - len(self.totals)) if total else 0
        rest = [run for run in runs_of(view) if run not in pieces] if total else []
        if not pieces and not view.part and rest:  # all of it, in one piece
            n = local(view.param).numel()
            rest = [Run(0, 0, 1, n, n, 0)]
        for run in (*pieces, *rest):
            cut = tiling(run, SUM_SPAN)
            if run in pieces:
                cut = {**cut, "per": 1} if not run.size else {"per": max(1, SUM_SPAN // run.size), "span": run.size}
            granule = 16 // dtype.itemsize
            even = not any(n % granule for n in (run.columns, run.pitch, cut["span"]))
            aligned = even and (g + dtype.itemsize * run.start) % 16 == 0
            chunks = chunks_of(run, **cut)
            fields = {"rows": run.rows, "columns": run.columns, "pitch": run.pitch, "view": number}
            key = dtype, aligned
            self.jobs.add(key, chunks, [], from_gradient=dtype.itemsize * run.start, **cut, **fields)
            if run not in pieces:
                self.owners[key].append(np.full(chunks, owner))
                continue
            across = -(-run.columns // cut["span"])
            k = np.arange(chunks)
            block = k % across if run.size else k // across
            self.owners[key].append(places[run.first] + block)

    def tables(self) -> tuple[dict[Any, Array], Array, dict[Any, slice]]:
        """Chunks with the places of their sums, by kernel; where those of blocks begin; where those of totals lie."""
        keys = list(self.jobs.chunks)
        owners = np.concatenate([own for key in keys for own in self.owners[key]]) if keys else np.zeros(0, np.int64)
        # Those of blocks first, in their order; then those of the totals.
        rank = np.where(owners >= 0, owners, self.blocks - 1 - owners)
        order = np.argsort(rank, kind="stable")
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        begins = np.searchsorted(rank[order], np.arange(self.blocks + len(self.totals) + 1))
        found, at = {}, 0
        for key in keys:
            chunks = self.jobs.chunk_table(key)
            found[key] = np.concatenate((chunks, places[at : at + len(chunks), None]), 1).astype(np.int32)
            at += len(chunks)
        totals = {
            holders: slice(int(begins[self.blocks - 1 - i]) if holders else 0, int(begins[self.blocks - i]))
            for holders, i in self.totals.items()
        }
        return found, begins[: self.blocks + 1].astype(np.int32), totals
