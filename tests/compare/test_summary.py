"""The sentences follow the numbers, whichever way these go."""

import pytest

from compare.canned import GUESSING, result
from sharpwise.compare.summary import best_run, caveats, difference, headline, mean_multiplier, rows, subtitle

CLOSE = "Adam-mini ended too close to AdamW to call (-0.003 nats)"


def _with(blockwise: list[float | None], adamw: list[float | None] | None = None):
    return result({"AdamW": adamw or [4.2, 3.8, 4.1], "AdamW + BlockwiseLR": blockwise, "Adam-mini": [4.3, 3.797, 4.2]})


@pytest.mark.parametrize(
    ("blockwise", "sentence"),
    [
        (
            [3.9, 3.6, 4.4],
            f"AdamW + BlockwiseLR ended 0.200 nats below AdamW; {CLOSE}",
        ),
        (
            [4.0, 4.4, None],
            f"AdamW + BlockwiseLR ended 0.200 nats above AdamW; {CLOSE}",
        ),
        (
            [None, None, None],
            f"AdamW + BlockwiseLR diverged at every learning rate; {CLOSE}",
        ),
    ],
)
def test_the_headline_says_what_came_out(blockwise: list[float | None], sentence: str) -> None:
    assert headline(_with(blockwise)) == sentence


def test_a_baseline_that_diverges_is_said_first() -> None:
    assert headline(_with([3.9, 4, 5], [None] * 3)) == (
        "AdamW diverged at every learning rate; AdamW + BlockwiseLR and Adam-mini did not"
    )
    nothing = result(dict.fromkeys(("AdamW", "AdamW + BlockwiseLR", "Adam-mini"), [None] * 3))
    assert headline(nothing) == "AdamW diverged at every learning rate, and so did every other arm"
    assert difference(nothing, "Adam-mini") is None


@pytest.mark.parametrize(
    ("losses", "edge"), [([3.0, 4.0, 5.0], "smallest"), ([4.0, 3.0, None], ""), ([5.0, 4.0, 3.0], "largest")]
)
def test_the_edge_of_the_grid_is_named(losses: list[float | None], edge: str) -> None:
    outcome = _with(losses)
    best = best_run(outcome, "AdamW + BlockwiseLR")
    assert best is not None
    assert best.edge == edge
    assert any(f"best at the {edge} learning rate tried" in note for note in caveats(outcome)) == bool(edge)


def test_what_a_reader_has_to_know_is_said() -> None:
    outcome = _with([3.9, GUESSING + 0.1, None])
    text = "\n".join([subtitle(outcome), *caveats(outcome)])
    for part in (
        "One seed, so there is no interval",
        "10 tokens per parameter",
        "cross late",
        "diverged at learning rate 0.01 (step 7)",
        "learned nothing at learning rate 0.003",
        "640 tokens a run",
    ):
        assert part in text


def test_the_mean_multiplier_counts_parameters() -> None:
    assert mean_multiplier(result(), "AdamW + BlockwiseLR") == pytest.approx((10 + 2 * 8 + 2 * 4 + 1) / 6)
    assert mean_multiplier(result(), "Adam-mini") == 1.0


def test_the_table_has_a_cell_per_arm() -> None:
    table = dict(rows(result()))
    assert table["final loss, lr 0.01"] == ["4.100", "diverged", "4.200"]
    assert table["best"] == ["3.800", "3.900", "3.850"]
    assert table["best lr"] == ["0.003", "0.001 (edge)", "0.003"]
    assert table["against AdamW"] == ["", "+0.100", "+0.050"]
    assert table["optimizer state"] == ["4.00 MiB", "4.00 MiB", "2.00 MiB"]
    assert all(len(cells) == 3 for cells in table.values())
