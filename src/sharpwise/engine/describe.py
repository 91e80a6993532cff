"""What an optimizer does, per segment, as tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sharpwise.blocks import Segment
from sharpwise.blocks.names import stem_and_number, with_numbers
from sharpwise.engine.capture import fixed
from sharpwise.engine.snr import factors_of
from sharpwise.engine.step import Stepper
from sharpwise.engine.view import ParamView
from sharpwise.table import Table


def lr_table(stepper: Stepper) -> Table:
    """Per segment: its multiplier and its learning rate as they are now."""
    rows = []
    for view, i, s in _in_order(stepper):
        m = stepper.multipliers.now(view)[i]
        what = str(s.role), str(s.block_type), s.layer, s.describe_rows()
        rows.append((s.name, *what, m, float(view.settings["lr"]) * m))
    return Table(("name", "role", "type", "layer", "rows", "multiplier", "lr"), rows)


def explanation(stepper: Stepper, verbose: bool = False) -> Table:
    """Per segment: rule, cut and blocks, multiplier, lr, decay, storage, state bytes, back end, and why no faster one.

    Printed, equal layers share a line unless it is `verbose`, the last line has the sums, and columns without any entry
    are left out.
    """
    control = stepper.options.control
    rows: list[tuple[Any, ...]] = []
    for view, i, s in _in_order(stepper):
        sizes = dict.fromkeys(("element", "block", "unit", "matrix"), 0)
        shared = 0  # of all its segments together
        for name, kind in view.kinds().items():
            if kind not in sizes:
                shared += view.own[name].numel() * view.own[name].element_size()
            else:
                sizes[kind] += view.own[name].element_size() * (3 if kind == "matrix" else 1)
        dtype = stepper.grad_dtype(view)
        choice = stepper.plan.choose(view, dtype)
        spec = stepper.plan.spec(view, dtype)
        moved_by = f"{choice.backend.name} (one pass)" if choice.backend.one_pass(spec) else choice.backend.name
        cut, m = view.cuts[i], stepper.multipliers.now(view)[i]
        blocks = s.blocks(cut)
        decay: Any = float(view.settings["weight_decay"]) * view.decays[i]
        if stepper.options.cautious and decay:
            decay = f"{decay:.4g} (cautious)"
        if view.holds:
            decay = "held"
        storage = "/".join(dict.fromkeys(view.formats[name].name for name in view.elements)) or "fp32"
        size = s.numel * sizes["element"] + shared * s.numel // max(1, sum(one.numel for one in view.segments))
        size += blocks * sizes["block"] if cut != "element" else 0
        size += view.units_of(s) * sizes["unit"] + s.copies * sizes["matrix"]
        why = "; ".join(filter(None, (choice.why, fixed(view) if stepper.captured else "")))
        how = (view.rule.name, cut, blocks, m, float(view.settings["lr"]) * m, decay, storage, size, moved_by, why)
        rows.append((s.name, str(s.role), s.describe_rows(), s.numel, *how))
        if control is not None:
            rows[-1] += (None if view.unit is None else str(control),)
            rows[-1] += (_snr_factor(view, i, control.snr_samples),) if control.snr_samples else ()
    columns: tuple[str, ...] = ("name", "role", "rows", "elements", "rule", "cut", "blocks", "multiplier", "lr")
    columns += ("decay", "storage", "bytes", "backend", "why", *([] if control is None else ["control"]))
    columns += ("snr_factor",) if control is not None and control.snr_samples else ()
    return Table(columns, rows, _shown(columns, rows if verbose else _by_layer(columns, rows)))


def _snr_factor(view: ParamView, i: int, samples: int) -> float | None:
    """The factor by gradient SNR of a segment as it is now, the mean over experts; None where none is measured."""
    if not view.has_snr:
        return None
    first = sum(s.copies for s in view.segments[:i])
    return float(factors_of(view, samples)[first : first + view.segments[i].copies].mean())


SUMS, RANGES = ("elements", "blocks", "bytes"), ("multiplier", "lr", "snr_factor")
"""Columns of which equal layers show the sum, and from where to where."""


def _by_layer(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """One row for all layers that differ in multiplier and learning rate at most."""
    groups: dict[tuple[Any, ...], list[tuple[int | None, tuple[Any, ...]]]] = {}
    for row in rows:
        stem, number = stem_and_number(row[0])
        alike = tuple(value for name, value in zip(columns, row, strict=True) if name not in ("name", *RANGES))
        groups.setdefault((stem, *alike), []).append((number, row))
    found = []
    for (stem, *_), members in groups.items():
        values = dict(zip(columns, zip(*(row for _, row in members), strict=True), strict=True))
        joined = {name: sum(values[name]) for name in SUMS}
        joined |= {name: _range(values[name]) for name in RANGES if name in values}
        joined["name"] = with_numbers(stem, [number for number, _ in members])
        found.append(tuple(joined.get(name, values[name][0]) for name in columns))
    return found


def _range(values: Sequence[Any]) -> Any:
    if None in values:
        return None
    low, high = min(values), max(values)
    return low if low == high else f"{low:.4g} to {high:.4g}"


def _shown(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Table:
    """With the sums below, and without columns that have nothing to say."""
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", None) for row in rows)]
    sums = ["total", *(sum(row[i] for row in rows) if columns[i] in ("elements", "bytes") else "" for i in kept[1:])]
    return Table([columns[i] for i in kept], [*([row[i] for i in kept] for row in rows), sums])


def representation(name: str, groups: Sequence[Mapping[str, Any]]) -> str:
    """The groups as torch shows them, but their parameters counted and not named."""
    lines = [f"{name} ("]
    for number, group in enumerate(groups):
        params = group["params"]
        shown = {**group, "params": f"{len(params)}, of {sum(p.numel() for p in params):,} elements"}
        shown.pop("param_names", None)
        lines += [f"Parameter Group {number}", *(f"    {key}: {shown[key]}" for key in sorted(shown))]
    return "\n".join([*lines, ")"])


def _in_order(stepper: Stepper) -> Iterator[tuple[ParamView, int, Segment]]:
    """All segments as they lie in their parameters: the view of each, its place there, and itself."""
    for first in stepper.views:
        if first is first.siblings[0]:
            own = [(number, view, i) for view in first.siblings for i, number in enumerate(view.numbers)]
            yield from ((view, i, view.segments[i]) for _, view, i in sorted(own, key=lambda one: one[0]))
