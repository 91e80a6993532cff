"""The command that a study ends with: it is one that can be given, and what it asks for is what is missing."""

import json
import math
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from compare.test_results import Loss, even, fill, result_of
from compare.test_runner import study
from sharpwise.cli.compare import _study
from sharpwise.cli.main import create_app
from sharpwise.compare.stored import open_study
from sharpwise.compare.study import make_study

LONG = 150_000  # more than 20 tokens for each parameter of the model


def apart(gaps: Mapping[str, float], noise: float = 0.001) -> Loss:
    """Losses that end this far from the baseline's, and seeds that move the difference by `noise`."""

    def loss(trial: Any) -> float:
        tuned = 4.0 + 0.02 * trial.seed + abs(trial.lr - 3e-3) - 0.1 * trial.horizon
        moved = noise * (1.0, -1.2, 0.2)[trial.seed % 3] * (trial.arm != "adamw")
        return tuned + gaps.get(trial.arm, 0.0) + moved

    return loss


def filled(given: Mapping[str, Any], folder: Path, loss: Loss, **more: Any) -> dict[str, Any]:
    """The result of a study with made-up runs, which the folder holds as a real one would."""
    found = fill(given, folder, loss, **more)
    (folder / "study.toml").write_text(tomli_w.dumps(found.given))
    return result_of(found, folder, shown=False)


def words_of(result: Mapping[str, Any]) -> list[str]:
    """The command, without the words that it begins with; the model of these studies is a function in a file."""
    words = shlex.split(result["next"]["command"])
    assert words[:3] == ["sharpwise", "compare", "--trust-code"]
    return words[3:]


def given_again(result: Mapping[str, Any], folder: Path) -> None:
    """The command is understood, and asks this very study for runs that it does not have."""
    outcome = CliRunner().invoke(create_app(), ["compare", "--trust-code", *words_of(result), "--so-far"])
    assert outcome.exit_code == 0, outcome.output
    assert words_of(result)[-2:] == ["--out", str(folder)]
    assert outcome.stdout.startswith("Unfinished")


def test_what_is_not_complete_goes_on(data: Path, tmp_path: Path) -> None:
    result = filled(study(data), tmp_path / "a b", even, runs=5)
    assert words_of(result) == ["--out", str(tmp_path / "a b")]
    given_again(result, tmp_path / "a b")


def test_a_model_that_is_no_function_needs_no_confirmation(data: Path, tmp_path: Path) -> None:
    given = {**study(data), "run": {**study(data)["run"], "model": {"name": "gpt2-0.4m"}}}
    command = filled(given, tmp_path / "study", even, runs=5)["next"]["command"]
    assert command.startswith("sharpwise compare --out ")


@pytest.mark.parametrize(("best", "arm", "edge"), [(300.0, "adamw", "largest"), (1e-9, "adamw+blockwise", "smallest")])
def test_an_arm_at_the_edge_of_its_learning_rates_gets_others(
    best: float, arm: str, edge: str, data: Path, tmp_path: Path
) -> None:
    def loss(trial: Any) -> float:
        return 4.0 + 0.1 * abs(math.log10(trial.lr / (best if trial.arm == arm else 3e-3))) + 0.001 * trial.seed

    result = filled(study(data, seeds=3), tmp_path / "study", loss)
    assert next(own["edge"] for own in result["arms"] if own["name"] == arm) == edge
    assert result["next"]["reason"].startswith(f"{arm} ended best at the {edge} learning rate")
    *words, to, folder = words_of(result)
    assert (to, folder, words[-2]) == ("--out", f"{tmp_path / 'study'}-lrs", "--search")
    tried = json.loads(words[-1].partition("=")[2])
    chosen = [own["setting"]["optimizer.lr"] for own in result["arms"]]
    assert tried == sorted(tried) and tried[0] < min(chosen) / 2 < 2 * max(chosen) < tried[-1]
    steps = [b / a for a, b in pairwise(tried)]
    assert max(steps) < 3.3 and min(steps) > 3
    # It is a study that can be run, in which every arm begins with these, and may go on beyond them.
    given, _ = _study([str(tmp_path / "study" / "study.toml")], Path(folder), None, None, {}, [], [words[-1]], True)
    spaces = make_study(given or {}).spaces.values()
    assert {space.lrs for space in spaces} == {tuple(tried)} and all(space.most > len(tried) for space in spaces)


def test_a_candidate_that_won_at_its_edge_has_won(data: Path, tmp_path: Path) -> None:
    def loss(trial: Any) -> float:
        if trial.arm == "adamw":
            return 5.0 + abs(trial.lr - 3e-3)
        return 4.0 - 0.1 * math.log10(trial.lr) + 0.001 * (1.0, -1.2, 0.2)[trial.seed % 3]

    result = filled(study(data, seeds=3), tmp_path / "study", loss)
    assert (result["arms"][1]["edge"], result["arms"][1]["verdict"]) == ("largest", "better")
    assert "--ablations" in words_of(result)


def test_what_is_undecided_gets_the_seeds_that_decide_it(data: Path, tmp_path: Path) -> None:
    loss = apart({"adamw+blockwise": -0.02}, noise=0.02)
    result = filled(study(data, seeds=3), tmp_path / "study", loss)
    assert result["arms"][1]["verdict"] == "undecided"
    assert "Undecided: adamw+blockwise." in result["next"]["reason"]
    given_again(result, tmp_path / "study")
    words = words_of(result)
    seeds = int(words[words.index("--seeds") + 1])
    assert 3 < seeds <= 20
    assert f"{(seeds - 3) * 4} runs more" in result["next"]["reason"]  # two arms, the baseline on two other horizons
    more = filled(study(data, seeds=seeds), tmp_path / "study", loss)
    assert more["arms"][1]["verdict"] == "better"
    assert "--seeds" not in words_of(more)


def test_no_number_of_seeds_is_named_that_nobody_would_train(data: Path, tmp_path: Path) -> None:
    result = filled(study(data, seeds=3, margin=1e-6), tmp_path, apart({"adamw+blockwise": -1e-3}, noise=0.5))
    assert result["arms"][1]["verdict"] == "undecided"
    assert "--seeds" not in words_of(result)


def test_a_per_block_learning_rate_that_was_better_is_ablated_and_then_trained_for_longer(
    data: Path, tmp_path: Path
) -> None:
    folder, loss = tmp_path / "study", apart({"adamw+blockwise": -0.5})
    result = filled(study(data, seeds=3), folder, loss)
    assert "--ablations" in words_of(result)
    given_again(result, folder)
    whole = filled(study(data, seeds=3, ablations=True), folder, loss)
    words = words_of(whole)
    assert len(whole["arms"]) == 5
    assert words[1:] == ["--budget", "6400", "--out", f"{folder}-x4"]
    given = open_study({**study(data, seeds=3, ablations=True), "tokens": 6400}, Path(words[-1]))
    assert [arm.name for arm in given.arms] == [arm["name"] for arm in whole["arms"]]


def test_where_nothing_was_better_the_next_runs_are_longer(data: Path, tmp_path: Path) -> None:
    result = filled(study(data), tmp_path / "study", apart({"adamw+blockwise": 0.5}, 1e-4))
    assert words_of(result)[1:] == ["--budget", "6400", "--out", f"{tmp_path / 'study'}-x4"]


@pytest.mark.parametrize(("gap", "best"), [(-0.5, "lion"), (0.5, "adamw")])
def test_after_long_runs_there_is_a_best_arm_to_train_with(gap: float, best: str, data: Path, tmp_path: Path) -> None:
    result = filled(study(data, arms=["adamw", "lion"], tokens=LONG), tmp_path, apart({"lion": gap}))
    assert result["budget"]["tokens_per_parameter"] > 20
    words = shlex.split(result["next"]["command"])
    arm = next(arm for arm in result["arms"] if arm["name"] == best)
    assert words[:3] == ["sharpwise", "train", "--trust-code"]
    assert Path(words[3]) == tmp_path / arm["final"][0]["folder"] / "config.toml"


@pytest.mark.parametrize("lost", [{1}, {1, 2, 3}])
def test_a_baseline_that_diverged_warms_up_for_longer(lost: set[int], data: Path, tmp_path: Path) -> None:
    def loss(trial: Any) -> float | None:
        return None if trial.arm == "adamw" and trial.stage == "final" and trial.seed in lost else even(trial)

    result = filled(study(data, seeds=3), tmp_path / "study", loss)
    assert result["next"]["reason"].startswith("adamw diverged")
    assert words_of(result)[1:] == ["--set", "schedule.warmup=0.3", "--out", f"{tmp_path / 'study'}-warmup"]
    notes = [note for note in result["caveats"] if note.startswith("adamw diverged in")]
    assert [f"in {len(lost)} of 3 final runs (seed 1 at step 2" in note for note in notes] == [True]
