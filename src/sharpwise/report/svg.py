"""Figures as SVG that needs no script: what lies along x is in percent and follows the width of the page, letters and
marks keep their size. Points carry `data-tip`, which page.js shows under the pointer."""

import re
from collections.abc import Iterator, Sequence
from html import escape, unescape
from itertools import pairwise
from typing import Any

from sharpwise.report.axes import Scale
from sharpwise.report.marks import mark
from sharpwise.report.plot import Figure, Node

INK, WIDE = "#222222", 1000  # the width of the box that curves are drawn in, stretched to that of the page
DASHES = {"dot": "1.5 3.5", "dash": "8 5", "dashdot": "8 4 1.5 4", "longdash": "14 5"}
TIPS = 60  # points of a curve that answer to the pointer
LINE = 1.25  # height of a line of text, in its size
CIVIDIS = ("#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838")


def draw(figure: Figure) -> str:
    """A figure as HTML: its legend, if it has one, and the drawing."""
    layout = figure.layout
    margin = layout.margin
    height = layout.height - margin.t - margin.b
    x, y = _scales(figure)
    below = [_shape(shape, x, y, height) for shape in layout.shapes if shape.layer == "below" or shape.type == "rect"]
    above = [_shape(shape, x, y, height) for shape in layout.shapes if shape.layer != "below" and shape.type != "rect"]
    parts = [
        *_axes(layout, x, y, height),
        *below,
        *_traces(figure, x, y, height),
        *above,
        *(_note(note, x, y, height) for note in layout.annotations),
    ]
    box = f"height:{layout.height}px"
    place = f"left:{margin.l}px;top:{margin.t}px;width:calc(100% - {margin.l + margin.r}px);height:{height}px"
    drawn = f'<div class="plot" style="{box}"><svg style="{place}">{"".join(parts)}</svg></div>'
    return (_legend(figure) if layout.showlegend else "") + drawn


def _scales(figure: Figure) -> tuple[Scale, Scale]:
    lying = any(trace.orientation == "h" for trace in figure.data)
    room = 0.05 if any("markers" in (trace.mode or "") for trace in figure.data) else 0.0
    if any(trace.type == "heatmap" for trace in figure.data):
        layers = [value for trace in figure.data for value in trace.x]
        figure.layout.xaxis.update(range=[min(layers) - 0.5, max(layers) + 0.5])
    xs = [value for trace in figure.data for value in trace.x]
    ys = [value for trace in figure.data for value in trace.y]
    return Scale(figure.layout.xaxis, xs, room), Scale(figure.layout.yaxis, ys, 0.0 if lying else 0.05)


# --- axes, lines across, notes ---------------------------------------------------------------------------------------


def _axes(layout: Node, x: Scale, y: Scale, height: float) -> Iterator[str]:
    if x.axis.visible is not False:
        for at, label in _inside(x):
            if x.axis.showgrid:
                yield f'<line class="grid" x1="{_percent(at)}" x2="{_percent(at)}" y1="0" y2="{height}"/>'
            yield f'<text class="middle" x="{_percent(at)}" y="{height}" dy="17">{escape(label)}</text>'
        if x.axis.showline is not False:
            yield f'<line class="axis" x1="0" x2="100%" y1="{height}" y2="{height}"/>'
        yield f'<text class="middle title" x="50%" y="{height + 38}">{_markup(x.axis.title.text)}</text>'
    if y.axis.visible is not False:
        for at, label in _inside(y):
            down = f"{height * (1 - at):.1f}"
            if y.axis.showgrid is not False:
                yield f'<line class="grid" x1="0" x2="100%" y1="{down}" y2="{down}"/>'
            yield f'<text class="end" x="-7" y="{down}" dy="4">{escape(label)}</text>'
        turned = f'transform="translate({13 - layout.margin.l} {height / 2:g}) rotate(-90)"'
        yield f'<text class="middle title" {turned}>{_markup(y.axis.title.text)}</text>'


def _inside(scale: Scale) -> list[tuple[float, str]]:
    return [(at, label) for at, label in scale.ticks() if -1e-6 <= at <= 1 + 1e-6]


def _shape(shape: Node, x: Scale, y: Scale, height: float) -> str:
    if shape.type == "rect":
        left, right = (min(max(x.at(end), 0.0), 1.0) for end in (shape.x0, shape.x1))
        return (
            f'<rect x="{_percent(left)}" width="{_percent(right - left)}" y="0" height="{height}" '
            f'fill="{shape.fillcolor}" fill-opacity="{shape.opacity:g}"/>'
        )
    at = x.at(shape.x0) if shape.y0 is None else y.at(shape.y0)
    if not -1e-6 <= at <= 1 + 1e-6:
        return ""
    if shape.y0 is None:
        ends = f'x1="{_percent(at)}" x2="{_percent(at)}" y1="0" y2="{height}"'
    else:
        ends = f'x1="0" x2="100%" y1="{height * (1 - at):.1f}" y2="{height * (1 - at):.1f}"'
    return f"<line {ends} {_stroke(shape.line)}/>"


def _note(note: Node, x: Scale, y: Scale, height: float) -> str:
    font = note.font or Node()
    size, lines = font.size or 13, note.text.split("<br>")
    left = note.x if note.xref == "paper" else x.of_range(note.x)
    bottom = note.y if note.yref == "paper" else y.of_range(note.y)
    step = size * LINE
    # The base of the first line: of all of them the top, the middle or the bottom lies at the place.
    first = {"top": 0.85 * size, "bottom": -(len(lines) - 1) * step - 0.2 * size}.get(
        note.yanchor, 0.35 * size - (len(lines) - 1) * step / 2
    )
    shift, top = note.xshift or 0, height * (1 - bottom) - (note.yshift or 0) + first
    rows = "".join(f'<tspan x="0" y="{top + i * step:.1f}">{_markup(line)}</tspan>' for i, line in enumerate(lines))
    css = {"left": "start", "right": "end"}.get(note.xanchor, "middle") + " halo" * bool(note.bgcolor)
    look = f'class="{css}" font-size="{size}" fill="{font.color or INK}"'
    return f'<svg x="{_percent(left)}"><text {look} transform="translate({shift} 0)">{rows}</text></svg>'


def _markup(text: str) -> str:
    """Escaped text with <b> and coloured spans as SVG; all else is text, whatever it looks like."""
    parts = re.split(r'(<b>|</b>|<span style="color:#[0-9A-Fa-f]{6}">|</span>)', text)
    found, open_ = "", 0
    for i, part in enumerate(parts):
        if i % 2 == 0:
            found += escape(unescape(part), quote=False)
        elif part.startswith("</"):
            found += "</tspan>" * (open_ > 0)
            open_ = max(open_ - 1, 0)
        else:
            colour = re.search("#[0-9A-Fa-f]{6}", part)
            found += f'<tspan fill="{colour.group()}">' if colour else '<tspan font-weight="700">'
            open_ += 1
    return found + "</tspan>" * open_


def _legend(figure: Figure) -> str:
    items = []
    for trace in figure.data:
        if not trace.name or trace.showlegend is False:
            continue
        if trace.type == "bar":
            drawn = f'<rect y="1" width="12" height="12" fill="{trace.marker.color}"/>'
        else:
            drawn = f'<line x1="0" x2="24" y1="7" y2="7" {_stroke(trace.line)}/>'
        width = 12 if trace.type == "bar" else 24
        items.append(f'<li><svg width="{width}" height="14" aria-hidden="true">{drawn}</svg> {_text(trace.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _traces(figure: Figure, x: Scale, y: Scale, height: float) -> Iterator[str]:
    before: Node | None = None
    stacked: dict[Any, float] = {}
    for trace in figure.data:
        opacity = "" if trace.opacity in (None, 1) else f' opacity="{trace.opacity:g}"'
        if trace.type == "scatter":
            parts = _curve(trace, before, x, y, height) if "lines" in trace.mode else ""
            parts += "".join(_points(trace, x, y, height))
            before = trace
        elif trace.type == "heatmap":
            parts = "".join(_cells(trace, x, y, height))
        elif trace.orientation == "h":
            parts = "".join(_lying(trace, 1 - (figure.layout.bargap or 0.2), stacked, x, y, height))
        else:
            parts = "".join(_upright(trace, x, y, height))
        yield f'<g class="trace"{opacity}>{parts}</g>'


def _curve(trace: Node, before: Node | None, x: Scale, y: Scale, height: float) -> str:
    points = _places(trace, x, y, height)
    inner = ""
    if trace.fill:
        edge = list(points)
        if trace.fill == "tonexty" and before is not None:
            edge += reversed(_places(before, x, y, height))
        inner = f'<polygon points="{_joined(p for p in edge if p)}" fill="{trace.fillcolor}"/>'
    if trace.line.width:
        if trace.line.shape == "hvh":
            points = _steps(points)
        for part in _unbroken(points):
            inner += f'<polyline points="{_joined(part)}" {_stroke(trace.line)}/>'
    return f'<svg class="curve" viewBox="0 0 {WIDE} {height}" preserveAspectRatio="none">{inner}</svg>'


Point = tuple[float, float]


def _places(trace: Node, x: Scale, y: Scale, height: float) -> list[Point | None]:
    found: list[Point | None] = []
    for own, other in zip(trace.x, trace.y, strict=True):
        across, up = x.at(own), y.at(other)
        found.append((WIDE * across, height * (1 - up)) if across == across and up == up else None)
    return found


def _steps(points: Sequence[Point | None]) -> list[Point | None]:
    """Half way to the next point at one height, then at the other."""
    found = list(points[:1])
    for last, point in pairwise(points):
        if last and point:
            middle = (last[0] + point[0]) / 2
            found += [(middle, last[1]), (middle, point[1])]
        found.append(point)
    return found


def _unbroken(points: Sequence[Point | None]) -> list[list[Point]]:
    found: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            found.append([])
        else:
            found[-1].append(point)
    return [part for part in found if len(part) > 1]


def _joined(points: Any) -> str:
    return " ".join(f"{across:.1f},{down:.1f}".replace(".0", "") for across, down in points)


def _points(trace: Node, x: Scale, y: Scale, height: float) -> Iterator[str]:
    """Marks, and where there are none places that answer to the pointer."""
    marks, tips = "markers" in trace.mode, _tips(trace)
    every = 1 if marks else max(1, -(-len(trace.x) // TIPS))
    for i, (own, other) in enumerate(zip(trace.x, trace.y, strict=True)):
        across, up = x.at(own), y.at(other)
        inside = -0.02 <= across <= 1.02 and -0.02 <= up <= 1.02  # what has no place is not
        if not inside or (not marks and (not tips or (len(trace.x) - 1 - i) % every)):
            continue
        style = trace.marker or Node()
        colour = _of(style.color, i) or (trace.line or Node()).color or INK
        size = (_of(style.size, i) if style.size is not None else 6) if marks else 0
        drawn = mark(_of(style.symbol, i) or "circle", size, colour, style.line) if size else ""
        if tips:
            drawn += f'<circle class="tip" r="{max(6, size / 2 + 3):g}" fill="{colour}" data-tip="{tips[i]}"/>'
        if drawn:
            yield f'<svg x="{_percent(across)}" y="{height * (1 - up):.1f}">{drawn}</svg>'


def _upright(trace: Node, x: Scale, y: Scale, height: float) -> Iterator[str]:
    tips, errors = _tips(trace), trace.error_y
    wide = 0.8 / (x.high - x.low)
    foot = 0.0 if y.log else min(max(y.at(0.0), 0.0), 1.0)
    for i, (own, other) in enumerate(zip(trace.x, trace.y, strict=True)):
        at, up = x.at(own), y.at(other)
        low, high = sorted((foot, up))
        colour, line = _of(trace.marker.color, i), trace.marker.line
        yield (
            f'<rect x="{_percent(at - wide / 2)}" width="{_percent(wide)}" y="{height * (1 - high):.1f}" '
            f'height="{height * (high - low):.1f}" fill="{colour}" stroke="{_of(line.color, i)}" '
            f'stroke-width="{line.width}" data-tip="{tips[i]}"/>'
        )
        if errors is not None and errors.visible and errors.array[i]:
            top, bottom = (height * (1 - y.at(end)) for end in (other + errors.array[i], other - errors.arrayminus[i]))
            half = errors.width
            path = f"M0 {top:.1f}V{bottom:.1f}M{-half} {top:.1f}H{half}M{-half} {bottom:.1f}H{half}"
            stroke = f'fill="none" stroke="{errors.color}" stroke-width="{errors.thickness}"'
            yield f'<svg x="{_percent(at)}"><path d="{path}" {stroke}/></svg>'


def _lying(trace: Node, share: float, stacked: dict[Any, float], x: Scale, y: Scale, height: float) -> Iterator[str]:
    tips = _tips(trace)
    thick = share * height / abs(y.high - y.low)
    for i, (long, row) in enumerate(zip(trace.x, trace.y, strict=True)):
        begin = stacked.get(row, 0.0)
        stacked[row] = begin + long
        left, right, top = x.at(begin), x.at(begin + long), height * (1 - y.at(row)) - thick / 2
        yield (
            f'<rect x="{_percent(left)}" width="{_percent(right - left)}" y="{top:.1f}" '
            f'height="{thick:.1f}" fill="{trace.marker.color}" data-tip="{tips[i]}"/>'
        )


def _cells(trace: Node, x: Scale, y: Scale, height: float) -> Iterator[str]:
    known = [value for row in trace.z for value in row if value is not None]
    low, high = min(known), max(known)
    wide, thick = 1 / (x.high - x.low), height / (y.high - y.low)
    for name, row, said in zip(trace.y, trace.z, trace.customdata, strict=True):
        for layer, value, own in zip(trace.x, row, said, strict=True):
            if value is None:
                continue
            tip = _filled(trace.hovertemplate, {"x": layer, "y": name, "customdata": own})
            yield (
                f'<rect x="{_percent(x.at(layer) - wide / 2)}" width="{_percent(wide)}" stroke="#fff" '
                f'y="{height * (1 - y.at(name)) - thick / 2:.1f}" height="{thick:.1f}" '
                f'fill="{_cividis((value - low) / (high - low) if high > low else 0.5)}" data-tip="{tip}"/>'
            )
    bar = trace.colorbar
    steps = "".join(
        f'<rect x="8" width="10" y="{height * (1 - (i + 1) / 40):.1f}" height="{height / 40 + 0.5:.1f}" '
        f'fill="{_cividis((i + 0.5) / 40)}"/>'
        for i in range(40)
    )
    for value, text in zip(bar.tickvals, bar.ticktext, strict=True):
        at = (value - low) / (high - low) if high > low else 0.5
        steps += f'<text x="22" y="{height * (1 - at):.1f}" dy="4" class="start">{escape(text)}</text>'
    yield f'<svg x="100%">{steps}</svg>'


def _cividis(share: float) -> str:
    """The colour of a share of the range, between two of the table.

    >>> _cividis(0.0), _cividis(1.0)
    ('#00224e', '#fee838')
    """
    at = min(max(share, 0.0), 1.0) * (len(CIVIDIS) - 1)
    i = min(int(at), len(CIVIDIS) - 2)
    pairs = ((int(CIVIDIS[i][k : k + 2], 16), int(CIVIDIS[i + 1][k : k + 2], 16)) for k in (1, 3, 5))
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02x}" for a, b in pairs)


# --- words -----------------------------------------------------------------------------------------------------------


def _tips(trace: Node) -> list[str]:
    """What the pointer is told at each point, as an attribute; nothing where points are silent."""
    if trace.hoverinfo == "skip":
        return []
    if trace.hovertext is not None:
        return [_tip(str(_of(trace.hovertext, i))) for i in range(len(trace.x))]
    if not trace.hovertemplate:
        return []
    own = trace.customdata or [None] * len(trace.x)
    points = zip(trace.x, trace.y, own, strict=True)
    return [_filled(trace.hovertemplate, {"x": x, "y": y, "customdata": said}) for x, y, said in points]


def _filled(template: str, values: dict[str, Any]) -> str:
    """
    >>> _filled("step %{x:,}: %{y:.2f}<extra></extra>", {"x": 1200, "y": 0.123})
    'step 1,200: 0.12'
    """

    def value(found: re.Match[str]) -> str:
        own = values[found.group(1)]
        return escape("-" if own is None else format(own, found.group(2) or ""))

    return _tip(re.sub(r"%\{(\w+)(?::([^}]*))?\}", value, template.replace("<extra></extra>", "")))


def _tip(text: str) -> str:
    return "&#10;".join(escape(unescape(line)) for line in text.split("<br>"))


def _text(text: str) -> str:
    return escape(unescape(text))


def _of(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, tuple) else value


def _percent(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"


def _stroke(line: Node) -> str:
    dash = f' stroke-dasharray="{DASHES[line.dash]}"' if line.dash in DASHES else ""
    return f'stroke="{line.color}" stroke-width="{line.width:g}"{dash}'
