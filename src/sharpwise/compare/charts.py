"""The figures of a demo's page."""

import math

import plotly.graph_objects as go

from sharpwise.compare.summary import Result, arm_names, best_run, runs_of
from sharpwise.report.blocks import type_figure, type_lines
from sharpwise.report.curves import averaged
from sharpwise.report.figures import MUTED, figure, label_ends, padded, wrapped

# Okabe and Ito's palette without its yellow, which is too pale for lines; every arm has a symbol of its own as well.
ARM_COLOURS = ("#333333", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
ARM_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross")


def sensitivity(result: Result) -> go.Figure:
    """Final validation loss against learning rate, a line per arm; its best point filled, diverged runs at the top."""
    chart = figure("learning rate (log scale)", "final validation loss, nats")
    losses = [run["final_loss"] for run in result["runs"] if run["final_loss"] is not None]
    low, high = padded(min(losses, default=0.0), max(losses, default=1.0), 0.12)
    labels = []
    for arm, colour, symbol in _arms(result):
        runs, best = runs_of(result, arm), best_run(result, arm)
        ended = [run for run in runs if run["final_loss"] is not None]
        filled = [best is not None and run is best.run for run in ended]
        chart.add_scatter(
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
            chart.add_scatter(
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
            chart.add_annotation(
                x=math.log10(best.lr), y=best.loss, text="edge of the grid", showarrow=False, yshift=-16,
                xanchor="left" if best.edge == "smallest" else "right", font={"size": 11, "color": colour},
            )  # fmt: skip
        if ended:
            labels.append((wrapped(arm), ended[-1]["final_loss"], colour))
    if any(run["final_loss"] is None for run in result["runs"]):
        chart.add_annotation(
            x=0, xref="paper", xanchor="left", y=high, yanchor="bottom", text="x: diverged", showarrow=False,
            font={"size": 12, "color": MUTED},
        )  # fmt: skip
    chart.update_yaxes(range=[low, high])
    rates = sorted(result["learning_rates"])
    chart.update_xaxes(type="log", tickvals=rates, ticktext=[f"{lr:g}" for lr in rates])
    label_ends(chart, labels, low, high)
    return chart


def loss_curves(result: Result) -> go.Figure:
    """Training loss against tokens: thick the best learning rate of each arm, thin the others."""
    chart = figure("tokens", "training loss, nats")
    per_step = result["settings"]["sequences"] * result["settings"]["context"]
    width = max(1, result["settings"]["steps"] // 50)
    labels, shown = [], []
    for arm, colour, _ in _arms(result):
        best = best_run(result, arm)
        for run in runs_of(result, arm):
            steps, losses = averaged(run["train_steps"], run["train_loss"], width)
            if not steps:
                continue
            is_best = best is not None and run is best.run
            chart.add_scatter(
                x=[step * per_step for step in steps],
                y=losses,
                mode="lines",
                name=f"{arm}, lr {run['lr']:g}",
                line={"color": colour, "width": 2.5 if is_best else 1},
                opacity=1.0 if is_best else 0.35,
                hovertemplate=f"{arm}, lr {run['lr']:g}<br>%{{x:,}} tokens: %{{y:.3f}}<extra></extra>",
            )
            if is_best:
                labels.append((wrapped(arm), losses[-1], colour))
                shown += losses[len(losses) // 10 :]
    # The first tenth falls from the loss of guessing: drawn to scale it would flatten everything that follows.
    low, high = padded(min(shown, default=0.0), max(shown, default=1.0), 0.05)
    chart.update_yaxes(range=[low, high])
    chart.update_xaxes(tickformat="~s", nticks=6)
    label_ends(chart, labels, low, high)
    return chart


def learning_rates(result: Result, arm: str) -> go.Figure | None:
    """Learning rate of each block type against tokens in the best run of `arm`; types that coincide share a line."""
    best = best_run(result, arm)
    if best is None:
        return None
    per_step = result["settings"]["sequences"] * result["settings"]["context"]
    top = max(
        max(max(values) for values in other.run["learning_rates"].values())
        for other in (best_run(result, name) for name in arm_names(result))
        if other is not None
    )
    rates = {role: (tuple(values),) for role, values in best.run["learning_rates"].items()}
    x = [step * per_step for step in best.run["learning_rate_steps"]]
    return type_figure(x, type_lines(best.run["types"], rates), top=top)


def _arms(result: Result) -> list[tuple[str, str, str]]:
    names = arm_names(result)
    count = len(ARM_COLOURS)
    return [(name, ARM_COLOURS[i % count], ARM_SYMBOLS[i % count]) for i, name in enumerate(names)]


def arm_colour(result: Result, arm: str) -> str:
    """The colour of an arm in every figure."""
    return next(colour for name, colour, _ in _arms(result) if name == arm)
