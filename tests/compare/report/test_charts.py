"""The figures of a comparison's page show what the result says, at the ends of their scales too."""

import math
from typing import Any

import pytest

from compare.report import canned
from sharpwise.compare.report import curve_charts, row_charts
from sharpwise.compare.report.arms import COLOURS, looks, short_name
from sharpwise.compare.report.sensitivity import sensitivity
from sharpwise.report.plot import Figure


def _traces(figure: Figure | None) -> dict[str, Any]:
    assert figure is not None
    return {trace.name: trace for trace in figure.data}


def _texts(figure: Figure | None) -> str:
    assert figure is not None
    return "\n".join(note.text for note in figure.layout.annotations)


def test_every_arm_has_a_colour_and_a_symbol_of_its_own() -> None:
    found = looks(canned.result(8))
    assert len({look.colour for look in found.values()}) == len({look.symbol for look in found.values()}) == 8
    assert len({look.glyph for look in found.values()}) == 8
    many = canned.result(8)
    many["arms"] += [{**arm, "name": f"{arm['name']} 2"} for arm in many["arms"]]
    assert len(set(looks(many).values())) == 16
    last = {**canned.result(3), "baseline": "adam-mini"}
    assert looks(last)["adam-mini"].colour == COLOURS[0]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_stand_out_from_white(colour: str) -> None:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 3  # of the WCAG, for graphics


def test_long_names_are_broken_and_cut() -> None:
    lines = short_name("a" * 100).split("<br>")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 13
    assert lines[-1].endswith("…")
    assert short_name("<b>") == "&lt;b&gt;"


# --- rows ------------------------------------------------------------------------------------------------------------


def test_final_losses_show_seeds_mean_interval_and_the_baseline() -> None:
    result = canned.result(3, lost={2: 1})
    figure = row_charts.final_losses(result)
    traces, base = _traces(figure), result["arms"][0]
    assert traces["adamw, mean"].x == (base["mean"],)
    assert traces["adamw, mean, interval"].x == tuple(base["interval"])
    assert traces["adamw, seeds"].x == tuple(run["final_loss"] for run in base["final"])
    assert len(traces["adam-mini, seeds"].x) == 2
    assert "1 of 3 diverged" in _texts(figure)
    assert figure is not None
    assert any(shape.x0 == shape.x1 == base["mean"] for shape in figure.layout.shapes)


def test_differences_are_paired_and_the_margin_is_a_band() -> None:
    result = canned.result(3)
    figure = row_charts.differences(result)
    traces = _traces(figure)
    mine, base = result["arms"][1], result["arms"][0]
    deltas = [a["final_loss"] - b["final_loss"] for a, b in zip(mine["final"], base["final"], strict=True)]
    assert traces["adamw+blockwise, seeds"].x == pytest.approx(deltas)
    difference = mine["difference"]
    assert traces["adamw+blockwise, mean difference, interval"].x == (difference["low"], difference["high"])
    assert figure is not None
    assert [(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect"] == [(-0.02, 0.02)]
    assert "<b>better</b>" in _texts(figure)


def test_an_interval_far_wider_than_the_points_ends_in_arrows() -> None:
    result = canned.result((0, 1), 2)
    result["arms"][1]["difference"] |= {"low": -5.0, "high": 4.8}
    figure = row_charts.differences(result)
    trace = _traces(figure)["adamw+blockwise, mean difference, interval"]
    assert figure is not None
    low, high = figure.layout.xaxis.range
    assert trace.x == (low, high)
    assert -1 < low < high < 1
    assert trace.marker.symbol == ("triangle-left", "triangle-right")
    assert "-5.0000 to +4.8000" in trace.hovertext


def test_speedups_beyond_what_was_measured_are_arrows() -> None:
    result = canned.result(4)
    result["arms"][1]["speedup"] = {"value": None, "low": 1.8, "high": None, "bound": ">2"}
    result["arms"][2]["speedup"] = {"value": None, "low": 0.0, "high": 0.6, "bound": "<0.5"}
    figure = row_charts.speedups(result)
    traces = _traces(figure)
    assert traces["adamw+blockwise, bound"].x == (2.0,)
    assert traces["adamw+blockwise, bound"].marker.symbol == "triangle-right"
    assert traces["adamw+blockwise, interval"].marker.symbol == ("line-ns", "triangle-right")
    assert traces["adam-mini, bound"].marker.symbol == "triangle-left"
    assert "1.80 to open" in traces["adamw+blockwise, interval"].hovertext
    assert "&gt;2" in _texts(figure)
    assert figure is not None
    low, high = figure.layout.xaxis.range
    assert low < math.log10(0.5) < math.log10(2) < high


@pytest.mark.parametrize("speedup", [None, {"value": None, "low": None, "high": None, "bound": ""}])
def test_without_speedups_there_is_no_figure(speedup: Any) -> None:
    result = canned.result(3)
    for arm in result["arms"]:
        arm["speedup"] = speedup
    assert row_charts.speedups(result) is None


# --- curves ----------------------------------------------------------------------------------------------------------


def test_loss_curves_are_thin_by_seed_and_thick_in_the_mean() -> None:
    result = canned.result(3, lost={2: 1})
    figure = curve_charts.loss_curves(result)
    assert figure is not None
    widths = {trace.name: trace.line.width for trace in figure.data}
    assert widths == {
        **dict.fromkeys(("adamw", "adamw+blockwise", "adam-mini"), 2.5),
        **dict.fromkeys(("adamw, one seed", "adamw+blockwise, one seed", "adam-mini, one seed"), 1),
    }
    assert len(figure.data) == 3 + 3 * 3
    traces = _traces(figure)
    assert len(traces["adamw"].x) == 80
    first = [trace.y[-1] for trace in figure.data if trace.name == "adamw, one seed"]
    assert traces["adamw"].y[-1] == pytest.approx(sum(first) / 3, abs=1e-3)
    # The seed that diverged does not count in the mean.
    assert traces["adam-mini"].x == traces["adamw"].x


def test_gaps_end_at_the_difference() -> None:
    result = canned.result(3)
    traces = _traces(curve_charts.gaps(result))
    assert traces["adamw+blockwise"].x[-1] == canned.TOKENS
    assert traces["adamw+blockwise"].y[-1] == pytest.approx(result["arms"][1]["difference"]["mean"], abs=1e-4)
    assert "adamw" not in traces


def test_memory_is_in_mebibytes() -> None:
    result = canned.result(8, lost={2: 3})
    traces = _traces(curve_charts.memory(result))
    assert traces["adamw"].x == (result["arms"][0]["state_bytes"] / 2**20,)
    assert "adam-mini" not in traces  # no mean to show


def test_learning_rates_are_drawn_where_blocks_differ() -> None:
    drawn = curve_charts.learning_rates(canned.result(8))
    same = ("adamw+blockwise", "adam-mini+blockwise")
    assert list(drawn) == [same, ("adamw+reversed(blockwise)",)]
    assert [trace.name for trace in drawn[same].data] == ["Emb", "QK", "FFN", "VO", "Norm"]
    ranges = {figure.layout.yaxis.range for figure in drawn.values()}
    assert len(ranges) == 1


def test_block_types_have_no_colours_of_arms() -> None:
    for figure in curve_charts.learning_rates(canned.result(8)).values():
        assert {trace.line.color for trace in figure.data}.isdisjoint(COLOURS)
        assert len({trace.line.dash for trace in figure.data}) == len(figure.data)
        assert len({note.text.lower() for note in figure.layout.annotations}) == len(figure.data)


def test_another_learning_rate_is_another_figure() -> None:
    result = canned.result((0, 1, 7))
    assert len(curve_charts.learning_rates(result)) == 1
    for run in result["arms"][2]["final"]:
        run["learning_rates"] = {role: [2 * lr for lr in lrs] for role, lrs in run["learning_rates"].items()}
    assert len(curve_charts.learning_rates(result)) == 2


def test_factors_far_apart_are_drawn_to_a_logarithmic_scale() -> None:
    result = canned.result(4)
    for run in result["arms"][1]["final"]:
        run["learning_rates"]["norm"] = [value / 100 for value in run["learning_rates"]["norm"]]
    drawn = curve_charts.learning_rates(result)
    assert {figure.layout.yaxis.type for figure in drawn.values()} == {"log"}
    assert len({figure.layout.yaxis.range for figure in drawn.values()}) == 1


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_the_chosen_setting_is_filled_and_diverged_runs_are_on_top() -> None:
    result = canned.result(2)
    figure = sensitivity(result)
    traces = _traces(figure)
    colour = looks(result)["adamw+blockwise"].colour
    assert traces["adamw+blockwise"].marker.color == ("#ffffff", "#ffffff", colour)
    assert traces["adamw+blockwise, diverged"].x == (0.00316, 0.01)
    assert figure is not None
    assert set(traces["adamw+blockwise, diverged"].y) == {figure.layout.yaxis.range[1]}
    assert "✕ diverged" in _texts(figure)


def test_further_settings_are_joined_apart() -> None:
    traces = _traces(sensitivity(canned.result(2, weight_decay=True)))
    assert traces["adamw"].line.dash == "solid"
    assert traces["adamw, weight decay 0"].x == (3e-3,)
    assert traces["adamw, weight decay 0"].line.dash == "dot"
    assert "lr 0.003, weight decay 0: 4.0400, chosen" in traces["adamw, weight decay 0"].hovertext[0]


def test_many_decades_and_losses_off_the_scale() -> None:
    result = canned.result(8, count=7)
    figure = sensitivity(result)
    assert figure is not None
    low, high = figure.layout.xaxis.range
    assert high - low > 4
    assert 3 <= len(figure.layout.xaxis.tickvals) <= 6
    assert "largest tried" in _texts(figure)  # lion
    assert "uppermost symbols" not in _texts(figure)
    cap = max(max(trace.y) for trace in figure.data if "diverged" not in trace.name)
    beyond = [run["final_loss"] for arm in result["arms"] for run in arm["tuning"] if (run["final_loss"] or 0) > cap]
    assert beyond
    assert all(f"↑ {loss:.2f}" in _texts(figure) for loss in beyond)
    assert _texts(figure).count("↑") == len(beyond)
    bottom, top = figure.layout.yaxis.range
    assert all(bottom <= y <= top for trace in figure.data for y in trace.y)


def test_all_tuning_runs_may_have_diverged() -> None:
    result = canned.result(2)
    for arm in result["arms"]:
        arm["tuning"] = [{**run, "final_loss": None, "stopped_at": 5} for run in arm["tuning"]]
    assert set(_traces(sensitivity(result))) == {"adamw, diverged", "adamw+blockwise, diverged"}
