"""By which multiplier each role moves: what a run notes down at a cadence."""

from typing import Any


def multipliers_by_role(optimizer: Any) -> dict[str, float | list[float]]:
    """The multiplier of the learning rate of each role; a list where layers differ, in their order, the rest last."""
    found: dict[str, dict[float, float]] = {}
    for row in optimizer.lr_multipliers():
        layer = float("inf") if row["layer"] is None else row["layer"]
        found.setdefault(str(row["role"]), {})[layer] = float(row["multiplier"])
    result: dict[str, float | list[float]] = {}
    for role, by_layer in found.items():
        values = [by_layer[layer] for layer in sorted(by_layer)]
        result[role] = values[0] if len(set(values)) == 1 else values
    return result
