"""Measurements for block_lrs, a number per segment: of second moments, gradients, weights, or by a probe of the model.

Sums are reduced over the processes that hold parts, so that all find the same numbers. Those are rounded to 24 bits:
the order in which processes sum does not show in them.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.block_lr import MeasuredLR
from sharpwise.engine.items import SMALL
from sharpwise.engine.kernels import CHUNK, row_sums
from sharpwise.engine.mesh import Bucket, OwnerExchange, ReduceGroup
from sharpwise.engine.options import Options
from sharpwise.engine.plan import Entry
from sharpwise.rules.base import Rule
from sharpwise.shards import Shard, local

Found = list[list[float]]
"""Per entry, per segment; NaN where there is nothing."""


def check_sources(options: Options, rule: Rule, has_model: bool, who: str) -> None:
    """Raise ValueError unless every source of the block_lr can be measured, and its phase is known."""
    for source in () if options.block_lr is None else options.block_lr.sources:
        if source.measures == "second_moment" and rule.second_moment is None:
            raise ValueError(f"{who}: {no_second_moment_message(source, rule.name)}")
        if source.measures == "probe" and (options.probe_batches is None or not has_model):
            batches = "probe_batches=, a list of batches as sharpwise.probes.sharpness takes them"
            lacks = [] if has_model else [("the model", "the model, first or as model=")]
            lacks += [("batches to measure on", batches)] if options.probe_batches is None else []
            what, give = (" and ".join(words) for words in zip(*lacks, strict=True))
            raise ValueError(f"{who}: block_lr {source.name!r} with source='probe' lacks {what}; give {give}")
        try:
            source.check_length(options.total_steps)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from None


def no_second_moment_message(source: MeasuredLR, rule: str) -> str:
    """Message for a rule that keeps no second moment."""
    return (
        f"block_lr {source.name!r} goes by the second moment, which {rule!r} does not keep; AdamW and AdamMini do, and "
        f"source='probe' needs none"
    )


def measure(
    source: MeasuredLR,
    entries: Sequence[Entry],
    state: Any,
    group: ReduceGroup,
    probe: Callable[[], Sequence[Sequence[float]]],
    exact: bool = True,
) -> Found:
    """Measure what `source` asks for, of these entries. Collective: every process calls it at the same time."""
    if source.measures == "gradient":
        found = gradients(source, entries, group)
    elif source.measures == "second_moment":
        found = [[total / max(s.numel, 1) for total, s in zip(own, entry.segments, strict=True)]
                 for entry, own in zip(entries, second_moments(entries, state, group, exact), strict=True)]  # fmt: skip
    elif source.measures == "matrix":
        found = matrices(source, entries, group)
    elif source.measures == "probe":
        found = [list(own) for own in probe()]
    else:
        raise TypeError(f"{source.name}: nothing here knows how to measure {source.measures!r}")
    return [[_rounded(value) for value in own] for own in found]


def _rounded(value: float) -> float:
    if not math.isfinite(value):
        return math.nan
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24) / 2**24, exponent) if exponent < 1000 else value


# --- second moments --------------------------------------------------------------------------------------------------


def second_moments(entries: Sequence[Entry], state: Any, group: ReduceGroup, exact: bool = True) -> Found:
    """Sums of v / (1 - b2^t) over the elements of each segment; 0 of parameters that have not taken a step.

    exact: in fp64 throughout; else rows are added in fp32, at the speed of memory, before the sums left in fp64.
    """
    if not entries:
        return []
    bucket = Bucket(group)
    partials = [bucket.add(*_moments(entry, state[entry.param], exact)) for entry in entries]
    bucket.reduce()
    sums = iter(torch.cat([partial.values for partial in partials]).tolist())
    result = []
    for entry, t in zip(entries, steps_taken(entries, state), strict=True):
        correction = 1 - entry.rule.second_moment_decay(entry.group) ** t if t else math.inf
        result.append([next(sums) / correction for _ in entry.segments])
    return result


def steps_taken(entries: Sequence[Entry], state: Any) -> list[float]:
    """Steps per entry; read together, as each reading of an accelerator waits for it."""
    return torch.stack([local(state[entry.param]["step"]).double() for entry in entries]).tolist() if entries else []


def _moments(entry: Entry, own: dict[str, Tensor], exact: bool) -> tuple[Tensor, Shard]:
    """Sums of v over the local elements of each segment, fp64 [segments]."""
    name = entry.rule.second_moment
    assert name is not None
    v = own[name]
    if entry.rule.state[name] == "block":  # every process has those of all blocks
        assert entry.counts is not None
        blocks = v.double() * entry.counts
        if len(entry.segments) == 1:
            return blocks.sum().view(1), Shard.of(v)
        sizes = [s.blocks(c) for s, c in zip(entry.segments, entry.cuts, strict=True)]
        return torch.stack([part.sum() for part in blocks.split(sizes)]), Shard.of(v)
    exact = exact or entry.param.numel() <= SMALL  # of the whole parameter, not of the shard
    dim = -1 if entry.segment_of_row is None else entry.dim  # along memory, where that will do
    exact = exact or local(v).device.type != "cpu"  # where asking below would wait
    rows = row_sums(entry.view(v), dim) if exact else entry.view(v).sum(dim, dtype=torch.float32)
    if not exact and not rows.isfinite().all():  # a sum may be beyond fp32 where no v is
        rows = row_sums(entry.view(v), dim)
    return _by_segment(entry, rows.double()), entry.shard


def _by_segment(entry: Entry, rows: Tensor) -> Tensor:
    """One number per local row -> sums per segment."""
    rows = rows.reshape(-1)
    if entry.segment_of_row is None:
        return rows.sum().view(1)
    return rows.new_zeros(len(entry.segments)).index_add_(0, entry.segment_of_row, rows)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(source: MeasuredLR, entries: Sequence[Entry], group: ReduceGroup) -> Found:
    """What `source` makes of the gradient of each segment; NaN where there is none.

    Two collectives, in units of the largest element: squares of large or tiny ones have no double.
    """
    active = [entry for entry in entries if entry.param.grad is not None]
    largest, sums = Bucket(group, "max"), Bucket(group)
    scales = [largest.add(_largest(entry), entry.shard) for entry in active]
    largest.reduce()
    partials = [sums.add(_sums(entry, scale.values), entry.shard) for entry, scale in zip(active, scales, strict=True)]
    sums.reduce()
    found = {}
    for entry, partial in zip(active, partials, strict=True):
        totals, squares = partial.values.tolist()
        parts = zip(entry.segments, totals, squares, strict=True)
        found[id(entry)] = [source.of_gradient(s.numel, total, square) for s, total, square in parts]
    return [found.get(id(entry), [math.nan] * len(entry.segments)) for entry in entries]


def _gradient(entry: Entry) -> Tensor:
    grad: Tensor = entry.param.grad  # type: ignore[assignment]
    return local(grad).contiguous().view(entry.shape)


def _largest(entry: Entry) -> Tensor:
    """The largest |g| of each segment, fp64 [segments]; NaN becomes infinite, which a maximum keeps."""
    g = _gradient(entry)
    found = g.new_zeros(len(entry.segments), dtype=torch.float64)
    if not g.numel():
        return found
    rows = g.abs().amax(entry.dim).double().nan_to_num(nan=math.inf).reshape(-1)
    if entry.segment_of_row is None:
        return found + rows.max()
    return found.scatter_reduce_(0, entry.segment_of_row, rows, "amax")


def _sums(entry: Entry, scales: Tensor) -> Tensor:
    """Sums of g and of g*g over the local elements of each segment, in units of `scales`: fp64 [2, segments]."""
    g = _gradient(entry)
    unit = torch.where(scales > 0, scales, 1.0).to(g.device)
    by_row = unit.view(1) if entry.segment_of_row is None else unit[entry.segment_of_row].view(entry.row_shape)
    size = max(1, CHUNK * max(g.shape[0], 1) // max(g.numel(), 1))
    units = by_row.split(size) if by_row.shape[0] == g.shape[0] > 1 else itertools.repeat(by_row)
    scaled = (part.double() / own for part, own in zip(g.split(size), units, strict=False))
    rows = [torch.stack([x.sum(entry.dim), (x * x).sum(entry.dim)]) for x in scaled]
    total = torch.stack(rows).sum(0) if entry.dim == 0 else torch.cat(rows, 1)
    return torch.stack([_by_segment(entry, own) for own in total])


# --- weights ---------------------------------------------------------------------------------------------------------


def matrices(source: MeasuredLR, entries: Sequence[Entry], group: ReduceGroup) -> Found:
    """What `source` makes of the matrices of each segment, computed by one owner and sent to all; NaN of all else."""
    read = [entry for entry in entries if any(source.reads(segment) for segment in entry.segments)]
    exchange = OwnerExchange(group, [entry.shard for entry in read])
    answers = exchange.reduce(
        [local(entry.param) for entry in read],
        [lambda whole, entry=entry: _of_matrices(source, entry, whole) for entry in read],
        [len(entry.segments) for entry in read],
    )
    found = {id(entry): answer.tolist() for entry, answer in zip(read, answers, strict=True)}
    return [found.get(id(entry), [math.nan] * len(entry.segments)) for entry in entries]


def _of_matrices(source: MeasuredLR, entry: Entry, whole: Tensor) -> Tensor:
    own = [source.of_matrices(s.matrices(whole)) if source.reads(s) else math.nan for s in entry.segments]
    return torch.tensor(own, dtype=torch.float64, device=whole.device)
