"""What a run wrote down of its blocks: multipliers of the learning rate, and sizes of updates."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sharpwise.blocks.roles import BLOCK_TYPE
from sharpwise.report.curves import Array
from sharpwise.report.run import RunData, lookup

OUTSIDE = "outside the layers"


def multipliers_at(run: RunData, steps: Array) -> dict[str, Array]:
    """Multiplier of each role at these steps, as last measured before (or first, where none was): [layers, steps]."""
    records = [(record["step"], record["multipliers"]) for record in run.diagnostics if "multipliers" in record]
    records = [(step, found) for step, found in records if isinstance(found, Mapping)]
    if not records:
        return {}
    last = np.searchsorted(np.array([step for step, _ in records]), steps, side="right") - 1
    result = {}
    for role in dict.fromkeys(role for _, found in records for role in found):
        values = [found.get(role) for _, found in records]
        layers = max(len(value) if isinstance(value, list) else 1 for value in values)
        rows = np.array([_spread_out(value, layers) for value in values], dtype=np.float64)
        result[str(role)] = rows[np.maximum(last, 0)].T
    return result


def _spread_out(value: Any, layers: int) -> list[float]:
    if isinstance(value, list):
        return value if len(value) == layers else [math.nan] * layers
    return [math.nan if value is None else value] * layers


def factors(run: RunData) -> list[dict[str, float | None]]:
    """The multiplier of each segment of the block map, as it was measured last."""
    latest = {role: rows[:, 0] for role, rows in multipliers_at(run, np.array([math.inf])).items()}
    names = layer_names(run)
    found: list[dict[str, float | None]] = []
    for segment in run.blocks or ():
        values, layers = latest.get(str(segment.role), np.empty(0)), names[str(segment.role)]
        i = layers.index(_layer_name(segment.layer)) if len(values) == len(layers) > 1 else 0
        known = len(values) in (1, len(layers)) and math.isfinite(values[i])
        found.append({"now": float(values[i]) if known else None})
    return found


def explained(run: RunData) -> dict[tuple[str, str], dict[str, Any]]:
    """What moves each segment, by its name and rows; nothing where the run did not note it."""
    columns, rows = lookup(run.facts, "explained", "columns"), lookup(run.facts, "explained", "rows")
    if not isinstance(columns, list) or not isinstance(rows, list):
        return {}
    whole = (dict(zip(map(str, columns), row, strict=True)) for row in rows if _as_long(row, columns))
    return {(str(own.get("name")), str(own.get("rows"))): own for own in whole}


def _as_long(row: Any, columns: list[Any]) -> bool:
    return isinstance(row, list) and len(row) == len(columns)


def layer_names(run: RunData) -> dict[str, tuple[str, ...]]:
    """What the multipliers of a role belong to: its layers in order, and then what lies outside of them."""
    found: dict[str, set[int | None]] = {}
    for segment in run.blocks or ():
        found.setdefault(str(segment.role), set()).add(segment.layer)
    return {
        role: tuple(_layer_name(layer) for layer in sorted(layers, key=lambda n: math.inf if n is None else n))
        for role, layers in found.items()
    }


def _layer_name(layer: int | None) -> str:
    return OUTSIDE if layer is None else f"layer {layer}"


def types_of(roles: Iterable[str]) -> dict[str, str]:
    """The block type of each role."""
    known = {str(role): str(kind) for role, kind in BLOCK_TYPE.items()}
    return {role: known.get(role, "Other") for role in roles}


def updates_by_type(run: RunData, record: Mapping[str, Any]) -> dict[str, float]:
    """Relative update sizes of block types from those of their roles: exact where sizes are known, else their mean."""
    relative, rms = _positive(record["update_relative"]), _positive(record.get("update_rms"))
    types = types_of(relative)
    counts: dict[str, int] = {}
    for segment in run.blocks or ():
        counts[str(segment.role)] = counts.get(str(segment.role), 0) + segment.numel
    result = {}
    for kind in set(types.values()):
        roles = [role for role in relative if types[role] == kind]
        if all(role in rms and role in counts for role in roles):
            moved = {role: counts[role] * rms[role] * rms[role] for role in roles}
            size = sum(moved[role] / relative[role] / relative[role] for role in roles)
            result[kind] = math.sqrt(sum(moved.values()) / size) if 0 < size < math.inf else math.nan
        else:
            result[kind] = sum(relative[role] for role in roles) / len(roles)
    return result


def _positive(values: Any) -> dict[str, float]:
    """The numbers above 0 in a table, and nothing of what is none."""
    items = values.items() if isinstance(values, Mapping) else ()
    return {key: float(v) for key, v in items if isinstance(v, (int, float)) and 0 < v < math.inf}
