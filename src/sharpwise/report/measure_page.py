"""The page of what probes measured: one HTML file, readable without a network."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from sharpwise.files import write_whole
from sharpwise.probes.estimate import Estimate, Measurement
from sharpwise.report import measure, measure_text
from sharpwise.report.blocks import code
from sharpwise.report.html import bullets, card, chart, command, document, facts, table
from sharpwise.report.measure_density import density_curve, has_density
from sharpwise.report.measure_text import PLACEHOLDERS, Advice, Study, step_of
from sharpwise.report.plot import Figure
from sharpwise.report.text import duration

T = TypeVar("T")
DENSITIES = 6
HINTS = {
    "sharpness": "Trace of the Fisher matrix of a block over its number of parameters.",
    "alpha": "Of the tail of the eigenvalues of W'W: small is heavy. Hollow: random matrices of the same shapes.",
    "relative update": "Norm of one update over the norm of the weights.",
    "angle": "By how much one update turns the weights, in radians.",
    "angle per neuron": "By how much one update turns an output row, the mean over rows.",
    "RRC": "How much one update changes what a matrix gives for its own inputs.",
    "noise scale": "Batch size, in samples, at which noise and signal of the gradient are alike.",
    "critical batch size": "Batch size, in samples, at which noise and signal of the gradient are alike.",
}
"""What a picture is of, by quantity."""

SHOWN = {"update size": ("relative update", "angle", "angle per neuron"), "gradient SNR": ("critical batch size",)}
"""By probe, where not all of its quantities have pictures."""


def write_measure_page(
    path: str | Path,
    measurements: Measurement | Iterable[Measurement],
    title: str = "",
    study: Study = PLACEHOLDERS,
) -> Path:
    """Write `measure_page` to a file; returns its path."""
    write_whole(Path(path), measure_page(measurements, title, study))
    return Path(path)


def measure_page(
    measurements: Measurement | Iterable[Measurement], title: str = "", study: Study = PLACEHOLDERS
) -> str:
    """The whole page as HTML, with everything in it: the order of the block types first, and what to do with it.

    Args:
        measurements: one or several, of one probe or of several. Those of one probe at several steps make pictures over
            training, and the last of them the others.
        title: such as the model's name.
        study: what the command on the page compares.

    Raises:
        ValueError: there are none.
    """
    given = [measurements] if isinstance(measurements, Measurement) else list(measurements)
    if not given:
        raise ValueError("there are no measurements to show")
    by_probe: dict[str, list[Measurement]] = {}
    for one in given:
        by_probe.setdefault(one.probe, []).append(one)
    for same in by_probe.values():
        same.sort(key=step_of)
    latest = [same[-1] for same in by_probe.values()]
    headline = measure_text.headline(title or "Measured", given)
    body = [
        "<header>",
        '<p class="kicker">sharpwise measure</p>',
        f"<h1>{escape(headline)}</h1>",
        *(f'<p class="lead">{escape(line)}</p>' for line in measure_text.conclusions(given)),
        "</header>",
        '<div class="grid">',
        _advice(measure_text.advice(given, study)),
        _warnings(latest),
        f'<p class="hint wide">{escape(_lead(by_probe))}</p>',
    ]
    for number, same in enumerate(by_probe.values()):
        body += _cards(same, f"{number}")
    body += [_card_of_values(one) for one in latest]
    body += [_card_of_segments(one) for one in latest]
    body += [_about(same) for same in by_probe.values()]
    return document(f"{headline}: sharpwise measure", "\n".join(part for part in [*body, "</div>"] if part))


def _advice(found: Advice) -> str:
    code = command(found.code) if found.code else ""
    return card("What to do with it", "", f'{code}<p class="lead">{escape(found.reason)}</p>{command(found.command)}',
                wide=True)  # fmt: skip


def _warnings(latest: Sequence[Measurement]) -> str:
    """In one box, a click away."""
    said = [f"{one.probe}: {text}" for one in latest for text in one.warnings]
    if not said:
        return ""
    title = f"Before you believe it: {len(said)} warning{'s' * (len(said) > 1)}"
    return card(title, "", bullets(said), wide=True, folded=True, caution=True)


def _lead(by_probe: Mapping[str, Sequence[Measurement]]) -> str:
    parts = []
    for probe, same in by_probe.items():
        steps = [str(one.step) for one in same if one.step is not None]
        at = (
            f" at {len(steps)} steps, the last {steps[-1]}"
            if len(steps) > 1
            else "".join(f" after step {step}" for step in steps)
        )
        parts.append(probe + at)
    return _upper(", ".join(parts)) + ". Intervals are 95% unless they are said to be bounds."


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cards(same: Sequence[Measurement], prefix: str) -> list[str]:
    """The pictures of one probe; of a quantity that there is nothing to draw of, none."""
    last = same[-1]
    wanted = SHOWN.get(last.probe) or tuple(dict.fromkeys(e.quantity for e in last))
    cards: list[str] = []
    of = "".join(last.probe.partition(" (")[1:])  # " (VO)", of a part of the model

    def add(title: str, quantity: str, kind: str, figure: Figure) -> None:
        name = f"{prefix}-{kind}-{quantity.replace(' ', '-')}"
        cards.append(card(title, _hint(quantity), chart(figure, name, title)))

    for quantity in wanted:
        if quantity == "alpha of a random matrix":
            continue  # it is beside alpha
        name = _upper(quantity) + of
        if _count(last, quantity, "type") >= 2:
            add(f"{name} by type", quantity, "type", measure.by_type(last, quantity))
            steps = {one.step for one in same if _count(one, quantity, "type")}
            if len(steps) >= 2 and None not in steps:
                add(f"{name} over training", quantity, "training", measure.over_training(same, quantity))
        if quantity == "alpha" and _in_layers(last, quantity):
            add("Tail exponent by layer", quantity, "layers", measure.alpha_by_layer(last))
        elif _in_layers(last, quantity):
            add(f"{name} by layer", quantity, "layers", measure.by_layer(last, quantity))
    if last.arrays and last.probe == "spectrum":
        names = _some(list(last.arrays), DENSITIES)
        title = "Eigenvalues" + (f", {len(names)} of {len(last.arrays)} matrices" * (len(names) < len(last.arrays)))
        figure = measure.density({name: last.arrays[name] for name in names})
        cards.append(card(title, "Of W'W.", chart(figure, f"{prefix}-density", title), wide=True))
    drawn = [one for one in same if has_density(one)]
    if drawn:
        title = f"Density of eigenvalues{of}" + " over training" * (len(drawn) > 1)
        figure = density_curve(_some(drawn[::-1], DENSITIES)[::-1])
        hint = f"Of the {drawn[-1].settings['matrix']} matrix, smoothed over a hundredth of their range."
        cards.append(card(title, hint, chart(figure, f"{prefix}-density", title), wide=True))
    return cards


def _hint(quantity: str) -> str:
    return HINTS.get(quantity, "")


def _some(every: Sequence[T], most: int) -> list[T]:
    """At most so many of them, the first and others evenly spaced."""
    n = min(len(every), most)
    return [every[i * len(every) // n] for i in range(n)]


def _count(measurement: Measurement, quantity: str, by: str) -> int:
    return sum(math.isfinite(e.value) for e in measurement.select(quantity=quantity, by=by))


def _in_layers(measurement: Measurement, quantity: str) -> bool:
    """Whether there are values of two layers or more."""
    found = [e for e in measurement.select(quantity=quantity) if e.by == "layer" or "role" in e.notes]
    return len({e.layer for e in found if e.layer is not None and math.isfinite(e.value)}) >= 2


def _card_of_values(one: Measurement) -> str:
    found = [e for e in one if e.by in ("model", "type")]
    if not found:
        return ""
    rows = sorted(((e.of, e) for e in found), key=lambda row: (row[1].by == "type", measure.place(row[0])))
    return card(f"{_upper(one.probe)}: values", "", _values(rows, one.probe), wide=True)


def _card_of_segments(one: Measurement) -> str:
    """All segments, folded away: a large model has hundreds."""
    found = [e for e in one if e.by == "segment"]
    if not found:
        return ""
    content = _values([(e.of, e) for e in found], f"{one.probe}, segments", named=True)
    summary = f"{_upper(one.probe)} of {len({e.of for e in found})} segments"
    return f'<section class="card wide"><details><summary>{escape(summary)}</summary>{content}</details></section>'


def _values(rows: Sequence[tuple[str, Estimate]], label: str, *, named: bool = False) -> str:
    """A row per segment or type, a column per quantity."""
    quantities = list(dict.fromkeys(e.quantity for _, e in rows))
    cells: dict[str, dict[str, Estimate]] = {}
    for name, e in rows:
        cells.setdefault(name, {})[e.quantity] = e
    titles = [_title(q, [e for _, e in rows if e.quantity == q]) for q in quantities]
    head = '<th scope="col"></th>' + "".join(f'<th scope="col" class="number arm">{escape(t)}</th>' for t in titles)
    lines = []
    for name, own in cells.items():
        shown = "".join(f'<td class="number">{escape(_cell(own.get(q)))}</td>' for q in quantities)
        lines.append(f"<tr><td>{code(name) if named else escape(name)}</td>{shown}</tr>")
    return table(head, lines, label)


def _title(quantity: str, found: Sequence[Estimate]) -> str:
    units = {e.unit for e in found if e.unit}
    about = sorted(units)
    if samples := sorted({e.samples for e in found if e.kind == "t-interval"}):
        about.append(f"n = {samples[0]}" + (f" to {samples[-1]}" if len(samples) > 1 else ""))
    return f"{quantity} ({', '.join(about)})" if about else quantity


def _cell(e: Estimate | None) -> str:
    if e is None:
        return "-"
    value = f"{e.value:.4g}"
    return f"{value} ± {measure.short(e.error)}{' (bound)' if e.kind == 'residual' else ''}" if e.error else value


def _about(same: Sequence[Measurement]) -> str:
    last = same[-1]
    items = [(key.replace("_", " "), _plain(value)) for key, value in last.settings.items()]
    items.append(("cost", _cost(same)))
    return card(f"How: {last.probe}", "", facts(items))


def _plain(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cost(same: Sequence[Measurement]) -> str:
    seconds, gradients = (sum(getattr(one.cost, key) for one in same) for key in ("seconds", "gradients"))
    passes = f", {gradients:.3g} gradients' worth of passes" if gradients else ""
    return (f"{seconds * 1000:.3g} ms" if seconds < 0.1 else duration(seconds)) + passes
