"""The look of all figures: colours that colour-blind readers can tell apart, lines named where they end."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from sharpwise.report.plot import Figure

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


def figure(x: str, y: str, height: int = HEIGHT) -> Figure:
    """An empty figure with the titles of its axes."""
    return Figure(
        {
            "height": height,
            "margin": {"l": 52, "r": 96, "t": 12, "b": 46},
            "xaxis": {"title": {"text": x}, "showgrid": False},
            "yaxis": {"title": {"text": y}},
        }
    )


def label_ends(
    figure: Figure, labels: Sequence[tuple[str, float, str]], low: float, high: float, height: int = HEIGHT
) -> None:
    """Name lines at the right edge, at the height `value` of each, moved apart where they would overlap.

    Args:
        labels: (text, value, colour); a text is markup: `text(name)` of what comes from outside.
        low, high: the range of the y axis (of a logarithmic one, in powers of ten, and the values with them).
        height: of the figure, in pixels.
    """
    pixels = height - 58  # without the margins
    heights = [LABEL_HEIGHT * (1 + text.count("<br>")) / pixels for text, _, _ in labels]
    wanted = [(value - low) / (high - low) for _, value, _ in labels]
    for (text, _, colour), y in zip(labels, spread(wanted, heights), strict=True):
        figure.add_annotation(
            xref="paper", x=1.0, xanchor="left", xshift=6, yref="paper", y=y, yanchor="middle", text=text,
            font={"color": colour, "size": 12},
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


def padded(low: float, high: float, share: float) -> tuple[float, float]:
    """The range with a share of it added on both sides; never empty."""
    room = max(high - low, 1e-3) * share
    return low - room, high + room


def text(name: str) -> str:
    """A name for a figure, which takes labels and hovers for markup."""
    return escape(name, quote=False)


def wrapped(name: str) -> str:
    """The name of an arm, on several lines."""
    return text(name).replace(" + ", " +<br>")


def faded(colour: str, opacity: float) -> str:
    """A hexadecimal colour, seen through.

    >>> faded("#0072B2", 0.2)
    'rgba(0,114,178,0.2)'
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def logarithmic(figure: Figure, low: float, high: float) -> tuple[float, float]:
    """Make the y axis logarithmic, from `low` to `high`; returns its range in powers of ten."""
    bottom, top = math.log10(low), math.log10(high)
    axis: dict[str, Any] = {"type": "log", "range": [bottom, top]}
    # Below two decades the powers of ten alone would leave one tick or none.
    figure.update_yaxes(**axis, dtick="D2" if top - bottom < 2 else 1, tickformat="~g" if low >= 1e-3 else ".0e")
    return bottom, top
