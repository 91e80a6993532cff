"""What the Triton kernels go over: views as rectangles of memory, and rectangles as jobs with chunks."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from sharpwise.engine.backends.triton_print import FIELDS
from sharpwise.engine.layout import Rectangle
from sharpwise.engine.stored import ABSMAX
from sharpwise.engine.view import ParamView
from sharpwise.shards import local
from sharpwise.storage.dense import SEED_FACTOR

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


class Place(NamedTuple):
    """Where a view stands in the tables: its number, that of its scalars, its first step of a block, and under a
    control its first cell and unit."""

    number: int
    slots: tuple[int, ...]
    rates: int
    cells: int = 0
    units: int = 0


class Piece(NamedTuple):
    """A rectangle as a job: its kernel, how chunks cut it, and what else of the job is of the kernel alone."""

    kernel: tuple[Any, ...]
    run: Rectangle
    cut: dict[str, int]
    fields: dict[str, int]


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

    def add_run(self, kernel: Any, run: Rectangle, cut: dict[str, int], addresses: Sequence[int], **fields: int) -> int:
        """Add a rectangle, of which a chunk has so many rows and columns (`per`, `span`); how many chunks it has."""
        chunks = -(-run.rows // cut["per"]) * -(-run.columns // cut["span"])
        fields |= {"rows": run.rows, "columns": run.columns, "pitch": run.pitch}
        self.add(kernel, chunks, addresses, **cut, **fields)
        return chunks

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


def tiling(run: Rectangle, most: int = SPAN) -> dict[str, int]:
    """Rows and columns of a run that a chunk has."""
    return {"per": max(1, most // max(run.columns, 1)), "span": min(run.columns, most)}


class MoveJobs:
    """Jobs that move views of one kernel text.

    Args:
        stochastic, seed: of rounding.
    """

    def __init__(self, numbers: int, granule: int, stochastic: bool) -> None:
        self.jobs = Jobs(numbers)
        self.granule, self.stochastic = granule, stochastic

    def add(self, view: ParamView, place: Place, g: int, size: int, pieces: Iterable[Piece]) -> None:
        """A view, as these pieces; g, size: address of its gradient, and bytes of an element."""
        p = local(view.param)
        tensors = [(p.data_ptr(), p.element_size(), False)]
        tensors += [(local(t).data_ptr(), t.element_size(), view.state_key(n) != n) for n, t in view.elements.items()]
        counts = 0 if view.layout.counts is None else view.layout.counts.data_ptr()
        common = {"view": place.number}
        if self.stochastic:
            common["key"] = (view.key + int(view.group["seed"]) * SEED_FACTOR) & 0xFFFFFFFF
        lead = int(np.prod(view.shard.shape[1:])) if view.shard.offset else 0
        coded = coded_lines(view)
        for kernel, run, cut, own_fields in pieces:
            addresses = [base + bytes_ * (run.own if own else run.start) for base, bytes_, own in tensors]
            at_g = size * run.start
            absmax = [coded.address(view, name, run) for name in coded.names]
            run, lines = coded.split(run) if coded.block else (run, 1)
            wide = run.size if kernel[0] == "columns" and run.size > 1 else 0
            aligned = not any(a % 16 for a in [*addresses, g + at_g])
            aligned &= not any(n % self.granule for n in (run.columns, run.pitch, wide))
            fields = common | {
                "size": max(run.size, lines),
                "slot": place.slots[run.segment],
                "counts": counts + 8 * run.first,
                "from_gradient": at_g,
                "noise": run.start + (view.shard.offset[0] * lead if lead else 0),
            }
            if coded.block:  # rows of tiles are blocks
                cut = {"per": max(SPAN // min(coded.block, run.columns), 1), "span": run.columns}
                cut["per"] += -cut["per"] % max(BLOCK // coded.block, 1)
                run = run._replace(rows=run.rows * -(-run.columns // coded.block))
            addresses += absmax + _of_blocks(view, run.first)
            self.jobs.add_run((*kernel, aligned), run, cut, addresses, **{**fields, **own_fields})

    def add_phases(self, view: ParamView, place: Place, starts: int) -> int:
        """The block state of a view's blocks that are summed up in pieces, whose partial sums are numbered from
        `starts` on; how many blocks these are."""
        counts = view.layout.counts
        assert counts is not None
        none = [0] * (1 + len(view.elements) + len(coded_lines(view).names))
        done = 0
        for first, blocks, segment in block_ranges(view):
            self.jobs.add(
                "phase",
                blocks,
                none + _of_blocks(view, first),
                first=starts + done,
                by_row=place.rates + first,
                slot=place.slots[segment],
                counts=counts.data_ptr() + 8 * first,
            )
            done += blocks
        return done


def pieces_of(view: ParamView, place: Place, by_rate: bool) -> Iterator[Piece]:
    """What of a view is moved; by_rate: its steps per block are worked out elsewhere."""
    block = coded_lines(view).block
    for run in runs_of(view):
        kernel, fields, cut = kernel_of(run, by_rate, block), {}, tiling(run)
        if kernel[0] == "rows":
            cut = {"per": max(1, SPAN // run.columns), "span": run.columns}
            cut["per"] += -cut["per"] % SHORT_TILE[0] if kernel[1] else 0
        elif kernel[0] == "columns":
            wide = run.size if run.size > 1 else 0
            cut = {"per": run.rows, "span": wide or WIDE}
        elif kernel[1]:
            fields = {"first": place.rates + run.first, "by_row": not run.size, "by_column": run.size > 0}
        yield Piece(kernel, run, cut, fields)


def _of_blocks(view: ParamView, first: int) -> list[int]:
    """Addresses of block state from a block on."""
    return [t.data_ptr() + t.element_size() * first for t in view.blocks.values()]


class CodedLines(NamedTuple):
    """The lines of a view whose state is coded in blocks.

    Attributes:
        names: of that state; block: elements of a block, 0 where there is none; length: elements of a line.
    """

    names: tuple[str, ...] = ()
    block: int = 0
    length: int = 0

    def split(self, run: Rectangle) -> tuple[Rectangle, int]:
        """The same as lines, or parts of lines, and how many of these were a row."""
        lines = max(run.columns // self.length, 1)
        columns = min(run.columns, self.length)
        return run._replace(rows=run.rows * lines, columns=columns, pitch=self.length), lines

    def address(self, view: ParamView, name: str, run: Rectangle) -> int:
        """Of the largest element of its first block."""
        absmax = local(view.own[name + ABSMAX])
        line, column = divmod(run.start if view.state_key(name) == name else run.own, self.length)
        return absmax.data_ptr() + absmax.element_size() * (line * absmax.shape[-1] + column // self.block)

    def refused(self, view: ParamView) -> str:
        """Why no kernel moves them, or ""."""
        if not self.block:
            return ""
        if self.block not in (1 << n for n in range(4, 12)):
            return f"blocks of {self.block} elements: powers of 2 from 16 to 2048 alone"
        begins = [run.start for run in runs_of(view)]
        ends = [run.start + run.columns for run in runs_of(view)]  # of its first line, or of all
        cut = any(end % self.length % self.block for end in begins + ends)
        return "segments that begin or end within blocks that are coded together" if cut else ""


def coded_lines(view: ParamView) -> CodedLines:
    """Its lines; empty where all of its state is dense."""
    names = tuple(n for n in view.elements if n in view.formats and view.formats[n].block)
    return CodedLines(names, view.formats[names[0]].block, view.line(names[0]).columns) if names else CodedLines()


def runs_of(view: ParamView) -> list[Rectangle]:
    """Its rectangles; all of it is one where its state is coded in blocks and moves alike: segments may cut these."""
    if not view.uniform or view.rule.has_blocks or view.part or not view.numel or not coded_lines(view).block:
        return view.rectangles
    return [Rectangle(0, 0, 1, view.numel, view.numel, 0)]


def kernel_of(run: Rectangle, by_rate: bool, block: int) -> tuple[Any, ...]:
    """Which kernel moves it: the name, and what else the kernel is found by besides the alignment.

    Args:
        by_rate: steps per block are worked out elsewhere; block: elements that are coded together, 0 if none are.
    """
    if block:
        return "lines", run.blocks > 0, block
    if not run.blocks:
        return "tiles", False
    if by_rate or not run.whole or (run.size or run.columns) > (WIDE if run.size else ONE_PROGRAM):
        return "tiles", True
    return ("columns",) if run.size else ("rows", run.columns <= SHORT)


def in_pieces(view: ParamView) -> list[Rectangle]:
    """Runs of blocks that are summed up by several programs: under a control all, as they do not move yet."""
    block = coded_lines(view).block
    if "cells" in view.kept:
        return [run for run in view.rectangles if run.blocks]
    return [run for run in view.rectangles if kernel_of(run, False, block)[:2] in (("tiles", True), ("lines", True))]


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
        rest = [run for run in view.rectangles if run not in pieces] if total else []
        if not pieces and not view.part and rest:  # all of it, in one piece
            n = local(view.param).numel()
            rest = [Rectangle(0, 0, 1, n, n, 0)]
        for run in (*pieces, *rest):
            cut = tiling(run, SUM_SPAN)
            if run in pieces:
                cut = {**cut, "per": 1} if not run.size else {"per": max(1, SUM_SPAN // run.size), "span": run.size}
            granule = 16 // dtype.itemsize
            even = not any(n % granule for n in (run.columns, run.pitch, cut["span"]))
            aligned = even and (g + dtype.itemsize * run.start) % 16 == 0
            key = dtype, aligned
            chunks = self.jobs.add_run(key, run, cut, [], view=number, from_gradient=dtype.itemsize * run.start)
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
