"""A parameter as views: what each rule moves of it, and how that is laid out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharpwise.blocks import Cut, Segment
from sharpwise.engine.layout import Layouts
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import MatrixRule, Rule
from sharpwise.shards import Shard, local


def views_of(
    name: str,
    param: Tensor,
    group: dict[str, Any],
    segments: tuple[Segment, ...],
    rule: Rule,
    layouts: Layouts,
    shard: Shard | None = None,
) -> tuple[ParamView, ...]:
    """A parameter as views: one per rule that its segments get, in the order of their first segments.

    `shard`: which part `param` is, where that is planned. None: it is asked.

    Raises:
        ValueError: if its segments disagree on the output dimension, or that is neither the first nor the last and
            they are several, or cut by it.
    """
    own = of_group(rule, group)
    parts: dict[Rule, list[tuple[int, Segment, Cut]]] = {}
    for i, (segment, (kind, cut)) in enumerate(zip(segments, own.place(segments), strict=True)):
        if lacking := [key for key in kind.hyperparameters if key not in kind.settings(group)]:
            raise ValueError(
                f"{name}: rule {rule.name!r} gives {segment.role} the rule {kind.name!r}, and has no "
                f"{', '.join(lacking)} for it; name all that its rules need among its hyperparameters"
            )
        parts.setdefault(kind, []).append((i, segment, cut))
    shard = shard or Shard.of(param)
    found = []
    for kind, members in parts.items():
        numbers, mine, cuts = (tuple(column) for column in zip(*members, strict=True))
        rowless = _rowless(mine, kind, cuts)
        if rowless:
            first = int(mine[0].stacked)
            mine = (replace(mine[0], dim=first, start=0, length=-1, stride=0, count=1, heads=None),)
        view = ParamView(name, param, group, mine, kind, cuts, shard, numbers=numbers, rowless=rowless)
        if len(parts) > 1:
            view.part = "+".join(dict.fromkeys(str(s.role) for s in mine))
        _see(view, segments, layouts)
        found.append(view)
    roles = [role for view in found for role in {str(s.role) for s in view.segments}]
    if twice := next((role for role in roles if roles.count(role) > 1), ""):
        raise ValueError(
            f"{name}: rule {rule.name!r} gives segments of one role, {twice}, different rules: their state would have "
            f"one name; give all {twice} rows of a parameter one rule"
        )
    for view in found:
        view.siblings = tuple(found)
    _check_parts(found)
    return tuple(found)


def of_group(rule: Rule, group: Mapping[str, Any]) -> Rule:
    """A rule with the hyperparameters of a group."""
    values = {key: group[key] for key in rule.defaults}
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return replace(rule, **own)  # type: ignore[type-var]


def _at_an_end(segment: Segment) -> bool:
    """Whether the output dimension is the first, or the last of a matrix; of stacked ones alike."""
    dims = len(segment.shape) - segment.stacked
    return (
        dims < 2 or segment.first_dim == int(segment.stacked) or (dims == 2 and segment.dim == len(segment.shape) - 1)
    )


def _rowless(segments: Sequence[Segment], rule: Rule, cuts: Sequence[Cut]) -> bool:
    """Whether an output dimension lies in the middle, and nothing that the rule does goes by it."""
    one = len(segments) == 1 and segments[0].whole and not _at_an_end(segments[0])
    return one and (not rule.has_blocks or cuts[0] not in ("row", "head"))


def _check_parts(views: Sequence[ParamView]) -> None:
    for view in views:
        whole = isinstance(view.rule, MatrixRule)
        flat = not all(s.is_matrix and len(s.inputs) == 1 for s in view.segments)
        if (whole and (flat or view.part)) or (view.rule.reductions and flat):
            what = f"the shape {tuple(view.param.shape)}" if not view.part else f"its {view.part} rows alone"
            raise ValueError(f"{view.name}: rule {view.rule.name!r} is for matrices, got {what}")


def _see(view: ParamView, segments: Sequence[Segment], layouts: Layouts) -> None:
    """Lay a view out: its rows, and its blocks."""
    inner, segments = local(view.param), view.segments if view.rowless else segments
    first, shape = segments[0], tuple(inner.shape)
    if len({s.geometry for s in segments}) > 1:
        raise ValueError(f"{view.name}: its segments disagree on the output dimension")
    if not _at_an_end(first):
        along = "blocks along it" if len(segments) == 1 else f"the roles {', '.join(str(s.role) for s in segments)}"
        raise ValueError(
            f"{view.name}: output dimension {first.dim} of shape {shape} is neither the first nor the last, and has "
            f"{along}; give it one role and dim=0 in an override, and it is one block (AdamMini: cut='tensor')"
        )
    by_row = len(shape) < 2 or first.first_dim == (1 if first.stacked else 0)
    if not by_row:
        view.whole_shape, view.dim = shape, len(shape) - 2
    elif len(shape) < 2:
        view.whole_shape = (math.prod(shape), 1)
    else:
        view.whole_shape = (math.prod(shape[: first.dim + 1]), math.prod(shape[first.dim + 1 :]))
    if view.part or len(view.segments) > 1 or view.rule.has_blocks:
        cuts = view.cuts if view.rule.has_blocks else None
        device = torch.device("cpu") if inner.device.type == "meta" else inner.device
        view.layout = layouts.of(view.segments, cuts, not view.part, shape, view.shard, device)
    rows, n = view.layout.rows, view.whole_shape[0 if by_row else -1]
    if rows is not None:
        n = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
    view.shape = (n, view.whole_shape[1]) if by_row else (*shape[:-1], n)
    view.row_shape = (n, 1) if by_row else (shape[0], 1, n) if first.stacked else (1, n)
