"""The marks of points, around 0, by Plotly's names."""

import math

from sharpwise.report.plot import Node


def mark(symbol: str, size: float, colour: str, line: Node | None) -> str:
    """A mark as SVG; those of names that end in `-open` are hollow, `line-...` and `x-thin` are strokes alone.

    Args:
        size: across, in pixels.
        line: its colour and width; None has no outline.
    """
    name, hollow = symbol.removesuffix("-open"), symbol.endswith("-open")
    strokes = name in ("line-ns", "line-ew", "x-thin")
    fill = "none" if hollow or strokes else colour
    stroke = ""
    if line is not None:
        stroke = f' stroke="{line.color or colour}" stroke-width="{line.width:g}"'
    elif hollow or strokes:
        stroke = f' stroke="{colour}" stroke-width="1.5"'
    return f'<path d="{_outline(name, size / 2)}" fill="{fill}"{stroke}/>'


def _outline(name: str, r: float) -> str:
    thin = r * 0.4
    if name == "circle":
        return f"M{-r:g} 0a{r:g} {r:g} 0 1 0 {2 * r:g} 0a{r:g} {r:g} 0 1 0 {-2 * r:g} 0"
    if name == "line-ns":
        return f"M0 {-r:g}V{r:g}"
    if name == "line-ew":
        return f"M{-r:g} 0H{r:g}"
    if name == "x-thin":
        return f"M{-r:g} {-r:g}L{r:g} {r:g}M{-r:g} {r:g}L{r:g} {-r:g}"
    if name == "star":
        return _polygon([(r * 1.25 * (1 if i % 2 == 0 else 0.42), 36 * i) for i in range(10)])
    if name == "star-diamond":
        return _polygon([(r * 1.25 * (1 if i % 2 == 0 else 0.4), 45 * i) for i in range(8)])
    if name in ("cross", "x"):
        turn = 45.0 * (name == "x")
        corners = ((-thin, -r), (thin, -r), (thin, -thin), (r, -thin), (r, thin), (thin, thin))
        points = [*corners, *((-a, -b) for a, b in corners)]
        return _polygon([(math.hypot(a, b), math.degrees(math.atan2(a, -b)) + turn) for a, b in points])
    sides = {"square": (4, 45), "diamond": (4, 0), "triangle-up": (3, 0), "triangle-down": (3, 180)}
    sides |= {"triangle-left": (3, 270), "triangle-right": (3, 90)}
    corners_, turn = sides[name]
    return _polygon([(r * 1.2, turn + 360 * i / corners_) for i in range(corners_)])


def _polygon(points: list[tuple[float, float]]) -> str:
    """Corners by distance and by degrees clockwise from the top."""
    placed = ((r * math.sin(math.radians(turn)), -r * math.cos(math.radians(turn))) for r, turn in points)
    return "M" + "L".join(f"{a:.2f} {b:.2f}" for a, b in placed) + "Z"
