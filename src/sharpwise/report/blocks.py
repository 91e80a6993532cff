"""What both pages show of a block map: the table with equal layers collapsed, the learning rate of each block type."""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from sharpwise.blocks import Segment
from sharpwise.blocks.names import stem_and_number, with_numbers
from sharpwise.report import figures, html
from sharpwise.report.plot import Figure

# Lines of single layers in one band; of more layers, as many evenly chosen ones.
MAX_LAYER_LINES = 16


def describe(segment: Segment) -> dict[str, Any]:
    """What the table shows of a segment, as plain values."""
    return {
        "name": segment.name,
        "shape": list(segment.shape),
        "type": str(segment.block_type),
        "role": str(segment.role),
        "rows": segment.describe_rows(),
        "heads": segment.heads,
        "parameters": segment.numel,
        "tied": list(segment.tied),
    }


Block = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the block map: what it shows of blocks that are alike; with `sums` also of all together."""

    title: str
    css: str
    cell: Callable[[Sequence[Block]], str]
    sums: bool = False


def block_table(blocks: Iterable[Block], factors: Mapping[str, str]) -> str:
    """The block map as an HTML table, one row for all layers that are alike, and the sums.

    Args:
        blocks: what `describe` makes, perhaps with what `moving` makes, and under `multipliers` the factors on the
            learning rate by name.
        factors: columns with such factors: their names, and the titles of the columns.
    """
    blocks = list(blocks)
    columns = [
        Column("role", "", _text("role")),
        Column("type", "roomy", _text("type")),
        Column("rows", "roomy", _rows),
    ]
    size = Column("size", "number", _sum("parameters"), sums=True)
    if any("rule" in block for block in blocks):
        columns += [size, *(Column(title, "roomy", _text(key)) for key, title in MOVING.items())]
        columns.append(Column("state, bytes", "number roomy", _sum("state"), sums=True))
    else:
        columns += [Column("shape", "roomy", lambda own: "x".join(map(str, own[0]["shape"]))), size]
    columns += [Column(title, "number arm", _range(factor)) for factor, title in factors.items()]
    head = "".join(f'<th scope="col" class="{one.css}">{html.breakable(one.title)}</th>' for one in columns)
    lines = []
    for name, members in _collapsed(blocks):
        tied = "".join(f"<br>= {code(other)}" for other in members[0]["tied"])
        cells = "".join(f'<td class="{one.css}">{one.cell(members)}</td>' for one in columns)
        lines.append(f"<tr><td>{code(name)}{tied}</td>{cells}</tr>")
    sums = "".join(f'<td class="{one.css}">{one.cell(blocks) if one.sums else ""}</td>' for one in columns)
    return html.table(f'<th scope="col">parameter</th>{head}', [*lines, f'<tr class="rule"><td>all</td>{sums}</tr>'],
                      "Block map")  # fmt: skip


MOVING = {"rule": "rule", "cut": "cut", "decay": "decay", "storage": "storage", "backend": "moved by"}
"""What is shown of how a segment is moved, with the titles of the columns."""


def moving(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a row of `explain()`: those, the reason why no other back end moves it, and its bytes."""
    if not row:
        return {}
    shown = {key: f"{value:g}" if isinstance(value := row.get(key), float) else str(value) for key in MOVING}
    shown["backend"] += f" ({row['why']})" if row.get("why") else ""
    size = row.get("bytes")
    return {**shown, "state": size if isinstance(size, int) else 0}


def _text(key: str) -> Callable[[Sequence[Block]], str]:
    return lambda members: escape(members[0].get(key, "-"))


def _rows(members: Sequence[Block]) -> str:
    heads = members[0]["heads"]
    return escape(members[0]["rows"]) + ("" if heads is None else f" ({heads} head{'s' * (heads > 1)})")


def _sum(key: str) -> Callable[[Sequence[Block]], str]:
    return lambda members: f"{sum(block.get(key, 0) for block in members):,}"


def code(name: str) -> str:
    """A name that may break after its dots, and not within a range of layers such as {0..3}."""
    return f"<code>{re.sub(r'(?<![.])[.](?![.])', '.<wbr>', escape(name))}</code>"


def _range(factor: str) -> Callable[[Sequence[Block]], str]:
    def cell(members: Sequence[Block]) -> str:
        known = [value for block in members if (value := block["multipliers"].get(factor)) is not None]
        low, high = (f"{end(known):.3g}" if known else "-" for end in (min, max))
        return low if low == high else f"{low} to {high}"

    return cell


def _collapsed(blocks: Iterable[Block]) -> list[tuple[str, list[Block]]]:
    """The name with the range of layers, and the blocks of the layers; they may differ in their multipliers."""
    groups: dict[tuple[str, ...], list[tuple[int | None, Block]]] = {}
    for block in blocks:
        stem, number = stem_and_number(block["name"])
        alike = {key: value for key, value in block.items() if key not in ("name", "multipliers")}
        groups.setdefault((stem, json.dumps(alike)), []).append((number, block))
    return [
        (with_numbers(stem, [number for number, _ in members]), [block for _, block in members])
        for (stem, _), members in groups.items()
    ]


# --- values of each block type along a run ---------------------------------------------------------------------------

Layers = tuple[tuple[float, ...], ...]
"""A quantity of one role along a run: one curve, or one for each layer where layers differ."""


@dataclass(frozen=True)
class TypeLine:
    """Block types, or roles where those of one type differ, that share a quantity along a run.

    `dash` is the kind of the line, and `mark` what stands before the label, where no colour tells lines apart.
    """

    label: str
    colour: str
    layers: Layers
    layer_names: tuple[str, ...] = ()
    dash: str = "solid"
    mark: str = ""

    @property
    def peaks(self) -> list[float]:
        """The largest value of each layer."""
        return [max(curve, default=0.0) for curve in self.layers]

    @property
    def peak(self) -> float:
        """The largest value of all layers."""
        return max(self.peaks, default=0.0)


def type_lines(
    types: Mapping[str, str], values: Mapping[str, Layers], layer_names: Mapping[str, tuple[str, ...]] | None = None
) -> list[TypeLine]:
    """One line for all block types whose values coincide, from the largest down.

    Args:
        types: the block type of each role.
        values: by role, one curve or one per layer.
        layer_names: by role, what the curves of layers are called where there are several.
    """
    names = names_of_roles(types, values)
    type_of = {name: types[role] for role, name in names.items()}
    by_values: dict[tuple[Layers, tuple[str, ...]], list[str]] = {}
    for role, name in names.items():
        members = by_values.setdefault((values[role], (layer_names or {}).get(role, ())), [])
        if name not in members:
            members.append(name)
    lines = []
    for (curves, layers), members in by_values.items():
        everywhere = len(members) == len(type_of)
        colour = figures.INK if everywhere else _colour(type_of[members[-1]])
        lines.append(TypeLine("all blocks" if everywhere else ", ".join(members), colour, curves, layers))
    return sorted(lines, key=lambda line: -line.peak)


def _colour(kind: str) -> str:
    return figures.TYPE_COLOURS.get(kind, figures.TYPE_COLOURS["Other"])


def names_of_roles(types: Mapping[str, str], values: Mapping[str, Layers]) -> dict[str, str]:
    """The block type of each role, or the role itself where roles of one type have different values."""
    names = {}
    roles = sorted((role for role in types if role in values), key=lambda role: types[role])
    for kind, group in groupby(roles, key=lambda role: types[role]):
        members = list(group)
        curves = [values[role] for role in members]
        for role in members:
            names[role] = kind if all(curve == curves[0] for curve in curves) else role
    # The token embedding is what the papers call Emb.
    return {role: "Emb" if name == "tok_emb" else name for role, name in names.items()}


def type_figure(
    x: Sequence[float],
    lines: Sequence[TypeLine],
    *,
    top: float,
    log: bool = False,
    title: str = "tokens",
    hover: str = "%{x:,} tokens",
) -> Figure:
    """A line per block type, named beside its peak; where layers differ a band, with the layers in it.

    Args:
        x: of all curves.
        lines: from `type_lines`.
        top: the largest value of this and of figures beside it.
        log: whether to draw it to a logarithmic scale, where factors far apart stay visible.
        title: of the x axis.
        hover: what stands for x when the pointer is over a line.
    """
    figure = figures.figure(title, "", height=280)
    low, high = 0.0, top * 1.08 or 1.0
    floor = -math.inf
    if log:
        # A decay to zero is cut off; warm-up and the rest of a schedule lie within a factor of 30.
        floor = min((peak for line in lines for peak in line.peaks if peak > 0), default=top or 1.0) / 30
        low, high = figures.logarithmic(figure, floor, (top or 1.0) * 1.5)
    else:
        figure.update_yaxes(range=[low, high], nticks=6, tickformat="~g")
    labels = []
    for line in lines:
        label = figures.text(line.label)
        if len(line.layers) == 1:
            _add_curve(figure, x, line.layers[0], line.colour, label, f"{label}<br>{hover}", 2, floor, line.dash)
        else:
            _add_band(figure, x, line, label, hover, floor)
        # At the end all lines come together: the labels stand beside the peaks, in their order.
        ends = [max(line.peaks), min(line.peaks)]
        middle = math.sqrt(ends[0] * ends[1]) if log else sum(ends) / 2
        name = line.mark + label.replace(", ", ",<br>") + ("<br>by layer" if len(line.layers) > 1 else "")
        labels.append((name, math.log10(max(middle, floor)) if log else middle, line.colour))
    figure.update_xaxes(tickformat="~s", nticks=4)
    figures.label_ends(figure, labels, low, high, height=280)
    return figure


def _add_curve(
    figure: Figure,
    x: Sequence[float],
    y: Sequence[float],
    colour: str,
    name: str,
    hover: str,
    width: float,
    floor: float,
    dash: str = "solid",
) -> None:
    figure.add_scatter(
        x=list(x),
        y=[max(value, floor) for value in y],
        mode="lines",
        name=name,
        line={"color": colour, "width": width, "dash": dash},
        hovertemplate=f"{hover}: %{{y:.3g}}<extra></extra>",
    )


def _add_band(figure: Figure, x: Sequence[float], line: TypeLine, label: str, hover: str, floor: float) -> None:
    columns = list(zip(*line.layers, strict=True))
    for edge, fill in ((min, None), (max, "tonexty")):
        figure.add_scatter(
            x=list(x),
            y=[max(edge(column), floor) for column in columns],
            mode="lines",
            name=f"{label}, {'smallest' if edge is min else 'largest'}",
            line={"color": line.colour, "width": 0},
            fill=fill,
            fillcolor=figures.faded(line.colour, 0.18),
            hoverinfo="skip",
        )
    last = len(line.layers) - 1
    shown = min(last, MAX_LAYER_LINES - 1)
    for layer in sorted({round(i * last / shown) for i in range(shown + 1)}):
        name = f"{label}, {line.layer_names[layer] if line.layer_names else f'layer {layer}'}"
        _add_curve(figure, x, line.layers[layer], line.colour, name, f"{name}<br>{hover}", 1, floor)
