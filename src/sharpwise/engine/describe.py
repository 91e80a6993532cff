"""What an optimizer does, per segment, as tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sharpwise.blocks import Segment
from sharpwise.engine.capture import fixed
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


def explanation(stepper: Stepper) -> Table:
    """Per segment: rule, cut and blocks, multiplier, decay, storage, state bytes, back end, and why no faster one."""
    control = stepper.options.control
    rows: list[tuple[Any, ...]] = []
    for view, i, s in _in_order(stepper):
        sizes = dict.fromkeys(("element", "block", "unit"), 0)
        shared = 0  # of all its segments together
        for name, kind in view.kinds().items():
            if kind not in sizes:
                shared += view.own[name].numel() * view.own[name].element_size()
            else:
                sizes[kind] += view.own[name].element_size()
        dtype = stepper.grad_dtype(view)
        choice = stepper.plan.choose(view, dtype)
        one_pass = view.rule.has_blocks and choice.backend.sums_blocks(stepper.plan.spec(view, dtype))
        moved_by = f"{choice.backend.name} (one pass)" if one_pass else choice.backend.name
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
        size += view.units_of(s) * sizes["unit"]
        why = "; ".join(filter(None, (choice.why, fixed(view) if stepper.captured else "")))
        how = (view.rule.name, cut, blocks, m, decay, storage, size, moved_by, why)
        rows.append((s.name, str(s.role), s.describe_rows(), *how))
        if control is not None:
            rows[-1] += (None if view.unit is None else str(control),)
    columns = ("name", "role", "rows", "rule", "cut", "blocks", "multiplier", "decay", "storage", "bytes")
    return Table((*columns, "backend", "why", *(["control"] if control is not None else [])), rows)


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
