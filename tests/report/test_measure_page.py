"""Pictures of measurements, and the page around them: whole, self-contained, and of what there is."""

import math
import shlex

import numpy as np
import pytest

import sharpwise
from report.parse import parse
from sharpwise.block_lr.spelling import make_block_lr
from sharpwise.probes.estimate import Cost, Estimate, Measurement
from sharpwise.report import measure
from sharpwise.report.measure_page import measure_page, write_measure_page
from sharpwise.report.measure_text import Study, advice

SHARPNESS = {"Emb": 1e-6, "QK": 2e-5, "FFN": 1e-4, "VO": 3e-4, "Norm": 2e-2}


def sharpness(step=None, scale=1.0, quantity="sharpness"):
    estimates = [Estimate(quantity, "model", "model", 1e-4, 1e-5, samples=8, unit="per token")]
    for of, value in SHARPNESS.items():
        given = {"samples": 8, "unit": "per token", "elements": 10}
        estimates.append(Estimate(quantity, "type", of, scale * value, 0.5 * value, **given))
        estimates += [Estimate(quantity, "layer", of, value * (i + 1), 0.0, layer=i, **given) for i in range(3)]
    for role in ("q", "k", "v"):
        estimates += [Estimate(quantity, "layer", role, 1e-5 * (i + 1), layer=i) for i in range(3)]
    settings = {"labels": "sampled", "rtol": None, "batches": [1, 2]}
    return Measurement(
        "sharpness", estimates, settings=settings, cost=Cost(12.5, 16), step=step, warnings=["h.0 <b>: never seen"]
    )


def spectrum():
    estimates = []
    for layer in range(2):
        for role, alpha in (("q", 2.0), ("up", 3.0)):
            notes = {"role": role, "type": "QK" if role == "q" else "FFN"}
            for quantity, value in (("alpha", alpha + layer / 10), ("alpha of a random matrix", alpha + 0.1)):
                name = f"h.{layer}.{role}.weight"
                estimates.append(Estimate(quantity, "segment", name, value, 0.0, "exact", layer, notes=notes))
    arrays = {f"h.{i}.q.weight": np.random.default_rng(i).pareto(2, 100).tolist() for i in range(8)}
    warnings = [f"h.{i}.k.weight: no alpha" for i in range(9)]
    return Measurement("spectrum", estimates, warnings=warnings, arrays=arrays)


def test_bars_by_type():
    figure = measure.by_type(sharpness())
    bars = figure.data[0]
    assert list(bars.x) == ["Emb", "QK", "FFN", "VO", "Norm"]
    assert list(bars.y) == pytest.approx(list(SHARPNESS.values()))
    assert list(bars.error_y.array) == pytest.approx([v / 2 for v in SHARPNESS.values()])
    assert list(bars.error_y.arrayminus) == pytest.approx([v / 2 for v in SHARPNESS.values()])
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.title.text == "per token (log scale)"
    assert len(set(bars.marker.line.color)) == 5
    linear = measure.by_type(sharpness(), log=False)
    assert linear.layout.yaxis.type != "log"
    assert linear.layout.yaxis.range[0] == 0.0


def test_an_error_bar_on_a_logarithmic_scale_ends_at_its_foot():
    wide = Measurement("x", [Estimate("x", "type", of, value, 10.0) for of, value in (("QK", 1.0), ("VO", 50.0))])
    bars = measure.by_type(wide).data[0]
    assert list(bars.error_y.arrayminus) == pytest.approx([1 - 1 / 3, 10], rel=1e-4)
    negative = Measurement("x", [Estimate("x", "type", "QK", -1.0), Estimate("x", "type", "VO", 2.0)])
    assert list(measure.by_type(negative).data[0].y) == [-1, 2]
    assert list(measure.by_type(negative, log=True).data[0].y) == [2]


def test_heat_map_by_layer():
    heat = measure.by_layer(sharpness()).data[0]
    assert list(heat.y) == ["v", "k", "q"]  # from below: roles, where the measurement has them
    assert list(heat.x) == [0, 1, 2]
    assert np.array(heat.z).tolist() == [pytest.approx([1e-5, 2e-5, 3e-5])] * 3
    types = [e for e in sharpness() if e.of in SHARPNESS]
    heat = measure.by_layer(Measurement("sharpness", types)).data[0]
    assert list(heat.y) == ["Norm", "VO", "FFN", "QK", "Emb"]
    assert np.array(heat.z)[2] == pytest.approx(np.log10([1e-4, 2e-4, 3e-4]))


def test_heat_map_of_segments():
    """Experts of one layer share a cell; what has no value leaves it empty."""
    notes = {"role": "up"}
    found = [Estimate("stable rank", "segment", f"w[{i}]", v, layer=0, notes=notes) for i, v in enumerate((1.0, 3.0))]
    found.append(Estimate("stable rank", "segment", "q", 2.0, layer=1, notes={"role": "q"}))
    heat = measure.by_layer(Measurement("spectrum", found)).data[0]
    assert list(heat.y) == ["up", "q"]
    assert [list(row) for row in heat.z] == [[2.0, None], [None, 2.0]]
    assert heat.customdata[0][0] == "2, the mean of 2"


def test_over_training():
    figure = measure.over_training([sharpness(20, 2.0), sharpness(10)])
    lines = {trace.name: trace for trace in figure.data if trace.name}
    assert list(lines) == list(SHARPNESS)
    assert list(lines["VO"].x) == [10, 20]
    assert list(lines["VO"].y) == pytest.approx([3e-4, 6e-4])
    assert len([trace for trace in figure.data if trace.fill == "toself"]) == 5
    assert {a.text for a in figure.layout.annotations} == set(SHARPNESS)
    with pytest.raises(ValueError, match=r"measurement\.at\(step\)"):
        measure.over_training([sharpness()])
    with pytest.raises(ValueError, match="need their steps"):
        measure.over_training([])


def test_tail_exponents():
    figure = measure.alpha_by_layer(spectrum())
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines) == ["q", "q, random", "up", "up, random"]
    assert list(lines["q"].y) == [2, 2.1]
    assert list(lines["up, random"].y) == [3.1, 3.1]
    assert lines["up, random"].mode == "markers"
    assert lines["up"].line.dash != lines["q"].line.dash


def test_densities():
    draw = np.random.default_rng(0)
    values = draw.lognormal(0, 1, 1000)
    figure = measure.density({"W": values.tolist(), "V": (values * 3).tolist()})
    x, y = (np.array(v, dtype=float) for v in (figure.data[0].x, figure.data[0].y))
    assert len(figure.data) == 2
    assert float((y * np.diff(np.log10(x)).mean()).sum()) == pytest.approx(1, abs=0.01)
    weighted = measure.density({"H": [-1.0, 0.0, 2.0]}, {"H": [1, 2, 1]}, log=False, bins=3)
    width = 1.0
    assert list(weighted.data[0].y) == pytest.approx([0.25 / width, 0.5 / width, 0.25 / width])
    for empty in ({}, {"W": []}, {"W": [0.0, math.nan]}):
        with pytest.raises(ValueError, match="no eigenvalues to draw"):
            measure.density(empty)


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="no alpha by type; there is sharpness"):
        measure.by_type(sharpness(), "alpha")
    with pytest.raises(ValueError, match="nothing by type"):
        measure.by_type(spectrum())
    both = Measurement("x", [*sharpness(), *sharpness(quantity="trace")])
    with pytest.raises(ValueError, match="no single quantity by type; there is sharpness, trace"):
        measure.by_type(both)
    outside = Measurement("x", [Estimate("x", "segment", "wte", 1.0, notes={"role": "tok_emb"})])
    with pytest.raises(ValueError, match="no x in layers to draw"):
        measure.by_layer(outside)


def test_the_page(tmp_path):
    found = [sharpness(10), spectrum(), sharpness(20, 2.0)]
    html = measure_page(found, "a <model>")
    parser = parse(html)
    for text in (
        "a <model>: sharpness Emb < QK < FFN < VO < Norm",
        "Sharpness at 2 steps, the last 20, spectrum.",
        "sharpness: h.0 <b>: never seen",
        "Before you believe it: 10 warnings",
        "spectrum: h.8.k.weight: no alpha",
        "Sharpness over training",
        "Tail exponent by layer",
        "Eigenvalues, 6 of 8 matrices",
        "0.0006 ± 0.00015",
        "sharpness (per token, n = 8)",
        "Spectrum of 4 segments",
        "labels",
        "25 s, 32 gradients' worth of passes",
    ):
        assert text in parser.text
    charts = {"0-type-sharpness", "0-training-sharpness", "0-layers-sharpness", "1-layers-alpha", "1-density"}
    assert {f"chart-{name}" for name in charts} == set(parser.ids)
    rest = html
    assert not [value for _, name, value in parser.attributes if name in ("src", "href")]
    assert "<b>" not in rest.replace("&lt;b&gt;", "")
    path = write_measure_page(tmp_path / "measure.html", sharpness())
    assert "Sharpness." in parse(path.read_text(encoding="utf-8")).text
    with pytest.raises(ValueError, match="no measurements"):
        measure_page([])


def of_types(step=None, error=0.1, **values):
    found = [Estimate("sharpness", "type", of, value, error * value) for of, value in values.items()]
    return Measurement("sharpness", found, step=step)


def test_the_page_opens_with_the_order_how_sure_it_is_and_what_to_do_with_it():
    first = of_types(10, Emb=2.0, QK=1.0, FFN=100.0, VO=110.0, Norm=1000.0)
    last = of_types(20, Emb=1.0, QK=4.0, FFN=100.0, VO=110.0, Norm=1000.0)
    study = Study("gpt2-1m", "my data", "lion")
    text = parse(measure_page([last, first], "run-1", study)).text
    order = (
        "run-1: sharpness Emb < QK < FFN \u2248 VO < Norm",
        "QK is 4 times Emb (3.3 to 4.9)",
        "VO is 1.1 times FFN (0.9 to 1.3)",
        "Open, as their intervals overlap: FFN and VO. The order was the same at 1 of 2 steps.",
        "3 of 4 relations hold; open: VO is 1.1 times FFN",
        "What to do with it",
        "block_lr=sharpwise.BlockwiseLR(emb=10, qk=10, ffn=4, vo=3.8)",
        "sharpwise compare lion 'lion+blockwise(qk=10, ffn=4, vo=3.8)' --model gpt2-1m --data 'my data' --budget 1x",
        "Sharpness by type",
    )
    places = [text.find(part) for part in order]
    assert -1 not in places and places == sorted(places)


def test_what_is_suggested_can_be_given():
    """The spelling is that of an arm, and means the factors that the code beside it has."""
    found = advice([of_types(Emb=1.0, QK=4.0, FFN=100.0, VO=110.0, Norm=1000.0)], Study("gpt2-0.4m", "d", "lion", "m"))
    words = shlex.split(found.command)
    assert words[4:] == ["--set", "model.init_from=m", "--data", "d", "--budget", "1x"]
    factors = make_block_lr(words[3].partition("+")[2])
    assert factors == eval(found.code.removeprefix("block_lr="), {"sharpwise": sharpwise})
    assert (factors.emb, factors.ffn) == (10.0, 4.0)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (
            of_types(FFN=1.0, VO=2.0),
            "No learning rates per block follow: ratios are relative to the sharpness of norms",
        ),
        (of_types(FFN=2.0, VO=3.0, Norm=1.0), "Norm is not sharper than any other type"),
        (spectrum(), "sharpwise measure sharpness RUN"),
    ],
    ids=["no norms", "norms are flat", "no sharpness"],
)
def test_where_nothing_follows_the_page_says_so(measured, said):
    text = parse(measure_page(measured)).text
    assert said in text and "block_lr=sharpwise" not in text


def test_pages_of_little():
    """One estimate, values that are not finite, a bound: nothing to draw is no reason to fail."""
    only = Measurement("top", [Estimate("top eigenvalue", "model", "model", 3.0, 0.25, "residual")])
    assert "3 ± 0.25 (bound)" in parse(measure_page(only)).text
    nothing = Measurement("noise", [Estimate("x", "type", of, math.inf) for of in ("QK", "VO")])
    assert "inf" in parse(measure_page(nothing)).text
    zero = Measurement("x", [Estimate("x", "type", of, 0.0, layer=i) for i, of in enumerate(("QK", "VO"))])
    assert "chart-0-type-x" in parse(measure_page(zero)).ids
    assert parse(measure_page(Measurement("empty", [])))
