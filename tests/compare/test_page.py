"""The page: whole, well-formed, self-contained, and the same whether runs ended or diverged."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from report.parse import parse

from compare.canned import ARMS, result
from sharpwise.compare import charts, page
from sharpwise.compare.summary import headline
from sharpwise.report import figures


def test_the_page_parses_and_holds_every_arm() -> None:
    parser = parse(page.render(result()))
    assert headline(result()) in parser.text
    for arm in ARMS:
        assert arm in parser.text
        assert f"sharpwise.Some({arm!r})" in parser.text
    assert "diverged at learning rate 0.01 (step 7)" in parser.text
    assert "a <b>bold</b> text & more" in parser.text  # escaped, not markup
    assert "h.{0..1}.attn.weight" in parser.text
    assert len(parser.ids) == len(set(parser.ids))
    assert {"chart-sensitivity", "chart-loss", "chart-rates-0", "chart-rates-2"} <= set(parser.ids)


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    parser = parse(page.render(result()))
    links = [value for _, name, value in parser.attributes if name in ("src", "href")]
    assert links == [page.RESULT_NAME]


@pytest.mark.parametrize("stopped_at", [1, 7])
def test_an_arm_or_all_may_diverge_everywhere(stopped_at: int) -> None:
    losses = {"AdamW": [4.2, 3.8, 4.1], "AdamW + BlockwiseLR": [None] * 3, "Adam-mini": [4.3, 3.85, 4.2]}
    assert "No run reached its end." in parse(page.render(result(losses, stopped_at=stopped_at))).text
    nothing = result(dict.fromkeys(ARMS, [None] * 3), stopped_at=stopped_at)
    assert "AdamW diverged at every learning rate" in parse(page.render(nothing)).text


def test_both_files_are_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / page.PAGE_NAME).write_text("old")
    written = page.write(result(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [page.PAGE_NAME, page.RESULT_NAME]
    assert written.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((tmp_path / page.RESULT_NAME).read_text(encoding="utf-8")) == result()


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / page.PAGE_NAME).write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        page.write(result(), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


# --- charts ----------------------------------------------------------------------------------------------------------


def test_diverged_points_are_drawn_and_the_best_one_is_filled() -> None:
    traces = {trace.name: trace for trace in charts.sensitivity(result()).data}
    assert traces["AdamW + BlockwiseLR, diverged"].x == (1e-2,)
    assert traces["AdamW"].marker.color == ("#ffffff", charts.arm_colour(result(), "AdamW"), "#ffffff")


def test_blocks_that_share_a_learning_rate_share_a_line() -> None:
    figure = charts.learning_rates(result(), "AdamW + BlockwiseLR")
    assert figure is not None
    assert [trace.name for trace in figure.data] == ["Emb", "pos_emb, Norm"]
    uniform = charts.learning_rates(result(), "AdamW")
    assert uniform is not None
    assert [trace.name for trace in uniform.data] == ["all blocks"]


@pytest.mark.parametrize("centres", [[0.5, 0.5, 0.5], [0.0, 0.01, 0.9], [0.99, 0.98, 1.0], [0.2, 0.8, 0.5], []])
def test_labels_do_not_overlap_and_stay_inside(centres: list[float]) -> None:
    heights = [0.1, 0.2, 0.1][: len(centres)]
    placed = figures.spread(centres, heights)
    boxes = sorted((y - h / 2, y + h / 2) for y, h in zip(placed, heights, strict=True))
    assert all(low >= -1e-9 and high <= 1 + 1e-9 for low, high in boxes)
    assert all(upper[0] >= lower[1] - 1e-9 for lower, upper in pairwise(boxes))
    assert [centres[i] for i in sorted(range(len(placed)), key=placed.__getitem__)] == sorted(centres)


def test_colours_are_hexadecimal_and_differ() -> None:
    for palette in (charts.ARM_COLOURS, tuple(figures.TYPE_COLOURS.values())):
        assert len(set(palette)) == len(palette)
        assert all(re.fullmatch("#[0-9A-F]{6}", colour, re.I) for colour in palette)
