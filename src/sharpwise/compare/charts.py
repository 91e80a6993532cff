"""The figures of the page, in Plotly: colours that colour-blind readers can tell apart, lines named where they end."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import plotly.graph_objects as go

from sharpwise.compare.summary import Result, arm_names, best_run, runs_of

# Okabe and Ito's palette without its yellow, which is too pale for lines; every arm has a symbol of its own as well.
ARM_COLOURS = ("#333333", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
ARM_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")
TYPE_COLOURS = {
    "Emb": "#D55E00",
    "QK": "#0072B2",
    "FFN": "#009E73",
    "VO": "#B3589A",
    "Norm": "#333333",
    "Head": "#A67C00",
    "Other": "#777777",
}
INK, MUTED, GRID = "#222222", "#5c5c5c", "#e6e6e6"
HEIGHT = 360
LABEL_HEIGHT = 15  # pixels that a line of text needs


def sensitivity(result: Result) -> go.Figure:
    """Final validation loss against learning rate, a line per arm; its best point filled, diverged runs at the top."""
    figure = _figure("learning rate (log scale)", "final validation loss, nats")
    losses = [run["final_loss"] for run in result["runs"] if run["final_loss"] is not None]
    low, high = _padded(min(losses, default=0.0), max(losses, default=1.0), 0.12)
    labels = []
    for arm, colour, symbol in _arms(result):
        runs, best = runs_of(result, arm), best_run(result, arm)
        ended = [run for run in runs if run["final_loss"] is not None]
        filled = [best is not None and run is best.run for run in ended]
        figure.add_scatter(
            x=[run["lr"] for run in ended],
            y=[run["final_loss"] for run in ended],
            mode="lines+markers",
            name=arm,
            line={"color": colour, "width": 2},
            marker={
                "symbol": symbol,
                "opacity": 1,
                "size": [13 if is_best else 9 for is_best in filled],
                "color": [colour if is_best else "#ffffff" for is_best in filled],
                "line": {"color": colour, "width": 2},
            },
            hovertemplate=f"{arm}<br>lr %{{x:g}}: %{{y:.4f}}<extra></extra>",
        )
        diverged = [run for run in runs if run["final_loss"] is None]
        if diverged:
            figure.add_scatter(
                x=[run["lr"] for run in diverged],
                y=[high] * len(diverged),
                mode="markers",
                name=f"{arm}, diverged",
                marker={"symbol": "x", "size": 10, "color": colour},
                cliponaxis=False,
                hovertext=[f"{arm}<br>lr {run['lr']:g}: diverged at step {run['stopped_at']}" for run in diverged],
                hoverinfo="text",
            )
        if best is not None and best.edge:
            figure.add_annotation(
                x=math.log10(best.lr), y=best.loss, text="edge of the grid", showarrow=False, yshift=-16,
                xanchor="left" if best.edge == "smallest" else "right", font={"size": 11, "color": colour},
            )  # fmt: skip
        if ended:
            labels.append((_wrapped(arm), ended[-1]["final_loss"], colour))
    if any(run["final_loss"] is None for run in result["runs"]):
        figure.add_annotation(
            x=0, xref="paper", xanchor="left", y=high, yanchor="bottom", text="x: diverged", showarrow=False,
            font={"size": 12, "color": MUTED},
        )  # fmt: skip
    figure.update_yaxes(range=[low, high])
    rates = sorted(result["learning_rates"])
    figure.update_xaxes(type="log", tickvals=rates, ticktext=[f"{lr:g}" for lr in rates])
    _label_ends(figure, labels, low, high)
    return figure


def loss_curves(result: Result) -> go.Figure:
    """Training loss against tokens: thick the best learning rate of each arm, thin the others."""
    figure = _figure("tokens", "training loss, nats")
    per_step = result["settings"]["sequences"] * result["settings"]["context"]
    width = max(1, result["settings"]["steps"] // 50)
    labels, shown = [], []
    for arm, colour, _ in _arms(result):
        best = best_run(result, arm)
        for run in runs_of(result, arm):
            steps, losses = _averaged(run["train_steps"], run["train_loss"], width)
            if not steps:
                continue
            is_best = best is not None and run is best.run
            figure.add_scatter(
                x=[step * per_step for step in steps],
                y=losses,
                mode="lines",
                name=f"{arm}, lr {run['lr']:g}",
                line={"color": colour, "width": 2.5 if is_best else 1},
                opacity=1.0 if is_best else 0.35,
                hovertemplate=f"{arm}, lr {run['lr']:g}<br>%{{x:,}} tokens: %{{y:.3f}}<extra></extra>",
            )
            if is_best:
                labels.append((_wrapped(arm), losses[-1], colour))
                shown += losses[len(losses) // 10 :]
    # The first tenth falls from the loss of guessing: drawn to scale it would flatten everything that follows.
    low, high = _padded(min(shown, default=0.0), max(shown, default=1.0), 0.05)
    figure.update_yaxes(range=[low, high])
    figure.update_xaxes(tickformat="~s", nticks=6)
    _label_ends(figure, labels, low, high)
    return figure


def learning_rates(result: Result, arm: str) -> go.Figure | None:
    """Learning rate of each block type against tokens in the best run of `arm`; types that coincide share a line."""
    best = best_run(result, arm)
    if best is None:
        return None
    figure = _figure("tokens", "", height=280)
    per_step = result["settings"]["sequences"] * result["settings"]["context"]
    x = [step * per_step for step in best.run["learning_rate_steps"]]
    top = max(
        max(max(values) for values in other.run["learning_rates"].values())
        for other in (best_run(result, name) for name in arm_names(result))
        if other is not None
    )
    labels = []
    for values, names, colour in _lines(best.run):
        label = "all blocks" if len(names) == len(_names(best.run)) else ", ".join(names)
        colour = INK if label == "all blocks" else colour
        figure.add_scatter(
            x=x,
            y=values,
            mode="lines",
            name=label,
            line={"color": colour, "width": 2},
            hovertemplate=f"{label}<br>%{{x:,}} tokens: %{{y:.3g}}<extra></extra>",
        )
        # At the end all lines come together: the labels stand beside the peaks, in their order.
        labels.append((label.replace(", ", ",<br>"), max(values), colour))
    figure.update_yaxes(range=[0, top * 1.08], nticks=6, tickformat="~g")
    figure.update_xaxes(tickformat="~s", nticks=4)
    _label_ends(figure, labels, 0, top * 1.08, height=280)
    return figure


def _lines(run: Mapping[str, Any]) -> list[tuple[list[float], list[str], str]]:
    """Learning rates over time, the names that have them, and a colour; from the largest down."""
    by_values: dict[tuple[float, ...], list[str]] = {}
    for role, name in _names_of_roles(run).items():
        names = by_values.setdefault(tuple(run["learning_rates"][role]), [])
        if name not in names:
            names.append(name)
    lines = sorted(by_values.items(), key=lambda item: -max(item[0], default=0.0))
    return [(list(values), names, TYPE_COLOURS.get(names[-1], TYPE_COLOURS["Other"])) for values, names in lines]


def _names(run: Mapping[str, Any]) -> set[str]:
    return set(_names_of_roles(run).values())


def _names_of_roles(run: Mapping[str, Any]) -> dict[str, str]:
    """The block type of each role, or the role itself where roles of one type have different learning rates."""
    names = {}
    roles = sorted(run["types"], key=lambda role: run["types"][role])
    for kind, group in groupby(roles, key=lambda role: run["types"][role]):
        members = list(group)
        rates = [run["learning_rates"][role] for role in members]
        for role in members:
            names[role] = kind if all(rate == rates[0] for rate in rates) else role
    # The token embedding is what the papers call Emb.
    return {role: "Emb" if name == "tok_emb" else name for role, name in names.items()}


def _averaged(steps: Sequence[int], losses: Sequence[float], width: int) -> tuple[list[float], list[float]]:
    """Means over `width` steps, at the middle of each; a rest shorter than that is averaged too."""
    cuts = range(0, len(losses), width)
    means = [sum(losses[i : i + width]) / len(losses[i : i + width]) for i in cuts]
    middles = [(steps[i] + steps[min(i + width, len(steps)) - 1]) / 2 for i in cuts]
    return middles, means


# --- looks -----------------------------------------------------------------------------------------------------------


def _arms(result: Result) -> list[tuple[str, str, str]]:
    names = arm_names(result)
    count = len(ARM_COLOURS)
    return [(name, ARM_COLOURS[i % count], ARM_SYMBOLS[i % count]) for i, name in enumerate(names)]


def arm_colour(result: Result, arm: str) -> str:
    """The colour of an arm in every figure."""
    return next(colour for name, colour, _ in _arms(result) if name == arm)


def _figure(x: str, y: str, height: int = HEIGHT) -> go.Figure:
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": "#999999", "ticks": "outside", "tickcolor": "#999999"}
    title = {"font": {"size": 13, "color": MUTED}, "standoff": 8}
    return go.Figure(
        layout={
            "height": height,
            "margin": {"l": 52, "r": 96, "t": 12, "b": 46},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": INK},
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": {**axis, "title": {**title, "text": x}, "showgrid": False, "showline": True},
            "yaxis": {**axis, "title": {**title, "text": y}},
        }
    )


def _label_ends(
    figure: go.Figure, labels: Sequence[tuple[str, float, str]], low: float, high: float, height: int = HEIGHT
) -> None:
    """Name lines at the right edge, at the height `value` of each, moved apart where they would overlap."""
    pixels = height - 58  # without the margins
    heights = [LABEL_HEIGHT * (1 + text.count("<br>")) / pixels for text, _, _ in labels]
    wanted = [(value - low) / (high - low) for _, value, _ in labels]
    for (text, _, colour), y in zip(labels, spread(wanted, heights), strict=True):
        figure.add_annotation(
            xref="paper", x=1.0, xanchor="left", xshift=6, yref="paper", y=y, yanchor="middle", text=text,
            showarrow=False, align="left", font={"color": colour, "size": 12},
        )  # fmt: skip


def spread(centres: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move labels within [0, 1] as little as needed, so that none overlaps the next; their order stays.

    >>> [round(y, 3) for y in spread([0.5, 0.5], [0.1, 0.1])]
    [0.45, 0.55]
    """
    order = sorted(range(len(centres)), key=lambda i: centres[i])
    groups: list[tuple[list[int], float, float]] = []  # members from below, centre of the group, its height
    for i in order:
        members, height = [i], heights[i]
        centre = min(max(centres[i], height / 2), 1 - height / 2)
        while groups and groups[-1][1] + groups[-1][2] / 2 > centre - height / 2:
            before, _, other = groups.pop()
            members, height = before + members, other + height
            offset, wanted = 0.0, []
            for j in members:
                wanted.append(centres[j] - offset - heights[j] / 2)
                offset += heights[j]
            bottom = min(max(sum(wanted) / len(wanted), 0.0), max(1 - height, 0.0))
            centre = bottom + height / 2
        groups.append((members, centre, height))
    placed = [0.0] * len(centres)
    for members, centre, height in groups:
        y = centre - height / 2
        for j in members:
            placed[j] = y + heights[j] / 2
            y += heights[j]
    return placed


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    room = max(high - low, 1e-3) * share
    return low - room, high + room


def _wrapped(name: str) -> str:
    return name.replace(" + ", " +<br>")
