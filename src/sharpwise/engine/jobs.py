"""What our own loops are told of the matrices of a step.

Where nothing has to be known of all gradients before the first element moves (no collective, clipping or guard), a
block is summed up and moved in one pass: a row while it is in the cache, and the gradient comes from memory once.
Elsewhere the sums come first, and the elements are moved by steps per row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharpwise.engine.items import Item
from sharpwise.engine.kernels import COMPILE_EACH, Compiler
from sharpwise.engine.loops import TYPES, Job, Step
from sharpwise.engine.plan import Entry, Run
from sharpwise.engine.scalars import Numbers
from sharpwise.shards import local

ONE_THREAD = 1 << 20
"""Elements up to which one thread may do it all: a position embedding, one block."""


class Jobs:
    """Jobs for loops, which are run together. Tensors whose addresses they hold are kept until then."""

    def __init__(self) -> None:
        self._jobs: dict[Step, list[Job]] = {}
        self._kept: list[Tensor] = []

    def go(self) -> None:
        """Run them."""
        for loop, jobs in self._jobs.items():
            loop(jobs)

    def add_blocks(self, item: Item, way: "OnePass", g: Tensor, now: Numbers) -> None:
        """Move an item, its blocks included."""
        layout, p = item.layout, item.parameter()
        by_row, width = layout.dim == 1, layout.shape[1]
        factors = [None if now.uniform else now.by_row("multiplier", item)]
        factors += [now.by_row("decay", item) if now.decays_by_row else None]
        of = None if by_row else layout.block_of_row
        for rows, blocks, size in way.runs:
            start = rows.start * width if by_row else 0
            n = blocks.stop - blocks.start
            self._jobs.setdefault(way.loop, []).append(
                [
                    *(self._address(t, start) for t in (p, g, *item.stored)),
                    *(self._address(t, blocks.start) for t in item.blocks.values()),
                    *([n, size * width, 1, n] if by_row else [*layout.shape, 0, n]),
                    self._address(layout.counts, blocks.start),
                    self._address(of),
                    *(self._address(None if f is None else f.view(-1)[rows][::size].contiguous()) for f in factors),
                    self._address(now.named(way.loop.scalars)),
                ]
            )

    def add_elements(
        self, item: Item, loop: Step, g: Tensor, now: Numbers, row_step: Tensor | None, row_decay: Tensor | None
    ) -> None:
        """Move the elements of an item."""
        layout = item.layout
        self._jobs.setdefault(loop, []).append(
            [
                *(self._address(t) for t in (item.parameter(), g, *item.stored)),
                *(*layout.shape, layout.dim, 0, 0, 0),
                *(self._address(None if t is None else t.contiguous()) for t in (row_step, row_decay)),
                self._address(now.named(loop.scalars)),
            ]
        )

    def _address(self, tensor: Tensor | None, start: int = 0) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor)
        return tensor.data_ptr() + start * tensor.element_size()


class OnePass:
    """How to move an item with its blocks.

    Attributes:
        runs: of its rows; where rows are columns, one for all. `loop`: what moves it.
    """

    def __init__(self, runs: Sequence[Run], loop: Step) -> None:
        self.runs, self.loop = runs, loop


def one_pass(item: Item, compiler: Compiler) -> OnePass | None:
    """How to move an item so; None if it cannot be, or has too little to share among threads."""
    layout, threads = item.layout, torch.get_num_threads()
    runs = runs_of(layout) if _is_ours(item, [*item.stored, *item.blocks.values()]) else []
    # Threads share blocks of rows, or rows of columns by the eight.
    blocks = min((run.blocks.stop - run.blocks.start for run in runs), default=0)
    shared = blocks if layout.dim == 1 else layout.shape[0] // 8
    if not runs or (shared < 2 * threads and item.numel > ONE_THREAD):
        return None
    types = _types(item) | {name: t.dtype for name, t in item.blocks.items()}
    loop = compiler.step(layout.rule, item.parts[0].param.dtype, types, with_blocks=True)
    return None if loop is None else OnePass(runs, loop)


def elements(item: Item, compiler: Compiler) -> Step | None:
    """The loop that moves the elements of an item; None if there is none."""
    rule = item.layout.rule
    if rule.reductions or not _is_ours(item, item.stored):
        return None
    return compiler.step(rule, item.parts[0].param.dtype, _types(item), with_blocks=False)


def runs_of(entry: Entry) -> list[Run]:
    """The blocks of an entry as runs of its rows, in their order; of columns as one. Empty if they are none."""
    if len(entry.shape) != 2 or entry.shard.cut or entry.counts is None:
        return []
    if entry.dim == 0:
        return [Run(slice(0, entry.shape[1]), slice(0, len(entry.counts)), 1)]
    runs = [where for where in entry.gathers if isinstance(where, Run)]
    return runs if len(runs) == len(entry.gathers) else []


def _types(item: Item) -> dict[str, torch.dtype]:
    names = [name for name, kind in item.layout.rule.state.items() if kind == "element"]
    return {name: t.dtype for name, t in zip(names, item.stored, strict=True)}


def _is_ours(item: Item, state: Sequence[Tensor]) -> bool:
    shape = item.layout.shape
    if item.copied or len(shape) != 2 or min(shape) < 2 or item.numel < COMPILE_EACH:
        return False
    tensors = [local(item.parts[0].param), *state]
    return all(t.device.type == "cpu" and t.dtype in TYPES and t.is_contiguous() for t in tensors)
