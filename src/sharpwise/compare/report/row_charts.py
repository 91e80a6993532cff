"""The figures with one row per arm: final losses, differences to the baseline, speed-ups. None where there is none."""

import math
from collections.abc import Sequence
from typing import Any

from sharpwise.compare.report.arms import (
    Arm,
    Look,
    Result,
    baseline_of,
    candidates,
    ended,
    figure_label,
    looks,
    paired,
    short_name,
)
from sharpwise.compare.report.text import VERDICTS, speedup_high
from sharpwise.report import figures
from sharpwise.report.plot import Figure

ROW = 62  # pixels of a row: its name on top, below it the mean, below that the seeds
NAME, BELOW = -0.36, 0.2  # in rows, from the mean


def final_losses(result: Result) -> Figure | None:
    """Final validation loss of each arm: every seed, their mean and its interval; the baseline's mean as a line."""
    arms, look = list(result["arms"]), looks(result)
    seeds = {arm["name"]: [run["final_loss"] for run in ended(arm["final"])] for arm in arms}
    points = [loss for losses in seeds.values() for loss in losses]
    points += [arm["mean"] for arm in arms if arm["mean"] is not None]
    if not points:
        return None
    edges = _visible(points, [arm["interval"] for arm in arms])
    figure = _rows(arms, look, "final validation loss, nats per token", edges)
    baseline = baseline_of(result)
    if baseline["mean"] is not None:
        figure.add_vline(x=baseline["mean"], line={"color": figures.MUTED, "width": 1.5, "dash": "dash"})
    for row, arm in enumerate(arms):
        name, own = figures.text(arm["name"]), look[arm["name"]]
        _seeds(figure, row, own, seeds[arm["name"]], [f"{name}, seed {run['seed']}" for run in ended(arm["final"])])
        _mean(figure, row, own, arm["mean"], arm["interval"], edges, f"{name}, mean", ".4f")
        lost = len(arm["final"]) - len(seeds[arm["name"]])
        if lost:
            _text(figure, row, f"✕ {lost} of {len(arm['final'])} diverged", "right")
    return figure


def differences(result: Result) -> Figure | None:
    """Difference of each candidate to the baseline by seed, mean and interval; what makes no difference as a band."""
    arms = [arm for arm in candidates(result) if arm["difference"] and arm["difference"]["mean"] is not None]
    if not arms:
        return None
    look, margin = looks(result), result["margin"]
    by_seed = {
        arm["name"]: [(a["final_loss"] - b["final_loss"], a["seed"]) for a, b in paired(arm, baseline_of(result))]
        for arm in arms
    }
    points = [value for pairs in by_seed.values() for value, _ in pairs]
    points += [arm["difference"]["mean"] for arm in arms] + [-1.5 * margin, 1.5 * margin]
    intervals = {arm["name"]: _ends(arm["difference"]["low"], arm["difference"]["high"]) for arm in arms}
    edges = _visible(points, list(intervals.values()))
    baseline = short_name(result["baseline"], width=24, lines=1)
    figure = _rows(arms, look, f"loss minus that of {baseline}, nats per token", edges, verdicts=True)
    figure.add_vrect(x0=-margin, x1=margin, fillcolor="#777777", opacity=0.16, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": figures.INK, "width": 1.5})
    for row, arm in enumerate(arms):
        name, own = figures.text(arm["name"]), look[arm["name"]]
        pairs = by_seed[arm["name"]]
        _seeds(figure, row, own, [value for value, _ in pairs], [f"{name}, seed {seed}" for _, seed in pairs], "+.4f")
        mean = arm["difference"]["mean"]
        _mean(figure, row, own, mean, intervals[arm["name"]], edges, f"{name}, mean difference", "+.4f")
    _sides(figure, "better", "worse")
    return figure


def speedups(result: Result) -> Figure | None:
    """Tokens that the baseline needs over those that the arm used, with intervals; arrows where there is a bound."""
    found = {arm["name"]: arm["speedup"] for arm in candidates(result) if arm["speedup"]}
    arms = [arm for arm in candidates(result) if _at(found.get(arm["name"])) is not None]
    if not arms:
        return None
    look = looks(result)
    shares = [horizon["share"] for horizon in result["horizons"]] or [0.5, 2.0]
    points = [1.0, *shares, *(at for arm in arms if (at := _at(found[arm["name"]])) is not None)]
    edges = (min(points) / 1.12, max(points) * 1.12)
    figure = _rows(arms, look, "speed-up in tokens (log scale)", edges)
    figure.add_vline(x=1, line={"color": figures.INK, "width": 1.5})
    for row, arm in enumerate(arms):
        name, own, one = figures.text(arm["name"]), look[arm["name"]], found[arm["name"]]
        interval = None if one["low"] is None else [max(one["low"], 1e-9), min(speedup_high(one) or 1e9, 1e9)]
        _mean(figure, row, own, one["value"], interval, edges, name, ".2f")
        if one["value"] is None:
            at, side = _at(one), "right" if one["bound"].startswith(">") else "left"
            figure.add_scatter(
                x=[at], y=[row], mode="markers", name=f"{name}, bound", hoverinfo="text",
                marker={"symbol": f"triangle-{side}", "size": 15, "color": own.colour},
                hovertext=f"{name}: {figures.text(one['bound'])}",
            )  # fmt: skip
            figure.add_annotation(
                x=math.log10(at or 1.0), y=row, text=figures.text(one["bound"]), yshift=-16,
                font={"size": 13, "color": own.colour}, xanchor="right" if side == "right" else "left",
            )  # fmt: skip
    ticks = [tick for tick in (0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.4, 2, 2.8, 4, 8) if edges[0] <= tick <= edges[1]]
    figure.update_xaxes(
        type="log", range=[math.log10(edge) for edge in edges], tickvals=ticks, ticktext=[f"{t:g}x" for t in ticks]
    )
    _sides(figure, "slower", "faster")
    return figure


def _at(speedup: Any) -> float | None:
    """Where a speed-up is drawn: its value, or the bound."""
    if not speedup:
        return None
    if speedup["value"] is not None:
        return float(speedup["value"])
    return float(speedup["bound"].strip("<>x ")) if speedup["bound"] else None


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(
    arms: Sequence[Arm], look: dict[str, Look], title: str, edges: tuple[float, float], *, verdicts: bool = False
) -> Figure:
    """A figure with a row for each arm, the first at the top."""
    figure = figures.figure(title, "", height=80 + ROW * len(arms))
    figure.update_layout(margin={"l": 10, "r": 10, "t": 26, "b": 52})
    figure.update_yaxes(range=[len(arms) - 0.5, -0.55], visible=False)
    figure.update_xaxes(range=list(edges), showgrid=True, nticks=5)
    for row, arm in enumerate(arms):
        # Above the row, so that a phone has its whole width for the numbers.
        name = figure_label(arm["name"], look[arm["name"]], width=32, lines=1)
        _text(figure, row, f"{name}: <b>{VERDICTS[arm['verdict']]}</b>" if verdicts else name, "left")
        if row:
            figure.add_hline(y=row - 0.5, line={"color": figures.GRID, "width": 1}, layer="below")
    return figure


def _visible(points: Sequence[float], intervals: Sequence[Sequence[float] | None]) -> tuple[float, float]:
    """A range that shows all points, and intervals as far as they leave the points apart.

    >>> low, high = _visible([4.0, 4.1], [[3.0, 5.1]])
    >>> round(low, 2), round(high, 2)
    (3.77, 4.33)
    """
    low, high = min(points), max(points)
    room = 2 * max(high - low, 1e-3)
    ends = [end for interval in intervals if interval for end in interval]
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    return figures.padded(low, high, 0.06)


def _ends(low: float | None, high: float | None) -> list[float] | None:
    return None if low is None or high is None else [low, high]


def _seeds(
    figure: Figure, row: int, look: Look, values: Sequence[float], names: Sequence[str], spec: str = ".4f"
) -> None:
    figure.add_scatter(
        x=list(values),
        y=[row + BELOW] * len(values),
        mode="markers",
        name=names[0].rpartition(",")[0] + ", seeds" if names else "",
        marker={
            "symbol": look.symbol, "size": 8, "color": "rgba(255,255,255,0.7)",
            "line": {"color": look.colour, "width": 1.5},
        },
        hovertext=[f"{name}: {value:{spec}}" for name, value in zip(names, values, strict=True)],
        hoverinfo="text",
    )  # fmt: skip


def _mean(
    figure: Figure,
    row: int,
    look: Look,
    mean: float | None,
    interval: Sequence[float] | None,
    edges: tuple[float, float],
    name: str,
    spec: str,
) -> None:
    """A mean and its interval; an end beyond the edge of the figure is an arrow there."""
    said = "" if mean is None else f"{name}: {mean:{spec}}"
    if interval:
        low, high = interval
        ends = [min(max(end, edges[0]), edges[1]) for end in (low, high)]
        marks = ["line-ns", "line-ns"]
        if low < edges[0]:
            marks[0] = "triangle-left"
        if high > edges[1]:
            marks[1] = "triangle-right"
        said += f"<br>95% interval {_end(low, spec)} to {_end(high, spec)}"
        figure.add_scatter(
            x=ends, y=[row, row], mode="lines+markers", name=f"{name}, interval",
            line={"color": look.colour, "width": 3},
            marker={"symbol": marks, "size": 10, "color": look.colour, "line": {"color": look.colour, "width": 2}},
            hoverinfo="text", hovertext=said,
        )  # fmt: skip
    if mean is not None:
        figure.add_scatter(
            x=[mean], y=[row], mode="markers", name=name, hoverinfo="text", hovertext=said,
            marker={
                "symbol": look.symbol, "size": 14, "color": look.colour,
                "line": {"color": "#ffffff", "width": 1},
            },
        )  # fmt: skip


def _end(value: float, spec: str) -> str:
    return "open" if value >= 1e9 or 0 < value <= 1e-9 else f"{value:{spec}}"


def _text(figure: Figure, row: int, text: str, side: str) -> None:
    figure.add_annotation(
        xref="paper", x=0 if side == "left" else 1, xanchor=side, y=row + NAME, text=text,
        font={"size": 13, "color": figures.INK}, bgcolor="rgba(255,255,255,0.85)",
    )  # fmt: skip


def _sides(figure: Figure, left: str, right: str) -> None:
    """Say above the figure which side is which."""
    for x, anchor, text in ((0, "left", f"← {left}"), (1, "right", f"{right} →")):
        figure.add_annotation(
            xref="paper", x=x, xanchor=anchor, yref="paper", y=1, yanchor="bottom", yshift=4, text=text,
            font={"size": 12, "color": figures.MUTED},
        )  # fmt: skip
