"""Pictures as SVG text, of numbers that are given: bars, and curves with a band around each.

Sizes are those of the drawing; a page shows it as wide as the column, at most. The background is white, whatever the
page has.
"""

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#806000", "#999999", "#222222", "#e69f00")
"""Told apart by most eyes (Okabe and Ito)."""
INK, FAINT = "#222222", "#d8d8d8"
FONT = 'font-family="system-ui, sans-serif" font-size="13"'


class Curve(NamedTuple):
    """A line, and from `low` to `high` its band; both empty for none."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def svg(width: int, height: int, *parts: str, title: str) -> str:
    """A whole drawing."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" {FONT}>\n'
        f'<title>{escape(title)}</title>\n<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = INK, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(words)}</text>'


def bars(rows: Sequence[tuple[str, float, str]], title: str, *, left: int = 0, width: int = 360) -> list[str]:
    """A bar per row, its name above it and what it says behind it; the longest takes the width."""
    largest, parts = max(value for _, value, _ in rows), [text(left, 16, title, bold=True)]
    for at, (label, value, words) in enumerate(rows):
        y, long = 34 + 34 * at, (width - 90) * value / largest
        parts += [
            text(left, y + 8, label),
            f'<rect x="{left}" y="{y + 13}" width="{long:.1f}" height="10" fill="{COLOURS[0]}"/>',
            text(left + long + 6, y + 23, words),
        ]
    return parts


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high."""
    size = next(
        step * 10.0**power
        for power in range(-6, 12)
        for step in (1, 2, 5)
        if (high - low) / (step * 10.0**power) <= most
    )
    first = int(low / size) - 1
    return [round(n * size, 9) for n in range(first, first + 2 * most + 4) if low <= n * size <= high]


def curves(
    given: Sequence[Curve],
    x_name: str,
    title: str,
    *,
    left: int = 0,
    width: int = 480,
    height: int = 300,
    lowest: float,
    highest: float,
    spelled: Callable[[float], str] = "{:g}".format,
) -> list[str]:
    """Lines over one axis from `lowest` to `highest`, beyond which nothing is drawn; their names below."""
    x_low, x_high = min(min(c.x) for c in given), max(max(c.x) for c in given)
    box = (left + 48, 28, left + width - 8, height - 44)

    def place(x: float, y: float) -> tuple[float, float]:
        across = box[0] + (box[2] - box[0]) * (x - x_low) / (x_high - x_low)
        return across, box[3] - (box[3] - box[1]) * (min(max(y, lowest), highest) - lowest) / (highest - lowest)

    parts = [text(left, 16, title, bold=True)]
    for value in ticks(lowest, highest):
        y = place(x_low, value)[1]
        parts += [f'<path d="M{box[0]} {y:.1f}H{box[2]}" stroke="{INK if value == 0 else FAINT}"/>']
        parts += [text(box[0] - 6, y + 4, f"{value:g}", anchor="end")]
    for value in ticks(x_low, x_high, 4):
        parts += [text(place(value, lowest)[0], box[3] + 17, spelled(value), anchor="middle")]
    parts += [text(box[2], box[3] + 33, x_name, anchor="end")]
    for at, curve in enumerate(given):
        colour = COLOURS[at % len(COLOURS)]
        if curve.low:
            there = [place(x, y) for x, y in zip(curve.x, curve.high, strict=True)]
            back = [place(x, y) for x, y in zip(curve.x, curve.low, strict=True)]
            parts += [f'<path d="{_path([*there, *reversed(back)])}Z" fill="{colour}" fill-opacity="0.2"/>']
        line = [place(x, y) for x, y in zip(curve.x, curve.y, strict=True)]
        parts += [f'<path d="{_path(line)}" fill="none" stroke="{colour}" stroke-width="2"/>']
        if len(given) > 1:
            parts += [f'<path d="M{left} {height + 12 + 20 * at}h18" stroke="{colour}" stroke-width="3"/>']
            parts += [text(left + 24, height + 16 + 20 * at, curve.label)]
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
