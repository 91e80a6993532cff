"""What a run notes down of its optimizer: what moves each segment, and at a cadence the multiplier of each role."""

from typing import Any

from sharpwise.engine.optimizer import BlockOptimizer

MOVED = ("name", "rows", "rule", "cut", "decay", "storage", "bytes", "backend", "why")


def explained(optimizer: Any) -> dict[str, Any]:
    """What `explain()` says of each segment and does not change along a run; no rows of another library's optimizer."""
    rows = optimizer.explain() if isinstance(optimizer, BlockOptimizer) else ()
    return {"columns": list(MOVED), "rows": [[row[name] for name in MOVED] for row in rows]}


def multipliers_by_role(optimizer: Any) -> dict[str, float | list[float]]:
    """The multiplier of the learning rate of each role; a list where layers differ, in their order, the rest last.

    Where segments of a role and layer differ, as a matrix and its bias may, it is their mean over elements.
    """
    found: dict[str, dict[float, list[tuple[float, int]]]] = {}
    segments = {(segment.name, segment.describe_rows()): segment for segment in optimizer.blocks}
    for row in optimizer.lr_multipliers():
        segment = segments[row["name"], row["rows"]]
        layer = float("inf") if segment.layer is None else segment.layer
        own = found.setdefault(str(segment.role), {}).setdefault(layer, [])
        own.append((float(row["multiplier"]), segment.numel))
    result: dict[str, float | list[float]] = {}
    for role, by_layer in found.items():
        values = [_mean(by_layer[layer]) for layer in sorted(by_layer)]
        result[role] = values[0] if len(set(values)) == 1 else values
    return result


def _mean(values: list[tuple[float, int]]) -> float:
    if len({m for m, _ in values}) == 1:
        return values[0][0]
    return sum(m * size for m, size in values) / max(sum(size for _, size in values), 1)
