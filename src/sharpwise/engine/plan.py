"""The plan of a step: every parameter as one `Entry`, with its view, its blocks, its multipliers.

Built once, when parameters and state are bound; a step only reads it.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Segment
from sharpwise.engine.kernels import compute_dtype
from sharpwise.rules.base import Rule
from sharpwise.shards import Shard, local

OWN_SCALARS = {"step", "decay", "clip", "ok", "weight_decay", "multiplier"}
"""Names of scalars that the engine adds to those of a rule."""


class Run(NamedTuple):
    """Blocks of the same number of adjacent rows, one after the other: seen as rows, they need no table.

    Attributes:
        rows, blocks: which; size: rows of a block.
    """

    rows: slice
    blocks: slice
    size: int


@dataclass(eq=False)
class Entry:
    """One parameter: what it is, how it is seen, and where its numbers lie.

    Attributes:
        shape: of the view of the local part; `dim` is the dimension summed over, so that rows remain.
        row_shape: what a vector with one number per row is shaped to, to broadcast against the view.
        segment_of_row, block_of_row: int64 [local rows], None where all rows are alike, or every row is its own block.
        gathers: where the rows of the blocks are, in order: runs, or tables [blocks, rows] with -1 where not local.
        counts: elements of every block of the whole parameter, fp64 [n_blocks].
        multipliers: of the learning rate, one per segment; decays: whether weight decay applies, likewise.
        varies: whether multipliers change while training, each on its own; positive: whether none is ever 0.
    """

    name: str
    param: Tensor
    group: dict[str, Any]
    segments: tuple[Segment, ...]
    rule: Rule
    cuts: tuple[Cut, ...]
    shard: Shard
    shape: tuple[int, ...] = ()
    dim: int = 1
    row_shape: tuple[int, ...] = ()
    segment_of_row: Tensor | None = None
    block_of_row: Tensor | None = None
    gathers: "list[Run | Tensor]" = field(default_factory=list)
    counts: Tensor | None = None
    multipliers: tuple[float, ...] = (1.0,)
    varies: bool = False
    positive: bool = True
    decays: tuple[bool, ...] = (True,)

    @property
    def n_blocks(self) -> int:
        """Blocks of the whole parameter, 0 for an element-wise rule."""
        return sum(s.blocks(c) for s, c in zip(self.segments, self.cuts, strict=True)) if self.rule.has_blocks else 0

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return compute_dtype(self.param.dtype)

    @property
    def key(self) -> int:
        """A number of the parameter's name, for stochastic rounding."""
        return zlib.crc32(self.name.encode())

    def view(self, tensor: Tensor) -> Tensor:
        """The local part of a tensor of the parameter's shape, as rows."""
        return local(tensor).view(self.shape)

    @property
    def uniform(self) -> bool:
        """Whether all rows always have the same multiplier, and decay alike."""
        alike = not self.varies and len(set(zip(self.multipliers, self.decays, strict=True))) == 1
        return self.segment_of_row is None or alike

    def spread(self, blocks: Tensor) -> Tensor:
        """One number per block -> one per local row, shaped to broadcast."""
        rows = blocks if self.block_of_row is None else blocks[self.block_of_row]
        return rows.view(self.row_shape)

    def spread_segments(self, values: Sequence[float]) -> Tensor:
        """One number per segment -> fp64, one per local row."""
        assert self.segment_of_row is not None
        table = torch.tensor(values, dtype=torch.float64, device="cpu").to(
            self.segment_of_row.device, non_blocking=True
        )
        return table[self.segment_of_row].view(self.row_shape)

    def gather(self, rows: Tensor) -> Tensor:
        """Sums per local row [rows] -> sums per block [n_blocks], rows elsewhere counted as 0."""
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

    def element_index(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Global element numbers as the sum of a part per row of the view and a part per column, int64."""
        shape, own = tuple(self.param.shape), tuple(local(self.param).shape)
        leading = len(own) - 1 if self.dim != 1 or len(self.shape) > 2 else min(self.segments[0].dim + 1, len(own))
        rows = torch.zeros(1, dtype=torch.int64, device=device)
        columns = rows
        for d, (size, offset) in enumerate(zip(own, self.shard.offset, strict=True)):
            part = (torch.arange(size, device=device) + offset) * math.prod(shape[d + 1 :])
            if d < leading:
                rows = (rows[:, None] + part).view(-1)
            else:
                columns = (columns[:, None] + part).view(-1)
        return rows.view(*self.shape[:-1], 1), columns.view(*(1 for _ in self.shape[:-1]), -1)


Layouts = dict[Any, "RowLayout"]
"""Row layouts by geometry: the layers of a model share theirs."""


def build_entry(
    name: str, param: Tensor, group: dict[str, Any], segments: tuple[Segment, ...], rule: Rule, layouts: Layouts
) -> Entry:
    """Lay out one parameter.

    Raises:
        ValueError: if its segments disagree on the output dimension, or that is neither the first nor the last.
    """
    values = {key: group[key] for key in rule.defaults}
    own = replace(rule, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})  # type: ignore[type-var]
    assigned = [own.assign(segment) for segment in segments]
    kinds = {r for r, _ in assigned}
    if len(kinds) != 1:
        raise ValueError(f"{name}: its segments would need {len(kinds)} different rules, which is not supported")
    entry = Entry(name, param, group, segments, assigned[0][0], tuple(c for _, c in assigned), Shard.of(param))
    if entry.rule.reductions and param.ndim != 2:
        raise ValueError(f"{name}: rule {entry.rule.name!r} is for matrices, got the shape {tuple(param.shape)}")
    _lay_out_view(entry)
    if len(segments) > 1 or entry.rule.has_blocks:
        cuts = entry.cuts if entry.rule.has_blocks else None
        plain = tuple(replace(s, name="", layer=None, source="", tied=()) for s in segments)
        device = local(param).device
        key = (plain, cuts, tuple(local(param).shape), entry.shard.offset, device)
        if key not in layouts:
            layouts[key] = _lay_out_rows(entry, cuts, torch.device("cpu") if device.type == "meta" else device)
        found = layouts[key]
        entry.segment_of_row, entry.block_of_row = found.segment_of_row, found.block_of_row
        entry.gathers, entry.counts = found.gathers, found.counts
    return entry


def rehearse(rule: Rule, group: Mapping[str, Any]) -> set[str]:
    """Run a rule on a number, so that what fails in it fails before a step has written anything.

    Returns:
        The hyperparameters that its arithmetic reads off the rule, not off its scalars: at another value of one of
        these it is another rule.

    Raises:
        ValueError: for arithmetic that raises, or does not return what the rule says it keeps; for scalars that are
            called as the engine's own.
    """
    if rule.reductions or any(isinstance(group[k], Tensor) and group[k].device.type != "cpu" for k in rule.defaults):
        return set()  # its elements take a step with what the reductions find; reading a device would wait for it
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    state = {kind: {n: one for n, k in rule.state.items() if k == kind} for kind in ("element", "block")}
    twin, read = _watched(rule)
    try:
        s = twin.scalars(1, {k: live(group[k]) for k in rule.defaults})
        found = dict(twin.direction(one, state["element"], s)[0])
        if rule.has_blocks:
            found |= twin.block_phase(state["block"], one, s)[0]
    except Exception as error:
        raise ValueError(f"rule {rule.name!r} fails on a single number: {type(error).__name__}: {error}") from error
    if set(found) != set(rule.state):
        raise ValueError(f"rule {rule.name!r} keeps {sorted(rule.state)}, and its arithmetic returns {sorted(found)}")
    if taken := sorted(OWN_SCALARS & set(s)):
        raise ValueError(f"rule {rule.name!r} calls scalars {taken}: these names are the engine's; take others")
    return read & set(rule.defaults)


def live(value: Any) -> Any:
    """A hyperparameter as it is now: tensors on the CPU as floats, on a device left there."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else value.detach().double()
    if isinstance(value, (tuple, list)):
        return tuple(map(live, value))
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value  # NumPy's too


def _watched(rule: Rule) -> tuple[Rule, set[str]]:
    """A copy of a rule, and the names of what is read of it from now on."""
    read: set[str] = set()

    class Watched(type(rule)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    twin: Rule = Watched(**{f.name: getattr(rule, f.name) for f in fields(rule) if f.init})  # type: ignore[arg-type]
    read.clear()
    return twin, read


@dataclass(frozen=True)
class RowLayout:
    """See `Entry` for the fields."""

    segment_of_row: Tensor | None = None
    block_of_row: Tensor | None = None
    gathers: "list[Run | Tensor]" = field(default_factory=list)
    counts: Tensor | None = None


def _lay_out_view(entry: Entry) -> None:
    shape, first = tuple(local(entry.param).shape), entry.segments[0]
    if len({(s.dim, s.stacked) for s in entry.segments}) > 1:
        raise ValueError(f"{entry.name}: its segments disagree on the output dimension")
    if len(shape) < 2:
        entry.shape, entry.dim = (math.prod(shape), 1), 1
    elif first.dim == (1 if first.stacked else 0):
        rows = math.prod(shape[: first.dim + 1])
        entry.shape, entry.dim = (rows, math.prod(shape[first.dim + 1 :])), 1
    elif first.dim == len(shape) - 1 and len(shape) == (3 if first.stacked else 2):
        entry.shape, entry.dim = shape, len(shape) - 2
        entry.row_shape = (shape[0], 1, shape[2]) if first.stacked else (1, shape[1])
        return
    else:
        raise ValueError(
            f"{entry.name}: output dimension {first.dim} of shape {shape} is neither the first nor the last; "
            f"say dim=0 in an override if the parameter is one block"
        )
    entry.row_shape = (entry.shape[0], 1)


def _lay_out_rows(entry: Entry, cuts: tuple[Cut, ...] | None, device: torch.device) -> RowLayout:
    first = entry.segments[0]
    copies, out = first.copies, first.output_size
    mine = _local_rows(entry, copies, out, device)
    segment_of_row = None
    if len(entry.segments) > 1:
        segment_of = torch.zeros(copies, out, dtype=torch.int64, device=device)
        for i, segment in enumerate(entry.segments):
            segment_of[:, segment.row_index(device)] = i
        segment_of_row = segment_of.view(-1)[mine]
    if cuts is None:
        return RowLayout(segment_of_row)
    sizes = [segment.blocks(cut) for segment, cut in zip(entry.segments, cuts, strict=True)]
    counts = torch.cat(
        [
            torch.full((n,), s.numel / max(n, 1), dtype=torch.float64, device=device)
            for s, n in zip(entry.segments, sizes, strict=True)
        ]
    ).clamp(min=1)  # the mean of no elements is 0
    if cuts == ("row",) and len(mine) == copies * out:  # every row is its own block
        return RowLayout(segment_of_row, None, [Run(slice(0, len(mine)), slice(0, len(mine)), 1)], counts)
    block_of = torch.zeros(copies, out, dtype=torch.int64, device=device)
    begin, where = 0, []
    for segment, cut, n in zip(entry.segments, cuts, sizes, strict=True):
        copy = (n // copies) * torch.arange(copies, device=device)[:, None]
        block_of[:, segment.row_index(device)] = begin + segment.block_of_row(cut, device) + copy
        where.append((begin, n))
        begin += n
    block_of_row = block_of.view(-1)[mine]
    return RowLayout(segment_of_row, block_of_row, gathers_of(block_of_row, where), counts)


def _local_rows(entry: Entry, copies: int, out: int, device: torch.device) -> Tensor:
    """Which of all [copies * out] rows this process holds, or holds a part of."""
    everything = torch.arange(copies * out, device=device).view(copies, out)
    first, own, offset = entry.segments[0], tuple(local(entry.param).shape), entry.shard.offset
    if not own:
        return everything.view(-1)
    if first.stacked:
        everything = everything[offset[0] : offset[0] + own[0]]
    return everything[:, offset[first.dim] : offset[first.dim] + own[first.dim]].reshape(-1)


def gathers_of(block_of_row: Tensor, where: Sequence[tuple[int, int]]) -> list[Run | Tensor]:
    """Where the rows of blocks are, for ranges of blocks given by their first and their number; see `Entry`."""
    found: list[Run | Tensor] = []
    for begin, n in where:
        table = _rows_of_blocks(block_of_row, begin, n)
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


def _rows_of_blocks(block_of_row: Tensor, begin: int, n: int) -> Tensor:
    """Local rows of the blocks begin .. begin + n, padded with -1 (the appended zero): int64 [n, most rows]."""
    rows = torch.nonzero((block_of_row >= begin) & (block_of_row < begin + n)).view(-1)
    order = rows[torch.argsort(block_of_row[rows], stable=True)]
    owner = block_of_row[order] - begin
    sizes = torch.bincount(owner, minlength=n)
    table = torch.full((n, max(int(sizes.max()), 1) if n else 1), -1, dtype=torch.int64, device=rows.device)
    starts = torch.cumsum(sizes, 0) - sizes
    table[owner, torch.arange(len(order), device=rows.device) - starts[owner]] = order
    return table


def multiplier_map(segments: Sequence[Segment], values: Sequence[float]) -> Mapping[str, tuple[float, ...]]:
    """Multipliers per parameter name, in segment order, from one per segment of the model."""
    result: dict[str, tuple[float, ...]] = {}
    for segment, value in zip(segments, values, strict=True):
        result[segment.name] = (*result.get(segment.name, ()), value)
    return result
