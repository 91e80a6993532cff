"""The figures with a curve or a point per arm: along the run, over learning rates, memory. None where there is none."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sharpwise.compare.report.arms import (
    Arm,
    Look,
    Result,
    baseline_of,
    candidates,
    diverged,
    figure_label,
    looks,
    paired,
)
from sharpwise.compare.report.arms import varied as varied_run
from sharpwise.report import figures
from sharpwise.report.blocks import TypeLine, type_figure, type_lines
from sharpwise.report.curves import averaged, rounded
from sharpwise.report.plot import Figure
from sharpwise.report.text import mebibytes

POINTS = 80  # of a loss curve, and of one of learning rates
SYMBOLS_PER_LINE = 7
RIGHT = 122  # pixels for the names of arms
Curve = dict[float, float]


def loss_curves(result: Result) -> Figure | None:
    """Training loss against tokens in the final runs: thin every seed, thick the mean of those that ended."""
    curves = {arm["name"]: [_training(run) for run in arm["final"]] for arm in result["arms"]}
    return _curves(result, result["arms"], curves, "training loss, nats per token", ".3f")


def gaps(result: Result) -> Figure | None:
    """Validation loss minus that of the baseline at the same seed and token, along the final runs."""
    curves = {
        arm["name"]: [_gap(mine, other) for mine, other in paired(arm, baseline_of(result))]
        for arm in candidates(result)
    }
    figure = _curves(result, candidates(result), curves, "difference, nats per token", "+.3f", zero=True)
    if figure is not None:
        figure.add_hline(y=0, line={"color": figures.INK, "width": 1.5})
    return figure


def _training(run: Mapping[str, Any]) -> Curve:
    tokens, losses = run["train_tokens"], [math.nan if loss is None else loss for loss in run["train_loss"]]
    return dict(zip(*averaged(tokens, losses, math.ceil(len(losses) / POINTS) or 1), strict=True))


def _gap(mine: Mapping[str, Any], other: Mapping[str, Any]) -> Curve:
    there = dict(zip(other["validation_tokens"], other["validation_loss"], strict=True))
    pairs = zip(mine["validation_tokens"], mine["validation_loss"], strict=True)
    return {tokens: loss - there[tokens] for tokens, loss in pairs if tokens in there}


def _curves(
    result: Result, arms: Sequence[Arm], curves: Mapping[str, list[Curve]], title: str, spec: str, zero: bool = False
) -> Figure | None:
    if not any(any(found) for found in curves.values()):
        return None
    height = 360 + 18 * max(0, len(arms) - 4)
    figure = figures.figure("tokens", title, height)
    figure.update_layout(margin={"r": RIGHT})
    whole = result["budget"]["tokens"]
    # The first fifth falls from the loss of guessing: drawn to scale it would flatten everything that follows.
    shown = [y for found in curves.values() for curve in found for x, y in curve.items() if x >= whole / 5]
    shown = [y for y in shown if math.isfinite(y)] or [0.0]
    # Of curves that explode the figure shows the beginning; three quarters of all points set the scale.
    spread = sorted(shown)
    top = spread[3 * len(spread) // 4] + 3 * (spread[3 * len(spread) // 4] - spread[0] + 1e-3)
    shown = [y for y in shown if y <= top] + [0.0] * zero
    low, high = figures.padded(min(shown), max(shown), 0.05)
    labels = []
    for arm in arms:
        name, look = figures.text(arm["name"]), looks(result)[arm["name"]]
        found = [curve for curve in curves[arm["name"]] if curve]
        for curve in found:
            figure.add_scatter(
                x=rounded(list(curve), 9), y=rounded(list(curve.values())), mode="lines", name=f"{name}, one seed",
                line={"color": look.colour, "width": 1}, opacity=0.4, hoverinfo="skip",
            )  # fmt: skip
        complete = [curve for curve in found if max(curve) >= 0.95 * whole] or found[:1]
        if not complete:
            continue
        x = sorted(set.intersection(*(set(curve) for curve in complete)))
        if not x:
            continue
        mean = [sum(curve[at] for curve in complete) / len(complete) for at in x]
        _thick(figure, x, mean, look, name, spec)
        label = figure_label(arm["name"], look) + ("<br>(diverged)" if diverged(arm) else "")
        labels.append((label, min(max(mean[-1], low), high), figures.INK))
    figure.update_yaxes(range=[low, high], nticks=7)
    figure.update_xaxes(tickformat="~s", nticks=5, range=[0, whole * 1.01])
    figures.label_ends(figure, labels, low, high, height)
    return figure


def _thick(figure: Figure, x: Sequence[float], y: Sequence[float], look: Look, name: str, spec: str) -> None:
    step = max(1, len(x) // SYMBOLS_PER_LINE)
    sizes = [9 if (len(x) - 1 - i) % step == 0 else 0 for i in range(len(x))]
    figure.add_scatter(
        x=rounded(list(x), 9),
        y=rounded(list(y)),
        mode="lines+markers",
        name=name,
        line={"color": look.colour, "width": 2.5},
        marker={"symbol": look.symbol, "size": sizes, "color": look.colour},
        hovertemplate=f"{name}<br>%{{x:,}} tokens: %{{y:{spec}}}<extra></extra>",
    )


def memory(result: Result) -> Figure | None:
    """Mean final validation loss with its interval against bytes of state, where there are more than two sizes."""
    arms = [arm for arm in result["arms"] if arm["state_bytes"] is not None and arm["mean"] is not None]
    if len({mebibytes(arm["state_bytes"]) for arm in arms}) <= 2:
        return None
    height = 340 + 18 * max(0, len(arms) - 4)
    figure = figures.figure("optimizer state, MiB", "final validation loss, nats", height)
    figure.update_layout(margin={"r": RIGHT})
    means = [arm["mean"] for arm in arms]
    room = 2 * max(max(means) - min(means), 1e-3)
    ends = [end for arm in arms for end in arm["interval"] or ()]
    low, high = figures.padded(
        max(min([*means, *ends]), min(means) - room), min(max([*means, *ends]), max(means) + room), 0.06
    )
    labels = []
    for arm in arms:
        name, look = figures.text(arm["name"]), looks(result)[arm["name"]]
        x, interval = arm["state_bytes"] / 2**20, arm["interval"] or [arm["mean"]] * 2
        figure.add_scatter(
            x=[x, x], y=[min(max(end, low), high) for end in interval], mode="lines", name=f"{name}, interval",
            line={"color": look.colour, "width": 2}, hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(
            x=[x], y=[arm["mean"]], mode="markers", name=name, hoverinfo="text",
            hovertext=f"{name}<br>{x:.2f} MiB, loss {arm['mean']:.4f}",
            marker={
                "symbol": look.symbol, "size": 13, "color": look.colour,
                "line": {"color": "#ffffff", "width": 1},
            },
        )  # fmt: skip
        labels.append((figure_label(arm["name"], look), arm["mean"], figures.INK))
    figure.update_yaxes(range=[low, high], nticks=7)
    most = max(arm["state_bytes"] for arm in arms) / 2**20
    figure.update_xaxes(range=[0, most * 1.08 or 1.0], nticks=6)
    figures.label_ends(figure, labels, low, high, height)
    return figure


# --- learning rates along the run ------------------------------------------------------------------------------------


# The colours are those of arms: here the lines are told apart by their dashes.
DASHES = (("solid", "─ "), ("dash", "╌ "), ("dot", "· "), ("dashdot", "╌·"), ("longdash", "— "))


def learning_rates(result: Result) -> dict[tuple[str, ...], Figure]:
    """Learning rate of each block type against tokens, of arms whose blocks differ, all on one scale.

    Arms whose learning rates are the same share a figure.
    """
    found: list[tuple[list[str], list[float], list[TypeLine]]] = []
    for arm in result["arms"]:
        run = varied_run(arm)
        if run is None:
            continue
        tokens = run["learning_rate_tokens"]
        last = len(tokens) - 1
        kept = sorted({round(i * last / (POINTS - 1)) for i in range(POINTS)}) if last > POINTS else range(len(tokens))
        rates = {role: (tuple(rounded([lr[i] for i in kept])),) for role, lr in run["learning_rates"].items()}
        types = {role: run["types"].get(role, "Other") for role in rates}
        x, lines = rounded([tokens[i] for i in kept], 9), _dashed(type_lines(types, rates))
        same = next((names for names, *drawn in found if drawn == [x, lines]), None)
        if same is None:
            found.append(([arm["name"]], x, lines))
        else:
            same.append(arm["name"])
    peaks = [peak for _, _, lines in found for line in lines for peak in line.peaks if peak > 0]
    # Factors far apart would press the small ones onto the axis.
    log = bool(peaks) and max(peaks) > 20 * min(peaks)
    drawn = {}
    for names, x, lines in found:
        figure = drawn[tuple(names)] = type_figure(x, lines, top=max(peaks, default=0.0), log=log)
        if log:
            low, high = figures.logarithmic(figure, min(peaks) / 30, max(peaks) * 1.5)
            _relabel(figure, lines, low, high)
    return drawn


def _dashed(lines: Sequence[TypeLine]) -> list[TypeLine]:
    styles = itertools.cycle(DASHES)
    return [
        replace(line, colour=figures.MUTED, dash=dash, mark=mark)
        for line, (dash, mark) in zip(lines, styles, strict=False)
    ]


def _relabel(figure: Figure, lines: Sequence[TypeLine], low: float, high: float) -> None:
    """Name the lines again, at their heights on the scale that all figures share."""
    figure.layout.annotations = ()
    labels = [
        (line.mark + figures.text(line.label).replace(", ", ",<br>"), math.log10(line.peak or 10**low), line.colour)
        for line in lines
    ]
    figures.label_ends(figure, labels, low, high, height=280)
