"""The page of a comparison: whole, self-contained, and right about whatever the study came to."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from report.parse import Parser, parse

from compare.report import canned
from sharpwise.compare.report import page, search, tables
from sharpwise.compare.report.runs import csv_text, runs_of
from sharpwise.compare.report.text import headline, together

LINKS = (page.JSON_NAME, page.CSV_NAME, "#next")
CHARTS = {f"chart-{name}" for name in ("difference", "final", "speedup", "loss", "gap", "sensitivity")}


def _parse(result: Mapping[str, Any]) -> Parser:
    parser = parse(page.render(result))
    assert len(parser.ids) == len(set(parser.ids))
    assert parser.ids.pop() == "next"  # it is the last thing on every page
    return parser


def test_a_complete_study() -> None:
    result = canned.result()
    parser = _parse(result)
    for arm in result["arms"]:
        for text in (arm["name"], arm["definition"], arm["code"], arm["sentence"][1:]):
            assert text in parser.text
        assert f"{arm['mean']:.4f}" in parser.text
    for text in (
        headline(result),
        "Each was tuned with the same number of trials: 5 runs to find its best learning rate.",
        "then trains again 3 times, with seeds that tuning did not use",
        "in nats per token: lower is better",
        "One model and one text",
        "What was not tested",
        "Other model sizes, longer contexts, other texts.",
        "h.{0..1}.attn.c_attn.weight",
        "optimizer.betas",
        "2026-01-02 03:04:05 UTC",
        "0.5, 1 and 2 times the tokens",
    ):
        assert text in parser.text
    assert set(parser.ids) == CHARTS | {"chart-rates-0", "chart-rates-1"}


def test_the_verdict_comes_first_and_the_next_command_last() -> None:
    for result in (canned.result(), canned.unfinished()):
        html, text = page.render(result), _parse(result).text
        order = (
            headline(result),
            result["next"]["reason"],
            "Verdicts",
            f"Before you believe it: {len(result['caveats'])} caveat",
            result["caveats"][0],
            "What was not tested",
            result["not_tested"][-1],
            "What was compared",
            "Difference to adamw",
            "Where it ran",
            result["next"]["command"],
        )
        places = [text.rindex(part) if part == headline(result) else text.index(part) for part in order]
        assert places == sorted(places)
        assert html.count('caution"') == 1 and all(text.count(note) == 1 for note in result["caveats"])
        assert text.count(result["next"]["command"]) == 1
        assert ("In a training loop of your own" in text) == result["complete"]


def test_what_to_train_with_is_the_best_of_the_baseline_and_what_was_better() -> None:
    result = canned.result(3)
    best = min(result["arms"], key=lambda arm: arm["mean"])
    for verdict, expected in (("better", best), ("undecided", result["arms"][0])):
        for arm in result["arms"][1:]:
            arm["verdict"] = verdict
        last = page.render(result).partition('id="next"')[2]
        assert f"the best that these runs know is {expected['name']}" in last
        code = re.findall(r"<pre.*?</pre>", last)[-1]
        assert parse(code).text == expected["code"]


def test_a_search_is_told_with_what_each_type_gained_and_every_step() -> None:
    result = canned.searched()
    parser, found = _parse(result), result["arms"][1]["search"]
    for text in (
        f"Factors found by search: {result['arms'][1]['name']}",
        "5 runs of at most 50; nothing won any more. To write, at lr 0.003:",
        f'block_lr="{found["block_lr"]}"',
        "0.165 (0.220, 0.110)",  # of Emb: two steps that were taken, at each seed
        "0.215 (0.180, 0.250)",  # of VO
        "x1 to x0.5",
        "-0.100, +0.200",
        "diverged",
    ):
        assert text in parser.text
    assert {f"chart-factor-0-{i}" for i in range(5)} <= set(parser.ids)  # nothing was tried of pos_emb
    # Heights go on from where the last step that was taken ended; what ruins a run does not set the scale.
    emb = search.points(search.steps_of(found, "lr", "Emb"))
    assert [(p.x0, p.x1) for p in emb] == [(1, 2), (1, 0.5), (2, 4), (4, 8)]
    assert [p.y0 for p in emb] == pytest.approx([0, 0, -0.15, -0.165])
    assert [y for p in emb for y in p.ys] == pytest.approx([-0.2, -0.1, 0.03, -0.17, -0.16, -0.115])
    figures = search.figure_of_types(found)
    assert len({figure.layout.yaxis.range for figure in figures.values()}) == 1
    low, high = figures["VO"].layout.yaxis.range
    assert -0.35 < low < -0.25 and 0.2 < high < 0.5
    assert [note.text for note in figures["VO"].layout.annotations] == ["↑ +1.70"]


def test_every_run_is_there_with_its_settings_and_folder() -> None:
    result = canned.result(2, weight_decay=True)
    parser = _parse(result)
    summaries = re.findall(r"<summary>(.*?)</summary>", page.render(result))
    caveats = "Before you believe it: 1 caveat, and what was not tested"
    folded = {caveats, "The arms as code", "Block map", "Every run", "The whole configuration"}
    assert len(summaries) == len(runs_of(result)) + len(folded)
    assert folded <= set(summaries)
    assert "tuning, lr 0.003, weight decay 0.3: <b>4.0800</b>" in summaries
    assert "tuning, lr 0.003, weight decay 0 (chosen): <b>4.0400</b>" in summaries
    assert "2 x tokens, seed 3: <b>3.9100</b>" in summaries
    links = [value for _, name, value in parser.attributes if name == "href"]
    assert "./runs/adamw%2Bblockwise-seed-2/config.toml" in links
    assert {page.JSON_NAME, page.CSV_NAME} <= set(links)


def test_every_learning_rate_that_was_tried_is_there_with_its_loss() -> None:
    result = canned.result(2)
    parser = _parse(result)
    assert "Final loss at every learning rate" in parser.text
    arm = result["arms"][1]  # one of its runs diverged
    table = tables.rates(result).split("rowgroup")[2]
    rows = re.findall(r'<td class="(number(?: best)?)">(.*?)</td><td.*?>(.*?)</td><td.*?>(.*?)</td></tr>', table)
    best = min(run["final_loss"] for run in arm["tuning"] if run["final_loss"] is not None)
    expected = []
    for run in sorted(arm["tuning"], key=lambda run: run["lr"]):
        loss = run["final_loss"]
        texts = ("diverged", "") if loss is None else (f"{loss:.4f}", "best" if loss == best else f"{loss - best:+.4f}")
        css = "number best" if run["setting"] == arm["setting"] else "number"
        expected.append((css, f"lr {run['lr']:g}", *texts))
    assert rows == expected
    assert ("number", "lr 0.01", "diverged", "") in rows
    assert [css for css, *_ in rows].count("number best") == 1


def test_an_extra_trial_says_how_many_every_arm_has() -> None:
    text = _parse(canned.result(2)).text
    assert "extra trial, so that every arm has 5" in text
    assert "{" not in text.partition("extra trial")[2][:40]


def test_arms_are_compared_with_their_ablations_where_there_are_any() -> None:
    assert "Do the ratios matter?" not in _parse(canned.result(3)).text
    assert "Do the ratios matter?" not in _parse(canned.result((0, 3, 4))).text
    result = canned.result(5)
    assert [pair["ablation"] for pair in result["ablations"]] == ["adamw+reversed(blockwise)", "adamw+mean(blockwise)"]
    section = _parse(result).text.partition("Do the ratios matter?")[2].partition("Difference to adamw")[0]
    for pair in result["ablations"]:
        assert pair["sentence"][1:] in section
        assert pair["ablation"] in section
    assert "No pair of final runs yet." in _parse(canned.unfinished()).text.partition("Do the ratios matter?")[2]


def test_a_verdict_does_not_repeat_the_name_beside_it() -> None:
    html = tables.verdicts(canned.result(4))
    assert html.count("</span> adam-<wbr>mini<br>") == 1
    assert "<td>Ended " in html
    assert html.count("blockwise") == 2  # each of two candidates once


def test_the_mean_learning_rate_has_a_column() -> None:
    html = tables.costs(canned.result(2))
    assert "lr x mean factor" in html
    assert '<td class="number">0.0052</td>' in html  # 0.001 x 5.2
    assert "tokens/s" not in html  # runs that share a machine do not say which is quicker


def test_seeds_are_said_to_move_arms_together_only_where_they_do() -> None:
    result = canned.result(3)
    for arm in result["arms"][1:]:
        arm["difference"] |= {"low": -1e-3, "high": 1e-3}
    assert together(result) == "A seed moves all arms alike, so that differences are surer than these means."
    assert together(result) in _parse(result).text
    result["arms"][2]["difference"] |= {"low": -1.0, "high": 1.0}
    assert together(result).startswith("A seed moves adamw+blockwise, adamw alike; differences of the other arms")
    result["arms"][1]["interval"] = [4.0, 4.0001]  # surer by itself than the difference
    assert together(result).startswith("Here a seed does not move the arms and adamw alike")
    assert together(canned.result(3, 1)) == ""


def test_memory_has_a_figure_where_the_table_does_not_tell_all() -> None:
    assert "chart-memory" not in _parse(canned.result(4)).ids  # two sizes
    assert "chart-memory" in _parse(canned.result(6)).ids
    result = canned.result((0, 1, 3))
    for i, arm in enumerate(result["arms"]):
        arm["state_bytes"] += i  # a byte is no other size
    assert "chart-memory" not in _parse(result).ids


def test_the_block_map_shows_equal_multipliers_once() -> None:
    html = tables.blocks(canned.result((0, 1, 3, 7)))
    assert html.count("lr factor") == 2
    assert "lr factor,<wbr> adamw+<wbr>blockwise,<wbr> adam-<wbr>mini+<wbr>blockwise" in html
    assert "transformer.<wbr>h.<wbr>{0..1}.<wbr>attn" in html  # breaks at dots, and not within words


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    html = page.render(canned.result())
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", html)
    links = [value or "" for _, name, value in parse(html).attributes if name in ("src", "href")]
    assert all(link.startswith("./runs/") or link in LINKS for link in links)


@pytest.mark.parametrize("seeds", [1, 2, 3])
@pytest.mark.parametrize("arms", [2, 8])
def test_few_and_many_arms_and_seeds(arms: int, seeds: int) -> None:
    result = canned.result(arms, seeds, count=7)
    html = page.render(result)
    assert len(html.encode()) < 600_000
    assert set(parse(html).ids) >= CHARTS


def test_a_study_with_long_runs_has_a_small_page() -> None:
    result = canned.result(8, count=7)
    for arm in result["arms"]:
        for run in arm["final"]:
            for key in ("train_tokens", "train_loss", "learning_rate_tokens"):
                run[key] = [value for value in run[key] for _ in range(25)]
            run["learning_rates"] = {
                role: [value for value in rates for _ in range(25)] for role, rates in run["learning_rates"].items()
            }
    assert len(page.render(result)) < 700_000


def test_an_unfinished_study_shows_what_there_is() -> None:
    result = canned.unfinished()
    parser = _parse(result)
    assert headline(result) == "Unfinished: 17 of 46 runs of this comparison with adamw are done"
    for text in (
        headline(result),
        "every number may still change",
        "not yet",
        "No pair of final runs yet.",
        "None is done yet.",
    ):
        assert text in parser.text
    assert "so far they had between 0 and 5" in parser.text
    assert set(parser.ids) == CHARTS - {"chart-speedup"} | {"chart-rates-0"}


def test_a_study_that_has_only_begun() -> None:
    result = canned.unfinished()
    nothing = {"tuning": [], "final": [], "setting": None, "mean": None, "interval": None, "difference": None}
    arms = [{**arm, **nothing, "state_bytes": None} for arm in result["arms"]]
    parser = _parse({**result, "arms": arms, "progress": {"done": 0, "expected": 46}})
    assert parser.ids == []
    assert "0 of 46 runs are done." in parser.text


def test_an_arm_that_diverged_everywhere() -> None:
    result = canned.result(4, lost={1: 3, 2: 1})
    parser = _parse(result)
    assert "3, 3 diverged" in parser.text
    assert "diverged at step 33" in parser.text
    assert "1 diverged" in headline(result)


def test_a_baseline_that_diverged_is_said_first() -> None:
    result = canned.result(3, lost={0: 3})
    assert headline(result) == "adamw, which the others were to be compared with, diverged with every seed"
    assert {"chart-difference", "chart-gap"}.isdisjoint(_parse(result).ids)


# --- hostile input ---------------------------------------------------------------------------------------------------


def test_names_are_text_and_never_markup() -> None:
    nasty = '</title></script><script>alert("x")</script><a href="https://example.org">&'
    result = json.loads(json.dumps(canned.result(3)).replace("adamw+blockwise", json.dumps(nasty)[1:-1]))
    result |= {"name": nasty, "caveats": [nasty], "not_tested": [nasty], "data": {"source": nasty, nasty: nasty}}
    result["arms"][0]["final"][0]["folder"] = "javascript:alert(1)"
    result["arms"][0]["final"][1]["folder"] = "//example.org"
    result["environment"][nasty] = nasty
    html = page.render(result)
    parser = parse(html)
    assert "<script>alert" not in html
    assert html.count("</title>") == 1
    assert nasty in parser.text
    links = [value or "" for _, name, value in parser.attributes if name in ("src", "href")]
    assert all(link.startswith("./") or link in LINKS for link in links)
    assert html.count("<a href") == len(links)


# --- files -----------------------------------------------------------------------------------------------------------


def test_three_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    result = canned.result(2)
    (tmp_path / page.PAGE_NAME).write_text("old")
    assert page.write_study_page(result, tmp_path) == tmp_path / "index.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "result.csv", "result.json"]
    assert (tmp_path / "index.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == result


def test_what_is_not_finite_is_null_in_the_json(tmp_path: Path) -> None:
    result = canned.result(2)
    result["arms"][1]["speedup"] |= {"high": math.inf}
    page.write_study_page(result, tmp_path / "new")
    stored = json.loads((tmp_path / "new" / "result.json").read_text(encoding="utf-8"))
    assert stored["arms"][1]["speedup"]["high"] is None


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / page.PAGE_NAME).write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        page.write_study_page(canned.result(2), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_csv_has_a_row_per_run() -> None:
    result = canned.result(2, weight_decay=True, lost={1: 1})
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert len(rows) == 2 * (5 + 2 + 3) + 2 * 3
    assert list(rows[0]) == [
        "arm", "setting_of", "stage", "seed", "share", "tokens", "optimizer.lr", "optimizer.weight_decay",
        "final_loss", "diverged_at_step", "chosen", "folder",
    ]  # fmt: skip
    lost = next(row for row in rows if row["arm"] == "adamw+blockwise" and row["stage"] == "final")
    assert (lost["seed"], lost["final_loss"], lost["diverged_at_step"]) == ("1", "", "31")
    assert [row["share"] for row in rows if row["stage"] == "horizon"] == ["0.5"] * 3 + ["2.0"] * 3
    chosen = [row for row in rows if row["chosen"] == "yes" and row["stage"] == "tune" and row["arm"] == "adamw"]
    assert [(row["optimizer.lr"], row["optimizer.weight_decay"]) for row in chosen] == [("0.003", "0.0")]


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("case", ["eight", "unfinished", "searched"])
def test_a_browser_shows_it_without_errors_and_a_phone_without_scrolling_sideways(case: str, tmp_path: Path) -> None:
    result = {
        "eight": canned.result(8, weight_decay=True, lost={6: 3}, count=7),
        "unfinished": canned.unfinished(),
        "searched": canned.searched(),
    }[case]
    page.write_study_page(result, tmp_path)
    (tmp_path / "phone.html").write_text(
        '<iframe src="index.html" style="width: 390px; height: 800px"></iframe><script>'
        "onload = () => setTimeout(() => { const page = document.querySelector('iframe').contentDocument;"
        "const charts = [...page.querySelectorAll('[id^=chart-]')];"
        "document.title = [page.documentElement.scrollWidth, charts.length,"
        "charts.filter(chart => chart.querySelector('svg .trace')).length].join(' '); }, 2000);</script>"
    )
    done = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=5000",
            "--dump-dom", (tmp_path / "phone.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert found is not None
    width, charts, drawn = map(int, found.groups())
    assert width <= 390
    assert charts == drawn == len(_parse(result).ids)
