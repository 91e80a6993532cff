"""The figure of all tuning runs: final loss against learning rate."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sharpwise.compare.report.arms import Arm, Look, Result, figure_label, further, looks, setting_words
from sharpwise.compare.report.curve_charts import RIGHT
from sharpwise.report import figures
from sharpwise.report.plot import Figure

Tuned = Mapping[str, Any]
ROOM = 1.0  # nats above the best run that the scale shows


def sensitivity(result: Result) -> Figure | None:
    """Final validation loss of tuning runs: the chosen one filled, diverged ones on top.

    Runs that differ in the learning rate alone are joined: by a full line where it is the largest such set of the arm,
    dotted else.
    """
    runs = [run for arm in result["arms"] for run in arm["tuning"]]
    if not runs:
        return None
    height = 380 + 18 * max(0, len(result["arms"]) - 4)
    figure = figures.figure("peak learning rate (log scale)", "final validation loss, nats", height)
    figure.update_layout(margin={"r": RIGHT, "t": 26})
    low, high, cap = _range(result)
    labels = []
    for arm in result["arms"]:
        look = looks(result)[arm["name"]]
        last = _arm(figure, arm, look, cap, high)
        if last is not None:
            labels.append((figure_label(arm["name"], look), last, figures.INK))
    if any(run["final_loss"] is None for run in runs):
        figure.add_annotation(
            xref="paper", x=0, xanchor="left", y=high, yanchor="bottom", yshift=5, text="✕ diverged",
            font={"size": 12, "color": figures.MUTED},
        )  # fmt: skip
    _beyond(figure, result, cap)
    figure.update_yaxes(range=[low, high], nticks=7)
    _rates_axis(figure, [run["lr"] for run in runs])
    figures.label_ends(figure, labels, low, high, height)
    return figure


def _range(result: Result) -> tuple[float, float, float]:
    """The y axis, and the loss at which its scale ends: worse runs are drawn there.

    A nat above the best run, or where the worst of the arms' best runs is; never above the loss of guessing.
    """
    losses = [[run["final_loss"] for run in arm["tuning"] if run["final_loss"] is not None] for arm in result["arms"]]
    every = [loss for own in losses for loss in own]
    if not every:
        return 0.0, 1.0, 1.0
    guessing = math.log(max(result["model"]["vocabulary"], 2))
    best = [min(own) for own in losses if own]
    cap = min(max(every), max(min(best) + ROOM, max(best) + 0.15 * ROOM))
    cap = max(min(cap, guessing), min(best) + 1e-3)
    low, high = figures.padded(min(best), cap, 0.12)
    return low, high, cap


def _arm(figure: Figure, arm: Arm, look: Look, cap: float, top: float) -> float | None:
    """The runs of one arm; returns the height of its last point, None if all diverged."""
    name, groups = figures.text(arm["name"]), _groups(arm["tuning"])
    last = None
    for i, group in enumerate(groups):
        done = [run for run in group if run["final_loss"] is not None]
        if not done:
            continue
        chosen = [arm["setting"] is not None and run["setting"] == arm["setting"] for run in done]
        figure.add_scatter(
            x=[run["lr"] for run in done],
            y=[min(run["final_loss"], cap) for run in done],
            mode="lines+markers",
            name=name if i == 0 else f"{name}, {figures.text(setting_words(further(group[0]['setting'])))}",
            line={"color": look.colour, "width": 2 if i == 0 else 1, "dash": "solid" if i == 0 else "dot"},
            marker={
                "symbol": look.symbol,
                "size": [14 if it else 9 if i == 0 else 7 for it in chosen],
                "color": [look.colour if it else "#ffffff" for it in chosen],
                "line": {"color": look.colour, "width": 2 if i == 0 else 1.5},
            },
            hovertext=[_hover(name, run, it) for run, it in zip(done, chosen, strict=True)],
            hoverinfo="text",
        )  # fmt: skip
        if last is None:
            last = min(done[-1]["final_loss"], cap)
        for run, it in zip(done, chosen, strict=True):
            if it and arm["edge"]:
                figure.add_annotation(
                    x=math.log10(run["lr"]), y=min(run["final_loss"], cap), yshift=-17,
                    text=f"{arm['edge']} tried", font={"size": 12, "color": look.colour},
                    xanchor="left" if arm["edge"] == "smallest" else "right",
                )  # fmt: skip
    lost = [run for run in arm["tuning"] if run["final_loss"] is None]
    if lost:
        figure.add_scatter(
            x=[run["lr"] for run in lost], y=[top] * len(lost), mode="markers", name=f"{name}, diverged",
            marker={"symbol": "x-thin", "size": 9, "line": {"color": look.colour, "width": 2.5}},
            hovertext=[_hover(name, run, False) for run in lost], hoverinfo="text",
        )  # fmt: skip
    return last


def _beyond(figure: Figure, result: Result, cap: float) -> None:
    """The losses of runs that are worse than the scale shows, with arrows, below their symbols at its top."""
    found: dict[float, list[tuple[float, str]]] = {}
    for arm in result["arms"]:
        for run in arm["tuning"]:
            if run["final_loss"] is not None and run["final_loss"] > cap:
                found.setdefault(run["lr"], []).append((run["final_loss"], looks(result)[arm["name"]].colour))
    for lr, losses in found.items():
        lines = (f'<span style="color:{colour}">↑ {loss:.2f}</span>' for loss, colour in sorted(losses))
        figure.add_annotation(
            x=math.log10(lr), y=cap, yanchor="top", yshift=-8, text="<br>".join(lines),
            font={"size": 11}, bgcolor="rgba(255,255,255,0.85)",
        )  # fmt: skip


def _groups(runs: Sequence[Tuned]) -> list[list[Tuned]]:
    """Runs that differ in the learning rate alone, by learning rate; the largest group first."""
    found: dict[str, list[Tuned]] = {}
    for run in runs:
        found.setdefault(json.dumps(further(run["setting"]), sort_keys=True), []).append(run)
    return sorted((sorted(group, key=lambda run: run["lr"]) for group in found.values()), key=len, reverse=True)


def _hover(name: str, run: Tuned, chosen: bool) -> str:
    end = f"{run['final_loss']:.4f}" if run["final_loss"] is not None else "diverged"
    if run["final_loss"] is None and run["stopped_at"]:
        end += f" at step {run['stopped_at']:,}"
    return f"{name}<br>{figures.text(setting_words(run['setting']))}: {end}{', chosen' if chosen else ''}"


def _rates_axis(figure: Figure, rates: Sequence[float]) -> None:
    low, high = math.log10(min(rates)), math.log10(max(rates))
    room = max(0.06 * (high - low), 0.1)
    low, high = low - room, high + room
    # A phone has room for five labels or so.
    factors = (1.0,) if high - low > 2.2 else (1.0, 3.0) if high - low > 0.9 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    powers = range(math.floor(low), math.ceil(high) + 1, 2 if high - low > 4.5 else 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    texts = [f"{tick:g}".replace("e-0", "e-") for tick in ticks]
    figure.update_xaxes(type="log", range=[low, high], showgrid=True, tickvals=ticks, ticktext=texts)
