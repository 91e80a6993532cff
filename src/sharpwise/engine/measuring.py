"""Measurements for block_lrs, a number per segment: of moments, gradients, weights, or by a probe of the model.

Sums are reduced over the processes that hold parts, so that all find the same numbers. Those are rounded to 24 bits:
the order in which processes sum does not show in them.
"""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sharpwise.block_lr import MeasuredLR
from sharpwise.engine.backends.reference import CHUNK
from sharpwise.engine.counter import values_of
from sharpwise.engine.mesh import Bucket, OwnerExchange, ReduceGroup
from sharpwise.engine.norms import row_squares, row_sums
from sharpwise.engine.options import Options
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import Rule
from sharpwise.shards import Shard, local
from sharpwise.storage import Dense

logger = logging.getLogger(__name__)

Found = list[list[float]]
"""Per view, per segment; NaN where there is nothing."""


def check_sources(options: Options, rule: Rule, has_model: bool, who: str) -> None:
    """Raise ValueError unless every source of the block_lr can be measured, and its phase is known."""
    for source in () if options.block_lr is None else options.block_lr.sources:
        lacks_moment = source.measures in _OF_MOMENTS and rule.second_moment is None
        if lacks_moment or (source.measures in _OF_BOTH and rule.first_moment is None):
            raise ValueError(f"{who}: {no_second_moment_message(source, rule.name)}")
        if source.measures == "centred" and not rule.momentum_of(rule.defaults):
            raise ValueError(
                f"{who}: block_lr {source.name!r} with source='centred' tells the variance of gradients from their "
                f"mean, which betas={rule.defaults['betas']} do not average; give a first beta above 0"
            )
        if source.probed and (options.probe_batches is None or not has_model):
            batches = "probe_batches=, a list of batches as sharpwise.probes.sharpness takes them"
            lacks = [] if has_model else [("the model", "the model, first or as model=")]
            lacks += [("batches to measure on", batches)] if options.probe_batches is None else []
            what, give = (" and ".join(words) for words in zip(*lacks, strict=True))
            own = getattr(source, "source", source.measures)
            raise ValueError(f"{who}: block_lr {source.name!r} with source={own!r} lacks {what}; give {give}")
        try:
            source.check_length(options.total_steps)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from None
        if doubts := source.doubts(options.total_steps):
            logger.warning("%s: block_lr %s: %s", who, source, doubts)


_OF_BOTH = ("centred", "directional")
_OF_MOMENTS = ("second_moment", *_OF_BOTH)


def no_second_moment_message(source: MeasuredLR, rule: str) -> str:
    """Message for a rule that does not keep the moments that a source goes by."""
    what = "both moments" if source.measures in _OF_BOTH else "the second moment"
    return (
        f"block_lr {source.name!r} goes by {what}, which {rule!r} does not keep; AdamW and AdamMini do, and "
        f"source='probe' needs none"
    )


def measure(
    source: MeasuredLR,
    views: Sequence[ParamView],
    group: ReduceGroup,
    probe: Callable[[Mapping[str, Tensor] | None], Sequence[Sequence[float]]],
) -> Found:
    """Measure what `source` asks for, of these views. Collective: every process calls it at the same time."""
    if source.measures == "gradient":
        found = gradients(source, views, group)
    elif source.measures == "second_moment":
        found = _means(views, second_moments(views, group))
    elif source.measures == "centred":
        found = _means(views, variances(views, group))
    elif source.measures == "matrix":
        found = matrices(source, views, group)
    elif source.measures in ("probe", "directional"):
        found = [list(own) for own in probe(updates(views) if source.measures == "directional" else None)]
    else:
        raise TypeError(f"{source.name}: nothing here knows how to measure {source.measures!r}")
    return [[_rounded(value) for value in own] for own in found]


def _rounded(value: float) -> float:
    if not math.isfinite(value):
        return math.nan
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24) / 2**24, exponent) if exponent < 1000 else value


def _means(views: Sequence[ParamView], sums: Found) -> Found:
    """Sums over the elements of each segment -> their means."""
    return [
        [total / max(s.numel, 1) for total, s in zip(own, view.segments, strict=True)]
        for view, own in zip(views, sums, strict=True)
    ]


# --- moments ---------------------------------------------------------------------------------------------------------


def second_moments(views: Sequence[ParamView], group: ReduceGroup) -> Found:
    """Sums of v / (1 - b2^t) over the elements of each segment; 0 of parameters that have not taken a step, NaN of
    segments whose rule keeps no v."""
    kept = [view for view in views if view.rule.second_moment is not None]
    bucket = Bucket(group)
    partials = [bucket.add(*_moments(view)) for view in kept]
    bucket.reduce()
    sums = iter(values_of([value for partial in partials for value in partial.values.unbind()]))
    found = {}
    for view, t in zip(kept, steps_taken(kept), strict=True):
        correction = 1 - view.rule.second_moment_decay(view.settings) ** t if t else math.inf
        found[id(view)] = [next(sums) / correction for _ in view.segments]
    return [found.get(id(view), [math.nan] * len(view.segments)) for view in views]


def steps_taken(views: Sequence[ParamView]) -> list[float]:
    """Steps per view; read together, as each reading of an accelerator waits for it."""
    return values_of([local(view.own["step"]) for view in views])


def _moments(view: ParamView) -> tuple[Tensor, Shard]:
    """Sums of v over the local elements of each segment, fp64 [segments]."""
    name = view.rule.second_moment
    assert name is not None
    v = view.own[name]
    if view.rule.state[name] == "block":  # every process has those of all blocks
        assert view.layout.counts is not None
        blocks = v.double() * view.layout.counts
        if len(view.segments) == 1:
            return blocks.sum().view(1), Shard.of(v)
        sizes = [s.blocks(c) for s, c in zip(view.segments, view.cuts, strict=True)]
        return torch.stack([part.sum() for part in blocks.split(sizes)]), Shard.of(v)
    return _by_segment(view, row_sums(_numbers(view, name), _along(view))), view.shard


def _along(view: ParamView) -> int:
    """The dimension to add up first: along memory, where that will do."""
    return -1 if view.layout.segment_of_row is None else view.dim


def _numbers(view: ParamView, name: str) -> Tensor:
    """One of its tensors of element state as numbers, in rows."""
    held = view.stored_as(name)
    return held.codes if isinstance(held.format, Dense) else held.decode(view.dtype)


def variances(views: Sequence[ParamView], group: ReduceGroup) -> Found:
    """Sums over the elements of each segment of (v-hat - m-hat^2) / (1 - U); NaN where the rule keeps no such moments,
    and before the second step.

    Of gradients g_s that are independent, with mean mu and variance sigma^2:

        v-hat = sum_s w_s g_s^2,  sum w_s = 1         E v-hat   = mu^2 + sigma^2
        m-hat = sum_s u_s g_s,    sum u_s = 1         E m-hat^2 = mu^2 + sigma^2 U,   U = sum u_s^2
        u_s = (1-b1) b1^(t-s) / (1-b1^t)              U = (1-b1) / (1+b1) (1+b1^t) / (1-b1^t)

    so that it is sigma^2 in the mean at every step t, and (1-b1) / (1+b1) what U tends to. U is 1 at the first step, of
    which no variance can be told. Where v is kept per block it is the mean of its elements', and nothing changes. With
    mean and variance that change while training v-hat is of the last 1 / (1-b2) steps, m-hat of the last 1 / (1-b1).
    One collective.
    """
    kept = [view for view in views if None not in (view.rule.first_moment, view.rule.second_moment)]
    bucket = Bucket(group)
    second = [bucket.add(*_moments(view)) for view in kept]
    first = [bucket.add(_squares_of_first(view), view.shard) for view in kept]
    bucket.reduce()
    sums = iter(values_of([value for partial in (*second, *first) for value in partial.values.unbind()]))
    v, m = ([[next(sums) for _ in view.segments] for view in kept] for _ in range(2))
    found = {}
    for view, t, of_v, of_m in zip(kept, steps_taken(kept), v, m, strict=True):
        b1, b2 = float(view.rule.momentum_of(view.settings)), view.rule.second_moment_decay(view.settings)
        if t > 1 and b1 > 0:
            left = 1 - (1 - b1) / (1 + b1) * (1 + b1**t) / (1 - b1**t)
            pairs = zip(of_v, of_m, strict=True)
            found[id(view)] = [(a / (1 - b2**t) - b / (1 - b1**t) ** 2) / left for a, b in pairs]
    return [found.get(id(view), [math.nan] * len(view.segments)) for view in views]


def _squares_of_first(view: ParamView) -> Tensor:
    """Sums of m*m over the local elements of each segment, fp64 [segments]."""
    assert view.rule.first_moment is not None
    return _by_segment(view, row_squares(_numbers(view, view.rule.first_moment), _along(view)))


def updates(views: Sequence[ParamView]) -> dict[str, Tensor]:
    """The direction m-hat / (sqrt(v-hat) + eps) in which the last step moved each parameter, by name and of its shape.

    Without multipliers and decay; 0 where no step was taken, and where the rule keeps no such moments.
    """
    found: dict[str, Tensor] = {}
    for view, t in zip(views, steps_taken(views), strict=True):
        whole = found.setdefault(view.name, torch.zeros_like(local(view.param), dtype=view.dtype))
        first, second = view.rule.first_moment, view.rule.second_moment
        if not t or first is None or second is None:
            continue
        m, v = _numbers(view, first).to(view.dtype), view.own[second]
        v = view.spread(v) if view.rule.state[second] == "block" else _numbers(view, second).to(view.dtype)
        b1, b2 = float(view.rule.momentum_of(view.settings)), view.rule.second_moment_decay(view.settings)
        eps = float(view.settings.get("eps", 0.0))
        _put(view, whole, m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps))
    return found


def _put(view: ParamView, whole: Tensor, rows: Tensor) -> None:
    """Write rows of a view to their places in a contiguous tensor of the parameter's shape."""
    seen, own = whole.view(view.whole_shape), view.layout.rows
    if own is None:
        seen.copy_(rows)
    elif view.by_row:
        seen[own] = rows
    else:
        seen[..., own] = rows


def _by_segment(view: ParamView, rows: Tensor) -> Tensor:
    """One number per local row -> sums per segment."""
    rows = rows.reshape(-1)
    if view.layout.segment_of_row is None:
        return rows.sum().view(1)
    return rows.new_zeros(len(view.segments)).index_add_(0, view.layout.segment_of_row, rows)


# --- gradients -------------------------------------------------------------------------------------------------------


def gradients(source: MeasuredLR, views: Sequence[ParamView], group: ReduceGroup) -> Found:
    """What `source` makes of the gradient of each segment; NaN where there is none.

    Two collectives, in units of the largest element: squares of large or tiny ones have no double.
    """
    active = [view for view in views if view.param.grad is not None]
    largest, sums = Bucket(group, "max"), Bucket(group)
    scales = [largest.add(_largest(view), view.shard) for view in active]
    largest.reduce()
    partials = [sums.add(_sums(view, scale.values), view.shard) for view, scale in zip(active, scales, strict=True)]
    sums.reduce()
    found = {}
    for view, partial in zip(active, partials, strict=True):
        totals, squares = partial.values.tolist()
        parts = zip(view.segments, totals, squares, strict=True)
        found[id(view)] = [source.of_gradient(s.numel, total, square) for s, total, square in parts]
    return [found.get(id(view), [math.nan] * len(view.segments)) for view in views]


def _gradient(view: ParamView) -> Tensor:
    grad: Tensor = view.param.grad  # type: ignore[assignment]
    return view.rows_of(grad)


def _largest(view: ParamView) -> Tensor:
    """The largest |g| of each segment, fp64 [segments]; NaN becomes infinite, which a maximum keeps."""
    g = _gradient(view)
    found = g.new_zeros(len(view.segments), dtype=torch.float64)
    if not g.numel():
        return found
    rows = g.abs().amax(view.dim).double().nan_to_num(nan=math.inf).reshape(-1)
    if view.layout.segment_of_row is None:
        return found + rows.max()
    return found.scatter_reduce_(0, view.layout.segment_of_row, rows, "amax")


def _sums(view: ParamView, scales: Tensor) -> Tensor:
    """Sums of g and of g*g over the local elements of each segment, in units of `scales`: fp64 [2, segments]."""
    g = _gradient(view)
    unit = torch.where(scales > 0, scales, 1.0).to(g.device)
    owner = view.layout.segment_of_row
    by_row = unit.view(1) if owner is None else unit[owner].view(view.row_shape)
    size = max(1, CHUNK * max(g.shape[0], 1) // max(g.numel(), 1))
    units = by_row.split(size) if by_row.shape[0] == g.shape[0] > 1 else itertools.repeat(by_row)
    scaled = (part.double() / own for part, own in zip(g.split(size), units, strict=False))
    rows = [torch.stack([x.sum(view.dim), (x * x).sum(view.dim)]) for x in scaled]
    total = torch.stack(rows).sum(0) if view.dim == 0 else torch.cat(rows, 1)
    return torch.stack([_by_segment(view, own) for own in total])


# --- weights ---------------------------------------------------------------------------------------------------------


def matrices(source: MeasuredLR, views: Sequence[ParamView], group: ReduceGroup) -> Found:
    """What `source` makes of the matrices of each segment, computed by one owner and sent to all; NaN of all else."""
    read = [view for view in views if any(source.reads(segment) for segment in view.segments)]
    exchange = OwnerExchange(group, [view.shard for view in read])
    answers = exchange.reduce(
        [local(view.param) for view in read],
        [lambda whole, view=view: _of_matrices(source, view, whole) for view in read],
        [len(view.segments) for view in read],
    )
    found = {id(view): answer.tolist() for view, answer in zip(read, answers, strict=True)}
    return [found.get(id(view), [math.nan] * len(view.segments)) for view in views]


def _of_matrices(source: MeasuredLR, view: ParamView, whole: Tensor) -> Tensor:
    own = [source.of_matrices(s.matrices(whole)) if source.reads(s) else math.nan for s in view.segments]
    return torch.tensor(own, dtype=torch.float64, device=whole.device)
