"""Matrices whose blocks are rows: sums, denominators and elements in one pass over memory.

Where nothing has to be known of all gradients before the first element moves (no collective, clipping or guard), a row
is summed up and moved while it is in the cache, and the gradient comes from memory once.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sharpwise.engine import kernels
from sharpwise.engine.items import Item
from sharpwise.engine.mesh import local
from sharpwise.engine.plan import Entry, Run
from sharpwise.engine.scalars import Numbers

ONE_THREAD = 1 << 20
"""Elements up to which one thread may do it all: a position embedding, one block, is not worth graphs of its own."""


class Part(NamedTuple):
    """A run of an item, with its state as the kernel takes it: one row per block, as `shape` says."""

    run: Run
    shape: tuple[int, int]
    counts: Tensor
    stored: list[Tensor]
    blocks: Mapping[str, Tensor]


class OnePass:
    """An item that can be moved so, and its runs."""

    def __init__(self, item: Item, parts: list[Part]) -> None:
        self.item, self.parts = item, parts

    def calls(self, compiler: kernels.Compiler, p: Tensor, g: Tensor, now: Numbers) -> list[kernels.Call] | None:
        """What to call to move the elements of `p`; each call returns its sums of g*g, per block. None: no graph.

        Block state stays: its new values follow from the sums, for all items at once.
        """
        item, layout = self.item, self.item.layout
        packed = now.packed(layout.dtype, p.device)
        row_step = None
        if not now.uniform:
            row_step = now.by_row("multiplier", item)
        elif layout.varies or now.multipliers[0] != 1.0:  # with a factor it is another graph
            row_step = p.new_full((len(p), 1), now.multipliers[0], dtype=layout.dtype)
        row_decay = now.by_row("decay", item) if now.decays_by_row else None
        calls: list[kernels.Call] = []
        for run, shape, counts, stored, blocks in self.parts:
            step = None if row_step is None else row_step[run.rows][:: run.size].contiguous()
            decay = None if row_decay is None else row_decay[run.rows][:: run.size].contiguous()
            whole = p.shape == shape
            own, grad = (p, g) if whole else (p[run.rows].view(shape), g[run.rows].view(shape))
            call = compiler.blocks_call(
                item.graphs, layout.rule, now.scalars, packed, own, grad, stored, blocks, counts, step, decay
            )
            if call is None:
                return None
            calls.append(call)
        return calls


def one_pass(item: Item) -> OnePass | None:
    """How to move an item so; None if it cannot be, is a copy, or has too few blocks to share among threads."""
    layout = item.layout
    if item.copied or layout.counts is None or local(item.parts[0].param).device.type != "cpu":
        return None
    width = layout.shape[-1]
    parts = []
    for run in runs_of(layout):
        n = run.blocks.stop - run.blocks.start
        shape = n, run.size * width
        elements = n * run.size * width
        shared = n >= 2 * torch.get_num_threads() or elements <= ONE_THREAD
        if not shared or elements < kernels.COMPILE_EACH or shape[1] % 256:
            return None
        stored = [t[run.rows].view(shape) for t in item.stored]
        blocks = {k: t[run.blocks] for k, t in item.blocks.items()}
        parts.append(Part(run, shape, layout.counts[run.blocks], stored, blocks))
    return OnePass(item, parts) if parts else None


def runs_of(entry: Entry) -> list[Run]:
    """The blocks of an entry as runs, in their order; empty if they are none, or rows run along the last dimension."""
    if entry.dim != 1 or len(entry.shape) != 2 or entry.shard.cut:
        return []
    runs = [where for where in entry.gathers if isinstance(where, Run)]
    return runs if len(runs) == len(entry.gathers) else []
