"""What a search of factors found: by type its factor and what that gained, every step that was tried, and a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sharpwise.compare.report.arms import Arm, Result
from sharpwise.report import figures
from sharpwise.report.html import card, chart, command, table
from sharpwise.report.plot import Figure
from sharpwise.train.config import OptimizerConfig

Search = Mapping[str, Any]
Step = Mapping[str, Any]
HEIGHT = 230
WORDS = {"lr": "lr", "weight_decay": "weight decay", "beta2": "1 - beta2"}
ENDS = {
    "nothing": "nothing won any more",
    "runs": "what the next type may take is more than the runs that are left: more of them may find more",
    "": "it is not at its end",
}
HINT = (
    "Steps of x2 and of x1.41, one type at a time, each against the factors that held then: with one seed first, "
    "where it wins with a second one; a step is taken if it wins with both. Two seeds give a direction, no "
    "measurement: what all factors together are worth, the final runs say, with other seeds."
)
FIGURE_HINT = (
    "Loss minus that at factor 1, against the factor. Filled: the mean of two seeds, with both as dashes; open: one "
    "seed alone. The full line: steps that were taken, from the end of which the next ones are drawn."
)


@dataclass(frozen=True)
class Row:
    """A type: its factor on `of`, the nats that the steps taken gained at each seed, and all steps that were tried."""

    of: str
    type: str
    factor: float
    gains: tuple[float, ...]
    tried: tuple[str, ...]

    @property
    def gained(self) -> str:
        """The gain as text: its mean, and that of each seed."""
        if not self.gains:
            return "-"
        return f"{_mean(self.gains):.3f} ({', '.join(f'{gain:.3f}' for gain in self.gains)})"


def searches(result: Result) -> list[tuple[Arm, Search]]:
    """The arms with a search that has begun."""
    return [(arm, arm["search"]) for arm in result["arms"] if arm.get("search")]


def found_factors(search: Search) -> dict[tuple[str, str], float]:
    """By quantity and type the factor that was found, in the order of the search."""
    own = {"lr": search["factors"], **search.get("factors_of", {})}
    order = list(dict.fromkeys(_of(step) for step in search["steps"]))  # what was not tried yet comes last
    names = sorted(own, key=lambda of: order.index(of) if of in order else len(order))
    return {(of, name): factor for of in names for name, factor in own[of].items()}


def rows(search: Search) -> list[Row]:
    """A row for each quantity and type, in the order of the search."""
    found = []
    for (of, name), factor in found_factors(search).items():
        steps = steps_of(search, of, name)
        moves = [differences(step) for step in steps if step["taken"]]
        gains = tuple(-sum(move) for move in zip(*moves, strict=True)) if all(moves) else ()
        found.append(Row(of, name, factor, gains, tuple(map(_tried, steps))))
    return found


def steps_of(search: Search, of: str, name: str) -> list[Step]:
    """The steps of the factor of a type on a quantity."""
    return [step for step in search["steps"] if (_of(step), step["type"]) == (of, name)]


def _of(step: Step) -> str:
    return str(step.get("of", "lr"))  # results of before there was another


def spelled(search: Search) -> list[str]:
    """How what was found is written: arguments of an optimizer, a line each."""
    found = [f'block_lr="{search["block_lr"]}"'] if search["block_lr"] else []
    if settings := OptimizerConfig(settings_of=search.get("settings_of", {})).groups:
        found.insert(0, f"params=sharpwise.param_groups(model, {settings!r}), model=model")
    return found


def differences(step: Step) -> list[float]:
    """Loss minus that of the factors that held, at each seed; () where a run diverged."""
    pairs = list(zip(step["losses"], step["against"], strict=True))
    return [] if any(None in pair for pair in pairs) else [loss - against for loss, against in pairs]


def summary(search: Search) -> str:
    """How many runs it took, and why it ended."""
    return f"{len(search['runs'])} runs of at most {search['most']}; {ENDS[search['ended']]}."


def _tried(step: Step) -> str:
    found = differences(step)
    said = ", ".join(f"{value:+.3f}" for value in found) if found else "diverged"
    return f"x{step['before']:g} to x{step['after']:g}: {said}{' (taken)' if step['taken'] else ''}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- the page --------------------------------------------------------------------------------------------------------


def cards(result: Result) -> list[str]:
    """A card for each search."""
    return [_card(arm, search, i) for i, (arm, search) in enumerate(searches(result))]


def _card(arm: Arm, search: Search, number: int) -> str:
    none = '<p class="lead">Every factor is 1: no step was taken.</p>'
    charts = "".join(
        f"<div><h3>{escape(name)}</h3>{chart(own, f'factor-{number}-{i}', f'Loss against the factor of {name}')}</div>"
        for i, (name, own) in enumerate(figure_of_types(search).items())
    )
    content = (
        f'<p class="lead">{escape(summary(search)[0].upper() + summary(search)[1:])} To write, at lr '
        f"{arm['setting']['optimizer.lr']:g}:</p>{''.join(map(command, spelled(search))) or none}{_table(search)}"
        + (f'<br><p class="hint">{FIGURE_HINT}</p><div class="three">{charts}</div>' if charts else "")
        + _steps(search)
    )
    return card(f"Factors found by search: {arm['name']}", HINT, content, wide=True)


def _table(search: Search) -> str:
    head = "".join(
        f'<th scope="col"{css}>{title}</th>'
        for title, css in (
            ("on", ""),
            ("type", ""),
            ("factor", ' class="number"'),
            ("gained, nats (each seed)", ' class="number"'),
            ("steps tried", ' class="number roomy"'),
        )
    )
    lines = [
        f'<tr{" class=best" * (row.factor != 1)}><td>{WORDS[row.of]}</td><th scope="row">{escape(row.type)}</th>'
        f'<td class="number">x{row.factor:g}</td><td class="number">{row.gained}</td>'
        f'<td class="number roomy">{len(row.tried)}</td></tr>'
        for row in rows(search)
    ]
    return table(head, lines, "Factors by type")


def _steps(search: Search) -> str:
    titles = ("round", "on", "type", "step", "loss minus that before, at each seed")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    lines = []
    for step in search["steps"]:
        move, _, said = _tried(step).partition(": ")
        css = ' class="best"' if step["taken"] else ""
        cells = "".join(
            f"<td>{escape(text)}</td>" for text in (str(step["round"]), WORDS[_of(step)], step["type"], move, said)
        )
        lines.append(f"<tr{css}>{cells}</tr>")
    if not lines:
        return ""
    drawn = table(head, lines, "Steps of the search")
    return f'<details class="more"><summary>Every step, in order</summary>{drawn}</details>'


# --- the figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A step as it is drawn: from `x0, y0` to `x1`, at the height of each seed."""

    x0: float
    y0: float
    x1: float
    ys: tuple[float, ...]
    taken: bool


def points(steps: Sequence[Step]) -> list[Point]:
    """The steps of a factor, heights from that of factor 1: where a step was taken the next begins at its mean."""
    heights, found = {1.0: 0.0}, []
    for step in steps:
        base, moves = heights.get(step["before"], 0.0), differences(step)
        found.append(Point(step["before"], base, step["after"], tuple(base + move for move in moves), step["taken"]))
        if step["taken"]:
            heights[step["after"]] = base + (_mean(moves) if moves else 0.0)
    return found


def figure_of_types(search: Search) -> dict[str, Figure]:
    """Loss against factor of every type that was tried, and where there are several of every quantity, on one scale."""
    keys = found_factors(search)
    several = len({of for of, _ in keys}) > 1
    drawn = {f"{name}, {WORDS[of]}" if several else name: points(steps_of(search, of, name)) for of, name in keys}
    drawn = {name: own for name, own in drawn.items() if own}
    heights = [y for own in drawn.values() for point in own for y in point.ys]
    # A step that ruins a run would flatten all others: its point lies at the edge, with its number.
    low = min([0.0, *heights])
    usual = sorted(heights)[3 * len(heights) // 4] if heights else 0.0
    high = min(max([0.0, *heights]), max(2 * usual, -low, 0.02))
    edges = figures.padded(low, high, 0.12)
    factors = sorted({x for own in drawn.values() for point in own for x in (point.x0, point.x1)})
    return {name: _figure(name, own, edges, factors) for name, own in drawn.items()}


def _figure(name: str, drawn: Sequence[Point], edges: tuple[float, float], factors: Sequence[float]) -> Figure:
    figure = figures.figure("factor (log scale)", "nats", HEIGHT)
    figure.update_layout(margin={"l": 52, "r": 12, "t": 10, "b": 44})
    colour = figures.TYPE_COLOURS.get(name.partition(",")[0], figures.TYPE_COLOURS["Other"])
    figure.add_hline(y=0, line={"color": figures.GRID, "width": 1.5}, layer="below")
    for point in drawn:
        mean = min(_mean(point.ys), edges[1]) if point.ys else edges[1]
        said = f"{figures.text(name)} x{point.x0:g} to x{point.x1:g}: "
        said += ", ".join(f"{y - point.y0:+.4f}" for y in point.ys) if point.ys else "diverged"
        figure.add_scatter(
            x=[point.x0, point.x1], y=[point.y0, mean], mode="lines", hoverinfo="skip",
            line={"color": colour, "width": 2.5 if point.taken else 1, "dash": "solid" if point.taken else "dot"},
        )  # fmt: skip
        if len(point.ys) > 1:
            figure.add_scatter(
                x=[point.x1] * len(point.ys), y=[min(y, edges[1]) for y in point.ys], mode="markers", hoverinfo="skip",
                marker={"symbol": "line-ew", "size": 9, "line": {"color": colour, "width": 1.5}},
            )  # fmt: skip
        symbol = "circle" if point.ys else "x-thin"
        figure.add_scatter(
            x=[point.x1], y=[mean], mode="markers", hovertext=said, hoverinfo="text",
            marker={
                "symbol": symbol, "size": 10, "color": colour if len(point.ys) > 1 else "#ffffff",
                "line": {"color": colour, "width": 2},
            },
        )  # fmt: skip
        if point.ys and _mean(point.ys) > edges[1]:
            figure.add_annotation(
                x=math.log2(point.x1) * math.log10(2), y=edges[1], yanchor="top", yshift=-8,
                text=f"↑ {_mean(point.ys):+.2f}", font={"size": 11, "color": colour},
            )  # fmt: skip
    figure.add_scatter(x=[1], y=[0], mode="markers", hoverinfo="skip", marker={"size": 7, "color": figures.INK})
    _axis(figure, factors)
    figure.update_yaxes(range=list(edges), nticks=5)
    return figure


def _axis(figure: Figure, factors: Sequence[float]) -> None:
    """Powers of two, as many as a third of a page or a phone has room for."""
    low, high = (math.log2(end) for end in (min(factors), max(factors)))
    step = max(1, math.ceil((high - low) / 5))
    powers = [power for power in range(math.floor(low), math.ceil(high) + 1) if power % step == 0]
    room = 0.35 * math.log10(2)
    figure.update_xaxes(
        type="log", range=[low * math.log10(2) - room, high * math.log10(2) + room], showgrid=True,
        tickvals=[2.0**power for power in powers], ticktext=[f"{2.0**power:g}" for power in powers],
    )  # fmt: skip
