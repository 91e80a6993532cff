"""The page of a run: whole, self-contained, and right about whatever the run came to."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report.canned import BLOCKWISE, write_run
from report.parse import parse
from sharpwise.report import run_charts, run_text
from sharpwise.report.plot import Figure
from sharpwise.report.run import RunData, read_run
from sharpwise.report.run_blocks import factors, updates_by_type
from sharpwise.report.run_page import render, write_run_page

CHARTS = {f"chart-{name}" for name in ("loss", "rates", "gradient", "updates", "throughput", "memory")}


def _run(folder: Path, **more: Any) -> RunData:
    return read_run(write_run(folder / "run", **more))


def _traces(figure: Figure | None) -> dict[str, Any]:
    assert figure is not None
    return {trace.name: trace for trace in figure.data}


def test_a_finished_run(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=60, resumed_at=31, skipped=(7,))
    parser = parse(render(run))
    loss = run.validation_loss[-1]
    headline = f"gpt2-0.4m on stdlib: validation loss {loss:.3f}, perplexity {math.exp(loss):.1f} after 60 steps"
    for text in (
        headline,
        "finished All 60 steps are done.",
        "trained by adamw + blockwise at learning rate 0.003 on 122,880 tokens",
        "One run, one seed (3)",
        "1 step was skipped, not being finite: 7.",
        "sharpwise.AdamW(model, lr=0.003, betas=(0.9, 0.95), block_lr='blockwise')",
        "Resumed once.",
        "2026-01-03 08:00:00 UTC",
        "h.{0..1}.attn.c_attn.weight",
        "= lm_head.weight",
        "def main():",
        'kind = "cosine"',
    ):
        assert text in parser.text
    assert set(parser.ids) == CHARTS
    assert len(parser.ids) == len(CHARTS)
    assert "data: train tokens" in parser.text


@pytest.mark.parametrize(
    ("settings", "headline", "status"),
    [
        (
            {"diverged_at": 13},
            "diverged at step 13 of 60",
            "diverged The loss is not finite (nan).",
        ),
        ({"until": 30}, "step 30 of 60, validation loss", "Ended without a word after step 30"),
        ({"until": 31}, "perplexity", "Ended without a word after step 31"),
        (
            {"until": 30, "status": {"state": "interrupted", "step": 30, "message": "Go on with --resume."}},
            "step 30 of 60, validation loss",
            "interrupted Go on with --resume.",
        ),
        ({"until": 1}, "step 1 of 60, training loss", "after step 1"),
    ],
)
def test_a_run_that_did_not_finish(settings: dict[str, Any], headline: str, status: str, tmp_path: Path) -> None:
    run = _run(tmp_path, steps=60, **settings)
    parser = parse(render(run))
    assert headline in run_text.headline(run)
    assert run_text.headline(run) in parser.text
    assert status in parser.text
    assert "The schedule has not ended" in parser.text


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    (folder / "metrics.jsonl").write_text("")
    (folder / "timing.jsonl").unlink()
    (folder / "status.json").write_text('{"state": "failed", "step": 0, "message": "No memory."}')
    parser = parse(render(read_run(folder)))
    assert "ended before its first step" in parser.text
    assert "failed No memory." in parser.text
    assert parser.ids == []


def test_a_run_of_three_steps(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=3)
    assert set(parse(render(run)).ids) == CHARTS
    assert _traces(run_charts.loss(run))["training loss"].x == (1, 2, 3)


def test_a_run_with_nothing_optional(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5)
    for path in folder.iterdir():
        if path.name != "config.toml":
            path.unlink()
    (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 3.0, "lr": 0.1, "grad_norm": null}\n' * 2)
    parser = parse(render(read_run(folder)))
    assert set(parser.ids) == {"chart-loss", "chart-rates"}


@pytest.mark.parametrize("tokens", [19, 21])
def test_short_runs_are_called_short(tokens: int, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=10)
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps({**facts, "parameters": 10 * 2048 // tokens}))
    notes = " ".join(run_text.caveats(read_run(folder)))
    assert ("A short run: 19 tokens per parameter" in notes) == (tokens < 20)
    assert "One run, one seed" in notes


def test_what_an_unfinished_run_has_seen_counts(tmp_path: Path) -> None:
    notes = run_text.caveats(_run(tmp_path, steps=2000, until=200))
    assert notes[0].startswith(
        "A short run: 2.4 tokens per parameter so far and 24 when it is done, where 20 are usual."
    )


def test_a_run_that_learned_nothing_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=1)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tokens": 9, "loss": 7.0, "lr": 1.0, "validation_loss": 6.95}\n')
    assert any("learned nothing" in note for note in run_text.caveats(read_run(folder)))


# --- hostile input ---------------------------------------------------------------------------------------------------


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    nasty = '</title></script><script>alert("x")</script><a href="https://example.org">&'
    folder = write_run(
        tmp_path / "run", steps=5, model=nasty, data=nasty, status={"state": "failed", "step": 5, "message": nasty}
    )
    (folder / "sample.txt").write_text(nasty)
    facts = json.loads((folder / "facts.json").read_text())
    facts |= {"optimizer": nasty, "data": {nasty: nasty}}
    (folder / "facts.json").write_text(json.dumps(facts))
    (folder / "environment.json").write_text(json.dumps([{"step": 1, nasty: nasty}, {"step": 2, nasty: "b"}]))
    with (folder / "metrics.jsonl").open("a") as file:
        record = {"step": 6, "tokens": 1, "loss": 1.0, "lr": 1.0, "multipliers": {nasty: 2.0, f"{nasty}2": 3.0}}
        record["update_relative"] = {nasty: 1.0}
        file.write(json.dumps(record) + "\n")
    html = render(read_run(folder))
    parser = parse(html)
    assert "<script>alert" not in html
    assert html.count("</title>") == 1
    assert [value for _, name, value in parser.attributes if name == "href"] == ["metrics.jsonl", "timing.jsonl"]
    labels = [note.text for note in run_charts.learning_rates(read_run(folder)).layout.annotations]  # type: ignore[union-attr]
    assert any("&lt;a href=" in label for label in labels)
    assert not any("<a" in label for label in labels)


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = render(_run(tmp_path, steps=20))
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", html)
    links = [value for _, name, value in parse(html).attributes if name in ("src", "href")]
    assert links == ["metrics.jsonl", "timing.jsonl"]


def test_it_is_written_beside_the_numbers_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    before = {path.name for path in folder.iterdir()}
    assert write_run_page(str(folder)) == folder / "index.html"
    assert {path.name for path in folder.iterdir()} == before | {"index.html"}
    assert (folder / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# --- charts ----------------------------------------------------------------------------------------------------------


def test_the_page_of_a_long_run_is_small(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=20_000, layers=12, block_lr="layer_decay", skipped=(5_000,))
    run.loss[12_344] = 8.5
    html = render(run)
    assert len(html) < 500_000
    raw = _traces(run_charts.loss(run))["every step"]
    assert len(raw.x) <= 2000
    assert (12_345, 8.5) in set(zip(raw.x, raw.y, strict=True))


def test_learning_rates_are_the_scheduled_one_times_the_multiplier(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=60)
    traces = _traces(run_charts.learning_rates(run))
    assert list(traces) == ["Emb", "QK", "FFN", "VO", "Norm"]
    assert traces["QK"].y == pytest.approx(run.lr * BLOCKWISE["q"], rel=1e-4)
    same = _traces(run_charts.learning_rates(_run(tmp_path, steps=60, block_lr="")))
    assert list(same) == ["all blocks"]


def test_layers_that_differ_are_a_band(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=60, layers=3, block_lr="layer_decay")
    traces = _traces(run_charts.learning_rates(run))
    band = "FFN, norm, QK, VO"
    assert list(traces) == [
        "final norm", *(f"{band}, {name}" for name in ("smallest", "largest", "layer 0", "layer 1", "layer 2")), "Emb",
    ]  # fmt: skip
    assert traces[f"{band}, layer 1"].y == pytest.approx(run.lr * 0.75**2, rel=1e-4)
    assert run.blocks is not None
    by_name = {s.name: factor["now"] for s, factor in zip(run.blocks, factors(run), strict=True)}
    assert by_name["h.2.mlp.c_fc.weight"] == 0.75
    assert by_name["ln_f.weight"] == 1.0
    assert "0.422 to 0.75" in parse(render(run)).text


def test_the_block_map_says_how_each_parameter_is_moved(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    facts = json.loads((folder / "facts.json").read_text())
    table = render(read_run(folder)).partition("<h2>Block map</h2>")[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    head = "parameter role type rows size rule cut decay storage moved by state, bytes lr factor peak lr"
    assert " ".join(re.sub("<.*?>", "", cell) for cell in rows[0]) == head
    up = next(row for row in rows if row[1:2] == ["up"])
    assert up[4:] == ["32,768", "adamw", "element", "0.1", "fp32", "cpp", "262,144", "6", "0.018"]  # two layers
    assert (rows[-1][0], rows[-1][4], rows[-1][10]) == ("all", f"{facts['parameters']:,}", f"{facts['state_bytes']:,}")
    facts["explained"]["rows"][0][-2:] = ["reference", "cpp: <no>"]
    (folder / "facts.json").write_text(json.dumps(facts))
    assert "reference (cpp: &lt;no&gt;)" in render(read_run(folder))
    for odd in ([], {"columns": 1, "rows": []}, {"columns": ["name"], "rows": [1, [2, 3]]}):
        (folder / "facts.json").write_text(json.dumps({**facts, "explained": odd}))
        assert "moved by" not in render(read_run(folder))


def test_multipliers_change_where_they_were_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    lines = [{"step": i, "tokens": i, "loss": 3.0, "lr": 1.0} for i in range(1, 7)]
    lines[1] |= {"multipliers": {"q": 2.0, "k": [1.0, 3.0]}}
    lines[4] |= {"multipliers": {"q": 5.0, "k": 4.0}}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    traces = _traces(run_charts.learning_rates(read_run(folder)))
    assert traces["q"].y == (2, 2, 2, 2, 5, 5)
    assert traces["k, layer 0"].y == (1, 1, 1, 1, 4, 4)
    assert traces["k, layer 1"].y == (3, 3, 3, 3, 4, 4)


def test_updates_of_a_type_are_those_of_its_roles_together(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=3)
    # Of 16,384 elements of up and of down: norms 3 and 4 of the updates, 30 and 40 of the weights.
    count = 2 * 64 * 256
    record = {
        "update_rms": {"up": 3 / count**0.5, "down": 4 / count**0.5},
        "update_relative": {"up": 3 / 30, "down": 4 / 20},
    }
    assert updates_by_type(run, record) == {"FFN": pytest.approx(5 / math.hypot(30, 20))}
    assert updates_by_type(run, {"update_relative": record["update_relative"]}) == {"FFN": pytest.approx(0.15)}


def test_skipped_steps_and_the_threshold_are_marked(tmp_path: Path) -> None:
    figure = run_charts.gradient_norm(_run(tmp_path, steps=60, skipped=(7, 9)))
    assert _traces(figure)["skipped"].x == (7, 9)
    assert figure is not None
    assert [shape.y0 for shape in figure.layout.shapes] == [1.0]
    assert any("clipped" in note.text for note in figure.layout.annotations)


def test_resumes_and_the_end_of_a_diverged_run_are_marked(tmp_path: Path) -> None:
    figure = run_charts.loss(_run(tmp_path, steps=60, diverged_at=40, resumed_at=21))
    assert figure is not None
    assert [shape.x0 for shape in figure.layout.shapes] == [21, 40]
    low, high = figure.layout.yaxis.range
    assert np.isfinite([low, high]).all()


def test_throughput_counts_whole_steps(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=10)
    traces = _traces(run_charts.throughput(run))
    assert traces["tokens/s"].y == pytest.approx(2048 / run.seconds, rel=1e-3)
    assert _traces(run_charts.memory(run))["MiB"].y[-1] == 760


def test_one_rate_for_all_stands_in_the_block_map_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=3)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [{key: value for key, value in line.items() if key != "multipliers"} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(own) + "\n" for own in kept))
    table = render(read_run(folder)).partition("<h2>Block map</h2>")[2].partition("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]
    assert [re.sub("<.*?>", "", cell) for cell in rows[0]][-2:] == ["state, bytes", "peak lr"]
    assert {row[-1] for row in rows[1:-1]} == {"0.003"}
