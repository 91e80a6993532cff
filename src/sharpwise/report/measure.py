"""Pictures of what probes measured: by block type, by layer, over training, and densities of spectra.

No figure says which quantity it shows: its title, on the page around it, does.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sharpwise.blocks.roles import BLOCK_TYPE
from sharpwise.probes.estimate import Estimate, Measurement
from sharpwise.report import figures
from sharpwise.report.curves import rounded
from sharpwise.report.plot import Figure

HEIGHT = 300
TYPE_OF = {str(role): str(kind) for role, kind in BLOCK_TYPE.items()}
ORDER = [*figures.TYPE_COLOURS, *TYPE_OF]
# Roles of one type share its colour, and differ in their dashes and marks.
STYLES = (("solid", "circle"), ("dot", "diamond"), ("dash", "square"), ("dashdot", "triangle-up"))


def by_type(measurement: Measurement, quantity: str | None = None, *, log: bool | None = None) -> Figure:
    """Bars, one per block type, with error bars where errors are known.

    Args:
        measurement: with estimates by type.
        quantity: which; it may be left out where there is only one.
        log: the scale; None takes a logarithmic one where positive values are far apart. What is not positive has no
            bar there.

    Raises:
        ValueError: there is nothing to draw; the message says what there is.
    """
    quantity, found = _chosen(measurement, quantity, "type")
    found = sorted(found, key=lambda e: place(e.of))
    log = _far_apart(e.value for e in found) if log is None else log
    figure = figures.figure("", _title(found, log), HEIGHT)
    if log:
        found = [e for e in found if e.value > 0] or _nothing(quantity)
        low, high = min(e.value for e in found) / 3, max(e.value + (e.error or 0) for e in found) * 1.8
        figures.logarithmic(figure, low, high)
    else:
        low, high = _range(found)
        figure.update_yaxes(range=[low, high], nticks=6)
    figure.add_bar(
        x=[figures.text(e.of) for e in found],
        y=rounded([e.value for e in found]),
        # Seen through, so that the lower half of an error bar shows.
        marker={
            "color": [figures.faded(_colour(e.of), 0.55) for e in found],
            "line": {"color": [_colour(e.of) for e in found], "width": 1.5},
        },
        error_y={
            "visible": any(e.error for e in found),
            "array": rounded([e.error or 0.0 for e in found]),
            "arrayminus": rounded([min(e.error or 0.0, max(e.value - low, 0.0)) for e in found]),
            "color": figures.INK,
            "thickness": 1.5,
            "width": 5,
        },
        customdata=[_said(e) for e in found],
        hovertemplate="%{x}: %{customdata}<extra></extra>",
    )
    figure.update_xaxes(type="category")
    figure.update_layout(margin={"r": 14, "b": 28})
    return figure


def by_layer(measurement: Measurement, quantity: str | None = None, *, log: bool | None = None) -> Figure:
    """A heat map: a row for each role (or block type), a column for each layer.

    Values are those of the roles of a layer where the measurement has them, else of their types, else means of those of
    its segments. Arguments and errors are those of `by_type`.
    """
    quantity, cells = _cells(measurement, quantity)
    log = _far_apart(e.value for own in cells.values() for e in own) if log is None else log
    names = sorted({name for name, _ in cells}, key=place, reverse=True)
    layers = sorted({layer for _, layer in cells})
    values = [[_mean(cells.get((name, layer), ()), log) for layer in layers] for name in names]
    known = [x for row in values for x in row if x is not None] or _nothing(quantity)
    ticks = _ticks(min(known), max(known), log)
    figure = figures.figure("layer", "", 70 + 28 * len(names))
    figure.add_heatmap(
        x=layers,
        y=names,
        z=values,
        customdata=[[_said_all(cells.get((name, layer), ())) for layer in layers] for name in names],
        hovertemplate="%{y}, layer %{x}: %{customdata}<extra></extra>",
        colorbar={
            "tickvals": [math.log10(t) if log else t for t in ticks], "ticktext": [short(t) for t in ticks],
        },
    )  # fmt: skip
    figure.update_xaxes(dtick=max(1, math.ceil(len(layers) / 12)), showline=False)
    figure.update_yaxes(showgrid=False, type="category")
    figure.update_layout(margin={"l": 64, "r": 60})
    return figure


def over_training(
    measurements: Iterable[Measurement], quantity: str | None = None, *, log: bool | None = None
) -> Figure:
    """A line per block type against steps, with a band of its errors.

    Args:
        measurements: of one probe, each with its `step`.
        quantity, log: as in `by_type`.

    Raises:
        ValueError: there is nothing to draw, or a measurement says no step.
    """
    ordered = list(measurements)
    if not ordered or any(m.step is None for m in ordered):
        raise ValueError("measurements over training need their steps: give each as measurement.at(step)")
    ordered.sort(key=lambda m: m.step or 0)
    quantity = _chosen(ordered[-1], quantity, "type")[0]
    curves: dict[str, list[tuple[int, Estimate]]] = {}
    for one in ordered:
        for e in one.select(by="type", quantity=quantity):
            if math.isfinite(e.value):
                curves.setdefault(e.of, []).append((one.step or 0, e))
    every = [e for points in curves.values() for _, e in points]
    log = _far_apart(e.value for e in every) if log is None else log
    if log:
        curves = {of: [(s, e) for s, e in points if e.value > 0] for of, points in curves.items()}
        every = [e for points in curves.values() for _, e in points] or _nothing(quantity)
    figure = figures.figure("step", _title(every, log), HEIGHT)
    low, high = _range(every)
    if log:
        low, high = min(e.value for e in every) / 2, max(e.value for e in every) * 2
    ends = figures.logarithmic(figure, low, high) if log else (low, high)
    labels = []
    for of in sorted((of for of, points in curves.items() if points), key=place):
        _line(figure, of, curves[of], low)
        last = curves[of][-1][1].value
        labels.append((figures.text(of), math.log10(last) if log else last, _colour(of)))
    if not log:
        figure.update_yaxes(range=[low, high], nticks=6)
    figures.label_ends(figure, labels, *ends, HEIGHT)
    figure.update_xaxes(nticks=6)
    return figure


def alpha_by_layer(measurement: Measurement) -> Figure:
    """Tail exponents against layers, a line per role; hollow marks are random matrices of the same shapes.

    Raises:
        ValueError: no matrix in a layer has an exponent.
    """
    _, cells = _cells(measurement, "alpha")
    _, random = _cells(measurement, "alpha of a random matrix")
    figure = figures.figure("layer", "alpha", HEIGHT)
    labels, every = [], []
    for name in sorted({name for name, _ in cells}, key=place):
        layers = sorted(layer for own, layer in cells if own == name)
        values = [_average(cells[name, layer]) for layer in layers]
        baseline = [_average(random[name, layer]) for layer in layers]
        dash, mark = _style(name)
        for y, hollow in ((values, False), (baseline, True)):
            figure.add_scatter(
                x=layers,
                y=rounded(y, 4),
                mode="markers" if hollow else "lines+markers",
                name=f"{name}, random" if hollow else name,
                line={"color": _colour(name), "width": 2, "dash": dash},
                marker={"symbol": f"{mark}-open" if hollow else mark, "size": 6, "color": _colour(name)},
                opacity=0.55 if hollow else 1,
                hovertemplate=f"{name}{', random matrix' * hollow}<br>layer %{{x}}: %{{y:.2f}}<extra></extra>",
            )
        every += values + baseline
        labels.append((figures.text(name), values[-1], _colour(name)))
    low, high = figures.padded(min(every), max(every), 0.06)
    figure.update_yaxes(range=[low, high], nticks=7)
    figures.label_ends(figure, labels, low, high, HEIGHT)
    figure.update_xaxes(dtick=max(1, math.ceil(len({layer for _, layer in cells}) / 12)))
    return figure


def density(
    values: Mapping[str, Sequence[float]],
    weights: Mapping[str, Sequence[float]] | None = None,
    *,
    log: bool = True,
    bins: int = 60,
) -> Figure:
    """Densities of eigenvalues, a line each.

    Args:
        values: by name of what they are of, as the `arrays` of a spectrum.
        weights: of the values, by the same names, as stochastic Lanczos quadrature gives them; None weighs all alike.
        log: densities of the logarithm of positive values; else of the values themselves, on a logarithmic y axis, as
            most eigenvalues of a Hessian are near zero.
        bins: over the range of all values.

    Raises:
        ValueError: there are no values to draw.
    """
    kept = {name: _to_draw(own, None if weights is None else weights[name], log) for name, own in values.items()}
    kept = {name: pair for name, pair in kept.items() if len(pair[0])} or _nothing("eigenvalues")
    low = min(float(x.min()) for x, _ in kept.values())
    high = max(float(x.max()) for x, _ in kept.values())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    figure = figures.figure("eigenvalue" + " (log scale)" * log, "density" + " (log scale)" * (not log), HEIGHT)
    palette = list(figures.TYPE_COLOURS.values())
    for i, (name, (x, w)) in enumerate(kept.items()):
        y = np.histogram(x, edges, weights=w)[0] / w.sum() / (edges[1] - edges[0])
        figure.add_scatter(
            x=rounded(10**middles if log else middles),
            y=rounded(y) if log else [float(f"{v:.4g}") if v > 0 else None for v in y],
            mode="lines",
            line={"shape": "hvh", "width": 2, "color": palette[i % len(palette)], "dash": STYLES[i // 7 % 4][0]},
            name=figures.text(name),
            hovertemplate=f"{figures.text(name)}<br>%{{x:.3g}}: %{{y:.3g}}<extra></extra>",
        )
    figure.update_layout(
        showlegend=len(kept) > 1,
        margin={"r": 14},
    )
    if log:
        figure.update_xaxes(type="log", nticks=5)
    else:
        figure.update_yaxes(type="log", nticks=6)
    return figure


# --- parts -----------------------------------------------------------------------------------------------------------


def _chosen(measurement: Measurement, quantity: str | None, by: str) -> tuple[str, list[Estimate]]:
    there = [e for e in measurement if e.by == by and math.isfinite(e.value)]
    quantities = list(dict.fromkeys(e.quantity for e in there))
    if quantity is None and len(quantities) == 1:
        quantity = quantities[0]
    if quantity not in quantities:
        raise ValueError(
            f"{measurement.probe}: no {quantity or 'single quantity'} by {by}; there is "
            f"{', '.join(quantities) or 'nothing by ' + by}"
        )
    return quantity, [e for e in there if e.quantity == quantity]


Cells = dict[tuple[str, int], list[Estimate]]


def _cells(measurement: Measurement, quantity: str | None) -> tuple[str, Cells]:
    """Estimates by role (or type) and layer."""
    try:
        quantity, found = _chosen(measurement, quantity, "layer")
        roles = [e for e in found if e.of in TYPE_OF]
        found = roles or found
    except ValueError:
        quantity, found = _chosen(measurement, quantity, "segment")
    cells: Cells = {}
    for e in found:
        name = e.of if e.by == "layer" else str(e.notes.get("role", ""))
        if e.layer is not None and name:
            cells.setdefault((name, e.layer), []).append(e)
    return quantity, cells or _nothing(f"{quantity} in layers")


def _nothing(what: str) -> Any:
    raise ValueError(f"there is no {what} to draw")


def _average(found: Sequence[Estimate]) -> float:
    return sum(e.value for e in found) / len(found)


def _mean(found: Sequence[Estimate], log: bool) -> float | None:
    """What the colour of a cell says, None of an empty one."""
    if not found:
        return None
    mean = _average(found)
    if not log:
        return mean
    return math.log10(mean) if mean > 0 else None


def _said(e: Estimate) -> str:
    return f"{e.value:.3g}" + (f" ± {short(e.error)}" if e.error else "") + (f" {e.unit}" if e.unit else "")


def _said_all(found: Sequence[Estimate]) -> str:
    if len(found) <= 1:
        return _said(found[0]) if found else "nothing"
    return f"{_average(found):.3g}, the mean of {len(found)}"


def _line(figure: Figure, of: str, points: Sequence[tuple[int, Estimate]], floor: float) -> None:
    steps = [step for step, _ in points]
    errors = [e.error or 0.0 for _, e in points]
    if any(errors):
        edges = [max(e.value - error, floor) for (_, e), error in zip(points, errors, strict=True)]
        upper = [e.value + error for (_, e), error in zip(points, errors, strict=True)]
        figure.add_scatter(
            x=[*steps, *reversed(steps)],
            y=rounded([*upper, *reversed(edges)]),
            mode="lines",
            line={"width": 0},
            fill="toself",
            fillcolor=figures.faded(_colour(of), 0.2),
            hoverinfo="skip",
        )
    figure.add_scatter(
        x=steps,
        y=rounded([e.value for _, e in points]),
        mode="lines+markers" if len(steps) <= 20 else "lines",
        name=of,
        line={"color": _colour(of), "width": 2},
        customdata=[_said(e) for _, e in points],
        hovertemplate=f"{figures.text(of)}<br>step %{{x:,}}: %{{customdata}}<extra></extra>",
    )


def _to_draw(values: Sequence[float], weights: Sequence[float] | None, log: bool) -> tuple[np.ndarray, np.ndarray]:
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    kept = np.isfinite(x) & ((x > 0) | (not log))
    return (np.log10(x[kept]) if log else x[kept]), w[kept]


def _far_apart(values: Iterable[float]) -> bool:
    positive = [abs(value) for value in values]
    return bool(positive) and min(positive) > 0 and max(positive) > 5 * min(positive)


def _range(found: Sequence[Estimate]) -> tuple[float, float]:
    low = min(0.0, *(e.value - (e.error or 0) for e in found))
    high = max(e.value + (e.error or 0) for e in found)
    return low * 1.08, max(high * 1.12, low + 1e-12)


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers in a range; of a logarithmic one, whose ends are powers of ten."""
    if not log:
        return [float(x) for x in np.linspace(low, high, 4)] if high > low else [low]
    if high - low < 1e-9:
        return [10**low]
    whole = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) >= 2:
        return whole[:: math.ceil(len(whole) / 5)]
    return [float(f"{10**x:.2g}") for x in np.linspace(low, high, 4)]


def _title(found: Sequence[Estimate], log: bool) -> str:
    """Of an axis: the unit; the quantity is what the whole figure is of."""
    units = {e.unit for e in found}
    unit = units.pop() if len(units) == 1 else ""
    return f"{unit} (log scale)".strip() if log else unit


def short(value: float) -> str:
    """A number in little room.

    >>> [short(x) for x in (0.0000123, 0.0235, 124.7)]
    ['1.2e-5', '0.024', '120']
    """
    return f"{float(f'{value:.2g}'):g}".replace("e-0", "e-").replace("e+0", "e")


def place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _colour(name: str) -> str:
    return figures.TYPE_COLOURS.get(TYPE_OF.get(name, name), figures.TYPE_COLOURS["Other"])


def _style(role: str) -> tuple[str, str]:
    alike = [name for name, kind in TYPE_OF.items() if kind == TYPE_OF.get(role)]
    return STYLES[alike.index(role) % len(STYLES)] if role in alike else STYLES[0]
