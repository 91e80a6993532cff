"""The figures of a run's page. Each function gives None where the run wrote down nothing to draw."""

import math
from collections.abc import Sequence

import numpy as np

from sharpwise.report import blocks, figures
from sharpwise.report.curves import Array, averaged, rounded, thinned
from sharpwise.report.plot import Figure
from sharpwise.report.run import RunData
from sharpwise.report.run_blocks import OUTSIDE, layer_names, multipliers_at, types_of, updates_by_type

TRAINING, VALIDATION = "#0072B2", "#D55E00"
HEIGHT = 300
FEW = 20  # below so many steps every one of them is a point


def loss(run: RunData) -> Figure | None:
    """Training loss, every step and averaged, and the validation loss where it was measured."""
    x, y = _averaged(run.step, run.loss)
    if not x and not len(run.validation_loss):
        return None
    figure = figures.figure("step", "loss, nats per token", HEIGHT)
    _raw(figure, run.step, run.loss)
    _smooth(figure, x, y, "training loss", ".4f")
    figure.add_scatter(
        x=rounded(run.validation_step, 9),
        y=rounded(run.validation_loss, 6),
        mode="lines+markers",
        name="validation loss",
        line={"color": VALIDATION, "width": 1.5, "dash": "dot"},
        marker={"symbol": "diamond", "size": 8, "color": VALIDATION, "line": {"color": "#ffffff", "width": 1}},
        hovertemplate="validation<br>step %{x:,}: %{y:.4f}<extra></extra>",
    )
    low, high = _loss_range(run, x, y)
    figure.update_yaxes(range=[low, high], nticks=7)
    labels = [("training", y[-1], TRAINING)] if y else []
    if len(run.validation_loss):
        labels.append(("validation", float(run.validation_loss[-1]), VALIDATION))
    figures.label_ends(figure, labels, low, high, HEIGHT)
    return _with_steps(figure, run)


def _loss_range(run: RunData, x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Without the first tenth, which falls from the loss of guessing and would flatten everything that follows."""
    begin = run.last_step / 10 if run.last_step > FEW else 0
    shown = [value for step, value in zip(x, y, strict=True) if step >= begin]
    shown += run.validation_loss[run.validation_step >= begin].tolist()
    raw = run.loss[(run.step >= begin) & np.isfinite(run.loss)]
    if len(raw):
        # The noise of single steps is shown too, but not every spike.
        shown += np.quantile(raw, [0.002, 0.998]).tolist()
    # A loss that explodes leaves the figure at twice what the run started from.
    first = next((value for value in run.loss if math.isfinite(value)), math.inf)
    shown = [min(value, 2 * max(first, 0.0)) for value in shown]
    return figures.padded(min(shown, default=0.0), max(shown, default=1.0), 0.05)


def learning_rates(run: RunData) -> Figure | None:
    """Learning rate of each block type: the scheduled one times the multiplier that was measured last."""
    index = thinned(run.lr, 400)
    if not len(index):
        return None
    return _by_type(run, run.step[index], run.lr[index])


def multipliers(run: RunData) -> Figure | None:
    """Factor of each block type on the learning rate, where it follows a measurement and changes."""
    x = run.step[thinned(run.lr, 400)]
    found = multipliers_at(run, x)
    fixed = all(np.nanmax(rows, 1, initial=-np.inf).tolist() == np.nanmin(rows, 1, initial=np.inf).tolist()
                for rows in found.values())  # fmt: skip
    return None if fixed else _by_type(run, x, np.ones(len(x)))


def _by_type(run: RunData, x: Array, lr: Array) -> Figure:
    """`lr` times the multiplier of each block type at the steps `x`, with a band where layers differ."""
    multipliers = multipliers_at(run, x) or {"other": np.ones((1, len(x)))}
    types, names = types_of(multipliers), layer_names(run)
    rates: dict[str, blocks.Layers] = {}
    named: dict[str, tuple[str, ...]] = {}
    for role, rows in multipliers.items():
        curves = tuple(tuple(rounded(lr * row)) for row in np.nan_to_num(rows, nan=1.0))
        if len(curves) == len(names.get(role, ())) > 1:
            named[role] = names[role]
            if names[role][-1] == OUTSIDE:
                # The final norm is in no layer: without it the norms of the layers often go with the matrices there.
                rest = "final norm" if role == "norm" else f"{role} {OUTSIDE}"
                rates[rest], types[rest] = curves[-1:], types[role]
                curves, named[role] = curves[:-1], names[role][:-1]
        rates[role] = curves
    lines = blocks.type_lines(types, rates, named)
    peaks = [peak for line in lines for peak in line.peaks if peak > 0]
    # Factors far apart would press the small ones onto the axis.
    log = bool(peaks) and max(peaks) > 20 * min(peaks)
    figure = blocks.type_figure(
        rounded(x, 9), lines, top=max(peaks, default=0.0), log=log, title="step", hover="step %{x:,}"
    )
    return _with_steps(figure, run)


def gradient_norm(run: RunData) -> Figure | None:
    """Gradient norm before clipping, the threshold, and the steps that were skipped."""
    known = np.where(run.grad_norm > 0, run.grad_norm, np.nan)
    x, logs = _averaged(run.step, np.log(known))
    if not x:
        return None
    figure = figures.figure("step", "gradient norm (log scale)", HEIGHT)
    _raw(figure, run.step, known)
    _smooth(figure, x, [math.exp(value) for value in logs], "gradient norm", ".3g")
    clip = run.setting("optimizer", "max_grad_norm")
    values = [float(np.nanmin(known)), float(np.nanmax(known))]
    labels = [("gradient", logs[-1] / math.log(10), TRAINING)]
    if isinstance(clip, (int, float)) and clip > 0:
        figure.add_hline(y=clip, line={"color": figures.INK, "width": 1.5, "dash": "dash"})
        labels.append((f"clipped<br>at {clip:g}", math.log10(clip), figures.INK))
        values.append(float(clip))
    low, high = figures.logarithmic(figure, min(values) / 1.3, max(values) * 1.6)
    if len(run.skipped):
        figure.add_scatter(
            x=rounded(run.skipped[thinned(run.skipped)], 9),
            y=[10**high / 1.2] * len(thinned(run.skipped)),
            mode="markers",
            name="skipped",
            marker={"symbol": "x", "size": 10, "color": VALIDATION},
            hovertemplate="step %{x:,} was skipped<extra></extra>",
        )
        labels.append(("x: skipped", high, VALIDATION))
    figures.label_ends(figure, labels, low, high, HEIGHT)
    return _with_steps(figure, run)


def update_sizes(run: RunData) -> Figure | None:
    """Norm of the update of each block type over the norm of its parameters."""
    records = [record for record in run.diagnostics if record.get("update_relative")]
    by_type = [updates_by_type(run, record) for record in records]
    kinds = [kind for kind in figures.TYPE_COLOURS if any(found.get(kind, 0) > 0 for found in by_type)]
    if not kinds:
        return None
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    figure = figures.figure("step", "update / parameter (log scale)", HEIGHT)
    labels, values = [], []
    for kind in kinds:
        curve = np.array([found.get(kind) or math.nan for found in by_type])
        shown = thinned(curve, 1000)
        values += curve[shown].tolist()
        colour = figures.TYPE_COLOURS[kind]
        figure.add_scatter(
            x=rounded(steps[shown], 9),
            y=rounded(curve[shown], 4),
            mode="lines" if len(shown) > FEW else "lines+markers",
            name=kind,
            line={"color": colour, "width": 2},
            hovertemplate=f"{kind}<br>step %{{x:,}}: %{{y:.2e}}<extra></extra>",
        )
        labels.append((kind, math.log10(curve[shown][-1]), colour))
    low, high = figures.logarithmic(figure, min(values) / 1.3, max(values) * 1.3)
    figures.label_ends(figure, labels, low, high, HEIGHT)
    return _with_steps(figure, run)


def throughput(run: RunData) -> Figure | None:
    """Tokens per second of whole steps, without evaluations and checkpoints."""
    tokens = run.tokens_per_step
    x, seconds = _averaged(run.timing_step, np.where(run.seconds > 0, run.seconds, np.nan))
    if not x or not tokens:
        return None
    figure = figures.figure("step", "tokens/s", HEIGHT)
    speeds = [tokens / value for value in seconds]
    _raw(figure, run.timing_step, tokens / np.where(run.seconds > 0, run.seconds, np.nan))
    _smooth(figure, x, speeds, "tokens/s", ",.0f")
    high = max(speeds) * 1.25
    figure.update_yaxes(range=[0, high], tickformat="~s", nticks=6)
    figures.label_ends(figure, [(f"{speeds[-1]:,.0f}", speeds[-1], TRAINING)], 0, high, HEIGHT)
    return _with_steps(figure, run)


def memory(run: RunData) -> Figure | None:
    """Peak memory of each step."""
    shown = thinned(np.where(run.memory > 0, run.memory, np.nan), 1000)
    if not len(shown):
        return None
    unit, name = (2**30, "GiB") if run.memory[shown].max() >= 2**30 else (2**20, "MiB")
    values = rounded(run.memory[shown] / unit)
    figure = figures.figure("step", f"peak memory, {name}", HEIGHT)
    _smooth(figure, rounded(run.timing_step[shown], 9), values, name, ".4g")
    high = max(values) * 1.25
    figure.update_yaxes(range=[0, high], nticks=6)
    figures.label_ends(figure, [(f"{values[-1]:.3g} {name}", values[-1], TRAINING)], 0, high, HEIGHT)
    return _with_steps(figure, run)


# --- parts -----------------------------------------------------------------------------------------------------------


def _averaged(x: Array, y: Array) -> tuple[list[float], list[float]]:
    return averaged(x.tolist(), y.tolist(), max(1, len(y) // 100))


def _raw(figure: Figure, x: Array, y: Array) -> None:
    """Every step, faint: the noise is a part of what happened."""
    shown = thinned(y)
    figure.add_scatter(
        x=rounded(x[shown], 9),
        y=rounded(y[shown]),
        mode="lines",
        name="every step",
        line={"color": figures.faded(TRAINING, 0.25), "width": 1},
        hoverinfo="skip",
    )


def _smooth(figure: Figure, x: Sequence[float], y: Sequence[float], name: str, spec: str) -> None:
    figure.add_scatter(
        x=rounded(x, 9),
        y=rounded(y),
        mode="lines" if len(x) > FEW else "lines+markers",
        name=name,
        line={"color": TRAINING, "width": 2.5},
        hovertemplate=f"{name}<br>step %{{x:,}}: %{{y:{spec}}}<extra></extra>",
    )


def resumed_at(run: RunData) -> list[int]:
    """First steps of the starts after the first one."""
    steps = (start.get("step") for start in run.starts[1:])
    return sorted({step for step in steps if isinstance(step, int) and step > 1})


def _with_steps(figure: Figure, run: RunData) -> Figure:
    """Give the x axis the steps of the run; mark where it was resumed and where it diverged."""
    last = max(run.last_step, run.status.step or 0, 1)
    figure.update_xaxes(
        range=[0, last] if last > FEW else [0.5, last + 0.5],
        tickformat="~s" if last >= 10000 else ",d",
        **({"dtick": 1} if last < 10 else {"nticks": 6}),
    )
    for step in resumed_at(run)[-50:]:
        figure.add_vline(x=step, line={"color": figures.MUTED, "width": 1, "dash": "dot"})
    if run.status.state == "diverged" and run.status.step:
        figure.add_vline(x=run.status.step, line={"color": VALIDATION, "width": 1.5})
    return figure
