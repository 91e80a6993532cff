"""What an optimizer does, per segment, as tables."""

from typing import Any

from sharpwise.engine.stepper import Stepper
from sharpwise.table import Table


def lr_table(stepper: Stepper) -> Table:
    """Per segment: its multiplier and its learning rate as they are now."""
    rows = [
        (s.name, str(s.role), str(s.block_type), s.layer, s.describe_rows(), m, float(e.group["lr"]) * m)
        for e in stepper.entries
        for s, m in zip(e.segments, stepper.multipliers.now(e), strict=True)
    ]
    return Table(("name", "role", "type", "layer", "rows", "multiplier", "lr"), rows)


def explanation(stepper: Stepper, state: Any, storage: str) -> Table:
    """Per segment: which rule and cut it gets, how many blocks, its multiplier, decay, storage and state bytes."""
    rows = []
    for entry in stepper.entries:
        own = state[entry.param]
        element = sum(t.element_size() for n, t in own.items() if entry.rule.state.get(n) == "element")
        block = sum(t.element_size() for n, t in own.items() if entry.rule.state.get(n) == "block")
        wd = float(entry.group["weight_decay"])
        parts = zip(entry.segments, entry.cuts, entry.decays, stepper.multipliers.now(entry), strict=True)
        for s, cut, decays, m in parts:
            blocks = s.blocks(cut)
            size = s.numel * element + (blocks * block if cut != "element" else 0)
            how = (entry.rule.name, cut, blocks, m, wd * decays, storage, size)
            rows.append((s.name, str(s.role), s.describe_rows(), *how))
    columns = ("name", "role", "rows", "rule", "cut", "blocks", "multiplier", "decay", "storage", "bytes")
    return Table(columns, rows)
