"""Matrices whose blocks are rows: sums, denominators and elements in one pass over memory.

Where nothing has to be known of all gradients before the first element moves (no collective, clipping or guard), a row
is summed up and moved while it is in the cache, and the gradient comes from memory once.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.engine import kernels
from sharpwise.engine.items import Item
from sharpwise.engine.mesh import local
from sharpwise.engine.plan import Entry
from sharpwise.engine.scalars import Numbers

Calls = list[tuple[Callable[..., Any], list[Tensor]]]


class Run(NamedTuple):
    """Blocks of the same number of adjacent rows, one after the other: seen as rows, they need no table.

    Attributes:
        rows, blocks: which; size: rows of a block.
    """

    rows: slice
    blocks: slice
    size: int


class Part(NamedTuple):
    """A run of an item, with its state as the kernel takes it: one row per block."""

    run: Run
    counts: Tensor
    stored: list[Tensor]
    blocks: Mapping[str, Tensor]


class OnePass:
    """An item that can be moved so, and its runs."""

    def __init__(self, item: Item, parts: list[Part]) -> None:
        self.item, self.parts = item, parts

    def calls(self, compiler: kernels.Compiler, p: Tensor, g: Tensor, now: Numbers) -> Calls | None:
        """What to call to move the elements of `p`; each call returns its sums of g*g, per block. None: no graph.

        Block state stays: its new values follow from the sums, for all items at once.
        """
        item, layout = self.item, self.item.layout
        packed = now.packed(layout.dtype, p.device)
        row_step = row_decay = None
        if not now.uniform:
            row_step = item.spread_segments(now.multipliers).to(layout.dtype)
        elif layout.varies or now.multipliers[0] != 1.0:  # with a factor it is another graph
            row_step = p.new_full((len(p), 1), now.multipliers[0], dtype=layout.dtype)
        if now.decays_by_row:
            row_decay = (1 - item.spread_segments(now.decays) * now.lr_decay).to(layout.dtype)
        calls: Calls = []
        for run, counts, stored, blocks in self.parts:
            step, decay = (None if t is None else t[run.rows][:: run.size].contiguous() for t in (row_step, row_decay))
            own, grad = (t[run.rows].view(len(counts), -1) for t in (p, g))
            call = compiler.blocks_call(
                item.graphs, layout.rule, now.scalars, packed, own, grad, stored, blocks, counts, step, decay
            )
            if call is None:
                return None
            calls.append(call)
        return calls


def one_pass(item: Item) -> OnePass | None:
    """How to move an item so; None if it cannot be, or has too few blocks to share among threads."""
    layout = item.layout
    if item.flat or layout.counts is None or local(item.parts[0].param).device.type != "cpu":
        return None
    width = layout.shape[-1]
    parts = []
    for run in runs_of(layout):
        n = run.blocks.stop - run.blocks.start
        if n < 2 * torch.get_num_threads() or n * run.size * width < kernels.COMPILE_EACH or run.size * width % 256:
            return None
        stored = [t[run.rows].view(n, -1) for t in item.stored]
        parts.append(Part(run, layout.counts[run.blocks], stored, {k: t[run.blocks] for k, t in item.blocks.items()}))
    return OnePass(item, parts) if parts else None


def runs_of(entry: Entry) -> list[Run]:
    """The blocks of an entry as runs, in their order; empty if they are none, or rows run along the last dimension."""
    runs: list[Run] = []
    if entry.dim != 1 or len(entry.shape) != 2 or entry.shard.cut:
        return []
    for begin, table in entry.gathers:
        if table is None:
            return [Run(slice(0, entry.shape[0]), slice(0, entry.shape[0]), 1)]
        n, size = table.shape
        flat = table.view(-1)
        if not n or not torch.equal(flat, torch.arange(n * size, device=flat.device) + flat[0]):
            return []
        rows, blocks = slice(int(flat[0]), int(flat[-1]) + 1), slice(begin, begin + n)
        if runs and runs[-1].size == size and runs[-1].rows.stop == rows.start:  # q and k, cut into heads alike
            last = runs.pop()
            rows, blocks = slice(last.rows.start, rows.stop), slice(last.blocks.start, blocks.stop)
        runs.append(Run(rows, blocks, size))
    return runs
