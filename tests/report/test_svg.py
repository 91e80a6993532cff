"""Figures as SVG: everything lies where its numbers say, and is told to the pointer."""

import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from sharpwise.report import figures
from sharpwise.report.axes import Scale
from sharpwise.report.marks import mark
from sharpwise.report.plot import Figure, Node
from sharpwise.report.svg import draw

HEIGHT, TOP, BOTTOM = 258, 12, 46
PLOT = HEIGHT - TOP - BOTTOM
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "triangle-left", "triangle-right", "cross"]
SYMBOLS += ["star", "star-diamond", "x", "x-thin", "line-ns", "line-ew", "diamond-open"]


def figure(x: tuple[float, float] = (0, 10), y: tuple[float, float] = (0, 1)) -> Figure:
    found = figures.figure("across", "up", HEIGHT)
    found.update_xaxes(range=x)
    found.update_yaxes(range=y)
    return found


def drawn(given: Figure) -> ElementTree.Element:
    """What is drawn, as XML: it has to be well-formed."""
    return ElementTree.fromstring(f"<div>{draw(given)}</div>")


def groups(given: Figure) -> list[ElementTree.Element]:
    return [one for one in drawn(given).iter("g") if one.get("class") == "trace"]


def points(text: str | None) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in (text or "").split()]  # type: ignore[misc]


def test_a_curve_lies_where_its_numbers_are_and_breaks_where_there_are_none() -> None:
    given = figure()
    given.add_scatter(
        x=[0, 5, 10, 2, 4], y=[0, 0.5, None, 1, 0.25], mode="lines",
        line={"color": "#123456", "width": 2, "dash": "dot"},
        hovertemplate="at %{x:,}: %{y:.2f}<br>%{customdata}<extra></extra>", customdata=["a", "b", "c", "d<", "e"],
    )  # fmt: skip
    (group,) = groups(given)
    lines = list(group.iter("polyline"))
    assert [points(line.get("points")) for line in lines] == [
        [(0, PLOT), (500, PLOT / 2)],
        [(200, 0), (400, 0.75 * PLOT)],
    ]
    assert {line.get("stroke") for line in lines} == {"#123456"} and all(line.get("stroke-dasharray") for line in lines)
    box = next(one for one in group.iter("svg") if one.get("class") == "curve")
    assert box.get("viewBox") == f"0 0 1000 {PLOT}"
    tips = [one.get("data-tip") for one in group.iter("circle")]
    assert tips == ["at 0: 0.00\na", "at 5: 0.50\nb", "at 2: 1.00\nd<", "at 4: 0.25\ne"]


def test_marks_lie_on_their_points_with_their_own_looks() -> None:
    given = figure()
    given.add_scatter(
        x=[2.5, 5, 11], y=[0.25, 1, 0.5], mode="markers", hovertext=["one", "two &amp; more", "outside"],
        marker={"symbol": ["circle", "line-ns", "square"], "size": [10, 0, 8], "color": "#ff0000"},
    )  # fmt: skip
    (group,) = groups(given)
    placed = [one for one in group.iter("svg") if one.get("x")]
    assert [(one.get("x"), one.get("y")) for one in placed] == [("25%", f"{0.75 * PLOT:.1f}"), ("50%", "0.0")]
    assert [len(one.findall("path")) for one in placed] == [1, 0]  # of size 0 there is none
    assert [one.get("data-tip") for one in group.iter("circle")] == ["one", "two & more"]


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_mark_is_around_its_point_and_as_large_as_asked(symbol: str) -> None:
    path = ElementTree.fromstring(mark(symbol, 20, "#00ff00", None))
    numbers = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", path.get("d") or "")]
    assert 8 <= max(map(abs, numbers)) <= 20
    hollow = symbol.endswith("-open") or symbol in ("line-ns", "line-ew", "x-thin")
    assert (path.get("fill") == "none") == hollow == (path.get("stroke") == "#00ff00")


def test_all_marks_differ() -> None:
    assert len({mark(symbol, 10, "#000000", None) for symbol in SYMBOLS}) == len(SYMBOLS)


def test_bands_steps_and_areas() -> None:
    given = figure()
    for y, fill in (([0.2, 0.2], None), ([0.6, 0.8], "tonexty")):
        given.add_scatter(x=[0, 10], y=y, mode="lines", line={"width": 0}, fill=fill, fillcolor="rgba(1,2,3,0.2)",
                          hoverinfo="skip")  # fmt: skip
    given.add_scatter(x=[0, 10], y=[0, 1], mode="lines", line={"width": 1, "shape": "hvh"}, hoverinfo="skip")
    lower, upper, steps = groups(given)
    assert not list(lower.iter("polyline")) and not list(lower.iter("polygon"))
    (area,) = upper.iter("polygon")
    assert points(area.get("points")) == [(0, 80), (1000, 40), (1000, 160), (0, 160)]
    (line,) = steps.iter("polyline")
    assert points(line.get("points")) == [(0, PLOT), (500, PLOT), (500, 0), (1000, 0)]


def test_bars_stand_on_zero_and_lying_ones_on_each_other() -> None:
    given = figures.figure("", "", HEIGHT)
    given.update_yaxes(range=[-1, 3])
    bars = {"color": ["#111111", "#222222"], "line": {"color": ["#111111", "#222222"], "width": 1}}
    errors = {"visible": True, "array": [0.5, 0], "arrayminus": [0.25, 0], "color": "#000", "width": 5, "thickness": 1}
    given.add_bar(x=["a", "b"], y=[2, -1], marker=bars, error_y=errors, hovertemplate="%{x}<extra></extra>")
    (group,) = groups(given)
    first, second = group.iter("rect")
    each = PLOT / 4
    assert (float(first.get("y") or 0), float(first.get("height") or 0)) == pytest.approx((each, 2 * each), abs=0.06)
    assert (float(second.get("y") or 0), float(second.get("height") or 0)) == pytest.approx((3 * each, each), abs=0.06)
    assert (first.get("x"), first.get("width"), second.get("x")) == ("5%", "40%", "55%")
    (path,) = group.iter("path")
    assert (path.get("d") or "").startswith(f"M0 {0.5 * each:.1f}V{1.25 * each:.1f}")
    lying = figure((0, 4), (1.5, -0.5))
    for long in ((1, 2), (2, 1), (1, 1)):
        lying.add_bar(x=long, y=[0, 1], orientation="h", marker={"color": "#333333"}, hovertext=["u", "v"], name="what")
    lying.update_layout(showlegend=True, bargap=0.5)
    found = [[(r.get("x"), r.get("width"), r.get("height")) for r in group.iter("rect")] for group in groups(lying)]
    thick = f"{PLOT / 4:.1f}"
    assert found == [
        [("0%", "25%", thick), ("0%", "50%", thick)],
        [("25%", "50%", thick), ("50%", "25%", thick)],
        [("75%", "25%", thick), ("75%", "25%", thick)],
    ]
    assert ["".join(item.itertext()).strip() for item in drawn(lying).iter("li")] == ["what"] * 3


def test_a_heat_map_is_darkest_where_it_is_lowest() -> None:
    given = figures.figure("layer", "", HEIGHT)
    given.add_heatmap(
        x=[0, 1], y=["low", "high"], z=[[1, None], [2, 3]], customdata=[["1", "-"], ["2", "3"]],
        hovertemplate="%{y}, layer %{x}: %{customdata}<extra></extra>",
        colorbar={"tickvals": [1, 3], "ticktext": ["1", "3"]},
    )  # fmt: skip
    given.update_yaxes(type="category")
    cells = [one for one in groups(given)[0].iter("rect") if one.get("data-tip")]
    assert [cell.get("data-tip") for cell in cells] == ["low, layer 0: 1", "high, layer 0: 2", "high, layer 1: 3"]
    light = [sum(int((cell.get("fill") or "")[i : i + 2], 16) for i in (1, 3, 5)) for cell in cells]
    assert light == sorted(light) and len(set(light)) == 3
    assert [cell.get("x") for cell in cells] == ["0%", "0%", "50%"]
    # The first row is the lowest.
    assert [(cell.get("y"), cell.get("height")) for cell in cells] == [("100.0", "100.0"), *[("0.0", "100.0")] * 2]


def test_notes_are_text_whatever_they_hold() -> None:
    given = figure()
    given.add_annotation(
        x=5, y=0.5, text='<span style="color:#abcdef">&lt;a href="x"&gt;</span><br><b>bold</b> <a href="y">', yshift=10
    )
    texts = [one for one in drawn(given).iter("text") if one.get("font-size")]
    (note,) = texts
    first, second = note.findall("tspan")
    assert "".join(note.itertext()) == '<a href="x">bold <a href="y">'
    assert first[0].get("fill") == "#abcdef" and second[0].get("font-weight") == "700"
    assert float(second.get("y") or 0) - float(first.get("y") or 0) == pytest.approx(1.25 * 13, abs=0.1)
    assert not list(drawn(given).iter("a"))


def test_lines_across_lie_at_their_values_on_either_kind_of_axis() -> None:
    given = figure((0, 2), (0, 1))
    given.update_xaxes(type="log")
    given.add_vline(x=10, line={"color": "#010101", "width": 1})
    given.add_vline(x=1000, line={"color": "#020202", "width": 1})  # beyond the axis
    given.add_hline(y=0.25, line={"color": "#030303", "width": 1})
    given.add_vrect(x0=1, x1=10, fillcolor="#040404", opacity=0.5)
    lines = {one.get("stroke"): one for one in drawn(given).iter("line")}
    assert lines["#010101"].get("x1") == "50%" and "#020202" not in lines
    assert float(lines["#030303"].get("y1") or 0) == pytest.approx(0.75 * PLOT)
    (band,) = (one for one in drawn(given).iter("rect") if one.get("fill") == "#040404")
    assert (band.get("x"), band.get("width")) == ("0%", "50%")


@pytest.mark.parametrize(
    ("axis", "values", "labels"),
    [
        ({"range": (0, 10), "nticks": 5}, [], ["0", "2", "4", "6", "8", "10"]),
        ({"range": (-0.3, 0.25), "nticks": 6}, [], ["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2"]),
        ({"range": (0, 2e6), "nticks": 4, "tickformat": "~s"}, [], ["0", "500k", "1M", "1.5M", "2M"]),
        ({"range": (0, 20000), "nticks": 4}, [], ["0", "5k", "10k", "15k", "20k"]),
        ({"range": (0, 6000), "tickformat": ",d", "nticks": 3}, [], ["0", "2,000", "4,000", "6,000"]),
        ({"range": (0, 4e-4), "nticks": 4}, [], ["0", "1e-4", "2e-4", "3e-4", "4e-4"]),
        ({"range": (0.5, 3.5), "dtick": 1}, [], ["1", "2", "3"]),
        ({"range": (1.5, -0.5)}, [], None),
        ({"type": "log", "range": (-5, 0), "nticks": 6}, [], ["1e-5", "1e-4", "1e-3", "0.01", "0.1", "1"]),
        ({"type": "log", "range": (-2, -1), "dtick": "D2"}, [], ["0.01", "0.02", "0.05", "0.1"]),
        ({"type": "log", "range": (-12, 0), "dtick": 1}, [], ["1e-12", "1e-10", "1e-8", "1e-6", "1e-4", "0.01", "1"]),
        ({"type": "category"}, ["a", "b", "a"], ["a", "b"]),
        ({"tickvals": [1, 2], "ticktext": ["one", "two"], "range": (0, 4)}, [], ["one", "two"]),
    ],
)  # fmt: skip
def test_ticks_are_round_and_lie_at_their_values(
    axis: dict[str, Any], values: list[Any], labels: list[str] | None
) -> None:
    scale = Scale(Node(**axis), values)
    ticks = scale.ticks()
    if labels is not None:
        assert [label for _, label in ticks] == labels
    places = [at for at, _ in ticks]
    assert places == sorted(places, reverse=scale.low > scale.high) and all(-1e-9 <= at <= 1 + 1e-9 for at in places)


def test_an_axis_without_a_range_holds_all_of_its_values() -> None:
    scale = Scale(Node(type="log"), [1e-3, 0.0, None, 10.0, math.nan])
    assert (scale.low, scale.high) == pytest.approx((-3, 1))
    assert math.isnan(scale.at(None)) and scale.at(0.1) == pytest.approx(0.5)
    alone = Scale(Node(), [2.0])
    assert alone.low < 2 < alone.high and alone.ticks()
