"""Items: what one call of a kernel moves. A matrix alone, or many small tensors gathered in one flat buffer.

150 norms and biases cost more in calls than in bytes. Their state lies in one buffer, of which the tensors in
`optimizer.state` are views; parameters and gradients are gathered into it and scattered back at each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.kernels import Noise
from sharpwise.engine.plan import Entry, gathers_of
from sharpwise.shards import local

SMALL = 1 << 14
"""Tensors up to this many elements are gathered."""


@dataclass(eq=False)
class Item:
    """Tensors that move together: `layout` says how they are seen, `parts` are the parameters.

    Attributes:
        stored: element state, as rows; `blocks`: block state by name [n_blocks].
        graphs: compiled kernels of this item, which the compiler looks up.
    """

    layout: Entry
    parts: list[Entry]
    stored: list[Tensor] = field(default_factory=list)
    blocks: dict[str, Tensor] = field(default_factory=dict)
    singles: "list[Item]" = field(default_factory=list)
    index: tuple[Tensor, ...] = ()
    graphs: dict[Any, Any] = field(default_factory=dict)
    _spread: dict[tuple[float, ...], Tensor] = field(default_factory=dict)

    @property
    def flat(self) -> bool:
        """Whether the parts are gathered in a buffer."""
        return bool(self.singles)

    @cached_property
    def copied(self) -> bool:
        """Whether `parameter` is a copy, which has to be written back."""
        return self.flat or not local(self.parts[0].param).is_contiguous()

    @cached_property
    def numel(self) -> int:
        """Elements of the local parts."""
        rows, *rest = self.layout.shape
        for n in rest:
            rows *= n
        return rows

    def spread_segments(self, values: Sequence[float]) -> Tensor:
        """One number per segment -> fp64, one per row of the layout; the last few are kept."""
        key = tuple(values)
        if key not in self._spread:
            self._spread = {**dict(list(self._spread.items())[-3:]), key: self.layout.spread_segments(values)}
        return self._spread[key]

    def parameter(self) -> Tensor:
        """The parameters as rows: a view, or a copy (gathered, or of a tensor that is not contiguous)."""
        if not self.flat:
            p = local(self.parts[0].param).contiguous()
            return p if p.shape == self.layout.shape else p.view(self.layout.shape)
        return torch.cat([local(e.param).reshape(-1) for e in self.parts]).view(self.layout.shape)

    def gradient(self) -> Tensor:
        """The gradients as rows."""
        if not self.flat:
            g = local(self.parts[0].param.grad).contiguous()  # type: ignore[arg-type]
            return g if g.shape == self.layout.shape else g.view(self.layout.shape)
        return torch.cat([local(e.param.grad).reshape(-1) for e in self.parts]).view(self.layout.shape)  # type: ignore[arg-type]

    def scatter(self, p: Tensor) -> None:
        """Write copied parameters back."""
        if not self.copied:
            return
        own = [local(e.param) for e in self.parts]
        if self.flat:
            pieces = p.view(-1).split([t.numel() for t in own])
            torch._foreach_copy_(own, [piece.view(t.shape) for piece, t in zip(pieces, own, strict=True)])
        else:
            own[0].copy_(p.view(own[0].shape))

    def noise(self, seed: int, t: Any) -> Noise:
        """What stochastic rounding needs at step t."""
        device = local(self.parts[0].param).device
        if not self.index:
            pairs = [e.element_index(device) for e in self.parts]
            self.index = pairs[0]
            if self.flat:
                flat = [(row + column).reshape(-1, 1) for row, column in pairs]
                owner = [torch.full_like(index, i) for i, index in enumerate(flat)]
                self.index = torch.cat(flat), flat[0].new_zeros(1, 1), torch.cat(owner)
        names = torch.tensor([e.key for e in self.parts], dtype=torch.int64, device="cpu").to(device, non_blocking=True)
        step = t.long() if isinstance(t, Tensor) else int(t)
        key = (names + (step * 0x9E3779B1 + seed * 0x85EBCA6B)) & 0xFFFFFFFF
        row, column, *owner = self.index
        return Noise(row, column, key[owner[0]] if owner else key.view(1, 1))


@dataclass(eq=False)
class Pool:
    """Block state of many items in one buffer per name, so that the block phase is a handful of calls for all."""

    items: list[Item]
    state: dict[str, Tensor]
    counts: Tensor

    @staticmethod
    def of_one(item: Item) -> "Pool":
        """The pool of an item alone."""
        assert item.layout.counts is not None
        return Pool([item], item.blocks, item.layout.counts)

    def has(self, item: Item) -> bool:
        """Whether an item, or the flat item that it is a part of, is here."""
        return any(item is own or item in own.singles for own in self.items)


def pool_blocks(items: Sequence[Item], state: Any) -> list[Pool]:
    """Put the block state of items of one group and rule into buffers, of which their state becomes views."""
    together: dict[tuple[Any, ...], list[Item]] = {}
    for item in items:
        if item.layout.rule.has_blocks and item.layout.counts is not None:
            entry = item.parts[0]
            key = (id(entry.group), entry.rule, entry.dtype, local(entry.param).device)
            together.setdefault(key, []).append(item)
    pools = []
    for members in together.values():
        counts = [item.layout.counts for item in members if item.layout.counts is not None]
        buffers = {}
        for name in members[0].blocks:
            buffers[name] = into_buffer([state[e.param][name] for item in members for e in item.parts])
            pieces = buffers[name].split([len(c) for c in counts])
            for item, piece in zip(members, pieces, strict=True):
                item.blocks[name] = piece
        pools.append(Pool(members, buffers, torch.cat(counts)))
    return pools


def into_buffer(tensors: Sequence[Tensor]) -> Tensor:
    """One buffer with the values of all; each tensor becomes a view of its part."""
    buffer = torch.cat([t.reshape(-1) for t in tensors])
    if buffer.device.type != "meta":
        for tensor, piece in zip(tensors, buffer.split([t.numel() for t in tensors]), strict=True):
            tensor.set_(piece.view(tensor.shape))
    return buffer


def gather_small(entries: Sequence[Entry], state: Any, small: int = SMALL) -> list[Item]:
    """Items of these entries: those of at most `small` elements of one group, rule and type together, others alone."""
    items: list[Item] = []
    together: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        tensor = local(entry.param)
        blocked = entry.rule.has_blocks and (entry.n_blocks > 1 or entry.param.ndim > 1)
        blocked = blocked or bool(entry.rule.reductions)
        # The size of the whole parameter decides, not of the shard: all processes must sum in the same order.
        if entry.param.numel() > small or blocked or not tensor.is_contiguous() or tensor.device.type == "meta":
            items.append(_single(entry, state))
        else:
            key = (id(entry.group), entry.rule, tensor.dtype, tensor.device, entry.shard.holders, entry.decays)
            together.setdefault(key, []).append(entry)
    for parts in together.values():
        items.append(_single(parts[0], state) if len(parts) == 1 else _flat(parts, state))
    return items


def _single(entry: Entry, state: Any) -> Item:
    own = state[entry.param]
    stored = [entry.view(own[name]) for name, kind in entry.rule.state.items() if kind == "element"]
    blocks = {name: own[name] for name, kind in entry.rule.state.items() if kind == "block"}
    return Item(entry, [entry], stored, blocks)


def _flat(parts: list[Entry], state: Any) -> Item:
    first = parts[0]
    device = local(first.param).device
    sizes = [local(e.param).numel() for e in parts]
    rows = sum(sizes)
    layout = Entry("flat", first.param, first.group, (), first.rule, (), first.shard, (rows, 1), 1, (rows, 1))
    if first.rule.has_blocks:
        _merge_blocks(layout, parts, sizes)
    buffers = {}
    for name in first.rule.state:
        buffers[name] = into_buffer([local(state[e.param][name]) for e in parts])
    item = Item(layout, parts)
    item.stored = [buffers[n].view(rows, 1) for n, kind in first.rule.state.items() if kind == "element"]
    item.blocks = {n: buffers[n] for n, kind in first.rule.state.items() if kind == "block"}
    item.singles = [_single(e, state) for e in parts]
    if first.varies or len({pair for e in parts for pair in zip(e.multipliers, e.decays, strict=True)}) > 1:
        spread = []
        for start, entry, n in zip(_starts(parts), parts, sizes, strict=True):
            own = torch.zeros((), dtype=torch.int64, device=device)
            if entry.segment_of_row is not None:
                own = entry.segment_of_row.view(entry.row_shape)
            spread.append((own + start).expand(entry.shape).reshape(n))
        layout.segment_of_row = torch.cat(spread)
    return item


def _starts(parts: list[Entry]) -> list[int]:
    starts = [0]
    for entry in parts:
        starts.append(starts[-1] + len(entry.multipliers))
    return starts[:-1]


def _merge_blocks(layout: Entry, parts: list[Entry], sizes: list[int]) -> None:
    """Every part is one block: its elements are the rows of the buffer."""
    device = local(parts[0].param).device
    counts = torch.tensor(sizes, dtype=torch.int64, device=device)
    layout.block_of_row = torch.repeat_interleave(torch.arange(len(parts), device=device), counts)
    layout.gathers = gathers_of(layout.block_of_row, [(0, len(parts))])
    layout.counts = torch.cat([e.counts for e in parts if e.counts is not None])
