"""The sentences of the page say what came out, and no more."""

import math
import re
from typing import Any

import pytest
from report.parse import parse

from compare.report import canned
from sharpwise.compare.report import page
from sharpwise.compare.report.runs import runs_of
from sharpwise.compare.report.text import headline, method, speedup_words


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ((0, 1), r"adamw\+blockwise trained better than adamw: it ended 0\.1\d\d nats per token lower \(95% interval "),
        ((0, 3), r".* trained worse than adamw: it ended 0\.0\d\d nats per token higher \(95% interval 0\.0\d\d to "),
        ((0, 2), "adam-mini trained as well as adamw"),
        ((0, 1, 3), r"adamw\+blockwise trained better .*\); adamw\+reversed\(blockwise\): worse"),
        ((0, 1, 2, 3), r"adamw\+blockwise trained better .*\); of the other 2, 1 equal, 1 worse"),
        ((0, 1, 7), r"2 of 2 candidates trained better than adamw; the best, adamw\+blockwise, ended 0\.110 nats"),
        ((0, 2, 3), "None of 2 candidates was shown to be better than adamw: 1 equal, 1 worse"),
    ],
)
def test_the_headline_says_what_came_out(arms: tuple[int, ...], sentence: str) -> None:
    assert re.match(sentence, headline(canned.result(arms)))


def test_one_seed_decides_nothing() -> None:
    result = canned.result((0, 1), 1)
    assert (
        headline(result)
        == "Undecided: these runs cannot tell whether adamw+blockwise trains better or worse than adamw"
    )
    assert "trains again once, with a seed that" in " ".join(method(result))


def test_runs_of_other_horizons_have_their_seed_and_folder() -> None:
    result = canned.unfinished()
    horizon = {
        "share": 0.5,
        "tokens": 9,
        "seeds": [2],
        "final_losses": [None],
        "stopped_at": [7],
        "folders": ["runs/x"],
    }
    result |= {"horizons": [horizon], "progress": {"done": 17, "expected": 17}}
    runs = [run for run in runs_of(result) if run.stage == "horizon"]
    assert [(run.seed, run.final_loss, run.stopped_at, run.folder) for run in runs] == [(2, None, 7, "runs/x")]
    assert "./runs/x/config.toml" in page.render(result)
    assert headline(result) == "Unfinished: 17 runs of this comparison with adamw are done"


def test_seeds_at_which_one_of_both_diverged_decide_nothing() -> None:
    result = canned.result((0, 1), 2, lost={0: 1})
    result["arms"][1]["final"][1] |= {"final_loss": None, "stopped_at": 9}
    result["arms"][1] |= {"verdict": "diverged", "speedup": None}
    result["arms"][1]["difference"] |= dict.fromkeys(("mean", "low", "high", "sd", "p"), None)
    assert headline(result) == "Undecided: with no seed did both adamw+blockwise and adamw reach the end"
    assert "chart-difference" not in parse(page.render(result)).ids


@pytest.mark.parametrize(
    ("found", "texts"),
    [
        ({"value": 1.3, "low": 1.1, "high": 1.5, "bound": ""}, ("1.30", "(1.10 to 1.50)")),
        ({"value": 1.3, "low": None, "high": None, "bound": ""}, ("1.30", "")),
        ({"value": None, "low": 1.9, "high": None, "bound": ">2"}, (">2", "(from 1.90)")),
        ({"value": None, "low": 0.0, "high": 0.6, "bound": "<0.5"}, ("<0.5", "(up to 0.60)")),
        ({"value": 1.0, "low": 0.0, "high": math.inf, "bound": ""}, ("1.00", "(open on both sides)")),
        ({"value": None, "low": None, "high": None, "bound": ""}, ("-", "")),
        (None, ("-", "")),
    ],
)
def test_speedups_are_said_with_their_interval(found: Any, texts: tuple[str, str]) -> None:
    assert speedup_words(found) == texts
