"""What is made of stored runs, without training any: unfinished studies, runs that were superseded, where it ran."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compare.test_runner import study
from sharpwise.block_lr.spelling import BLOCK_LRS
from sharpwise.compare import budget, stored
from sharpwise.compare.arms import INSTEAD, RULES, ablations, first_line, instead
from sharpwise.compare.record import Record
from sharpwise.compare.report.page import render
from sharpwise.compare.results import results
from sharpwise.compare.runner import look, place_of, run_study, summary
from sharpwise.compare.statistics import holm, paired_difference
from sharpwise.compare.storage import Storage
from sharpwise.compare.stored import open_study
from sharpwise.compare.study import Study, make_study
from sharpwise.compare.trial import Trial
from sharpwise.optim import ABLATIONS, CONSTRUCTORS

Loss = Callable[[Trial], float | None]


def even(trial: Trial) -> float:
    """The middle learning rate is best; twice the tokens help."""
    return 4.0 + abs(trial.lr - 3e-3) + 0.01 * trial.seed * len(trial.arm) - 0.1 * trial.horizon


def fill(given: Mapping[str, Any], folder: Path, loss: Loss = even, *, runs: int = 1000) -> Study:
    """Store so many runs of a study with made-up results."""
    found = open_study(given, folder)
    folder.mkdir(exist_ok=True)
    storage = Storage(folder / "study.db")
    while (wanted := found.needed(storage.losses)) and len(storage.results) < runs:
        record = Record([1, 2], [5.0, 4.0], [2], [4.0], final_loss=loss(wanted[0]))
        if record.final_loss is None:
            record.stopped_at = 2
        storage.add(wanted[0], summary(record, 32, 2))
    return found


def result_of(found: Study, folder: Path, *, shown: bool = True) -> dict[str, Any]:
    """The result, checked to be plain values that the page can show."""
    result = results(look(found, folder))
    json.dumps(result, allow_nan=False)
    assert not shown or render(result)
    return result


def test_an_unfinished_study_says_nothing_of_runs_that_are_still_to_come(data: Path, tmp_path: Path) -> None:
    assert result_of(fill(study(data), tmp_path / "whole"), tmp_path / "whole")["complete"]
    whole = len(Storage(tmp_path / "whole" / "study.db").results)
    for runs in range(1, whole, 2):
        folder = tmp_path / str(runs)
        result = result_of(fill(study(data), folder, runs=runs), folder, shown=runs % 5 == 0)
        assert not result["complete"]
        assert result["progress"]["done"] == runs < result["progress"]["expected"]
        base, other = result["arms"]
        assert "diverged" not in json.dumps([result["caveats"], other["sentence"], other["verdict"]])
        pairs = min(len(base["final"]), len(other["final"]))
        assert (other["difference"] or {"n": 0})["n"] == pairs
        assert bool(other["sentence"]) == bool(pairs)
        assert all(len(h["final_losses"]) == len(h["folders"]) == len(h["seeds"]) for h in result["horizons"])


def test_final_runs_of_a_setting_that_was_superseded_do_not_count(data: Path, tmp_path: Path) -> None:
    """A third arm takes seven trials, and so every arm gets more: they find a better setting, and new final runs."""

    def loss(trial: Trial) -> float:
        at = 0.1 if trial.arm == "adam-mini" else 4.3e-3
        return 4.0 + abs(trial.lr - at) + 0.001 * trial.seed

    fill(study(data), tmp_path, loss)
    before = {trial for trial in Storage(tmp_path / "study.db").results if trial.stage in ("final", "horizon")}
    more = fill(study(data, arms=["adamw", "adamw+blockwise", "adam-mini"]), tmp_path, loss)
    stored = Storage(tmp_path / "study.db").results
    assert {trial.arm for trial in before} < {trial.arm for trial in stored}
    assert len([t for t in stored if (t.arm, t.stage) == ("adamw", "final")]) == 4  # two of them superseded
    for arm in result_of(more, tmp_path)["arms"]:
        assert [run["seed"] for run in arm["final"]] == [1, 2]
        finals = {trial: r["final_loss"] for trial, r in stored.items() if trial.arm == arm["name"]}
        chosen = tuple(arm["setting"].items())
        expected = [finals[Trial(arm["name"], "final", chosen, seed)] for seed in (1, 2)]
        assert [run["final_loss"] for run in arm["final"]] == expected
    shares = {h["share"]: h["folders"] for h in result_of(more, tmp_path)["horizons"]}
    best = tuple(result_of(more, tmp_path)["arms"][0]["setting"].items())
    assert shares[2.0] == [place_of(Trial("adamw", "horizon", best, seed, 2.0)) for seed in (1, 2)]


def test_a_baseline_that_diverged_on_another_horizon_is_told(data: Path, tmp_path: Path) -> None:
    given = study(data, seeds=3)
    for lost, said in (({2}, "seed 2: speed-ups are those of the other seeds"), ({1, 2, 3}, "speed-ups cannot be")):
        folder = tmp_path / str(len(lost))
        found = fill(given, folder, lambda t, lost=lost: None if t.horizon == 0.5 and t.seed in lost else even(t))
        result = result_of(found, folder)
        assert any(
            "On 0.5 times the tokens adamw diverged with seed" in note and said in note for note in result["caveats"]
        )
        gain = result["arms"][1]["speedup"]
        assert (gain["n"], gain["seeds"]) == (3 - len(lost), 3)
        assert said in render(result)
    assert "at no seed did all runs end" in result["arms"][1]["sentence"]


def test_seeds_that_end_far_apart_are_told(data: Path, tmp_path: Path) -> None:
    for apart, told in ((0.1, False), (0.3, True)):
        folder = tmp_path / str(apart)
        found = fill(study(data), folder, lambda t, apart=apart: even(t) + apart * (t.seed == 2) * (t.arm == "adamw"))
        notes = [note for note in result_of(found, folder)["caveats"] if "apart" in note]
        assert bool(notes) == told
        said = f"Seeds of one arm ended far apart: adamw by {apart + 0.05:.3f} nats. A learning rate"
        assert all(note.startswith((said, "Speed-ups rest on adamw with")) for note in notes)
        assert sum("(lrs in the study file)" in note for note in notes) == told


def test_speed_ups_rest_on_the_points_of_the_baseline(data: Path, tmp_path: Path) -> None:
    for share, apart, told in ((1.0, 0.3, True), (0.5, 0.3, True), (2.0, 0.1, False)):
        folder = tmp_path / str(share)
        moved = {"adamw": apart}

        def loss(t: Trial, share: float = share, moved: Mapping[str, float] = moved) -> float:
            return even(t) + moved.get(t.arm, 0.0) * (t.seed == 2 and t.horizon == share)

        result = result_of(fill(study(data), folder, loss), folder)
        notes = [note for note in result["caveats"] if note.startswith("Speed-ups rest on")]
        assert bool(notes) == told
        assert all(f"adamw with {share:g} times the tokens" in note for note in notes)
    folder = tmp_path / "none"
    result = result_of(fill(study(data, horizons=[]), folder, loss), folder)
    assert not any("Speed-ups" in note for note in result["caveats"])


def test_arms_are_compared_with_their_own_ablations(data: Path, tmp_path: Path) -> None:
    arms = [
        "adamw", "adamw+blockwise", "adamw+mean_matched(blockwise)", "adamw+only(blockwise, types=QK)",
        "adamw+reversed(layer_decay)", "adam-mini+reversed(blockwise)",
    ]  # fmt: skip

    def loss(trial: Trial) -> float:
        return even(trial) + 0.01 * arms.index(trial.arm) * (1 + 0.3 * math.sin(trial.seed + len(trial.arm)))

    result = result_of(fill(study(data, arms=arms, seeds=3), tmp_path, loss), tmp_path)
    pairs = result["ablations"]
    assert [(pair["arm"], pair["ablation"]) for pair in pairs] == [(arms[1], arms[2]), (arms[1], arms[3])]
    ends = {arm["name"]: [run["final_loss"] for run in arm["final"]] for arm in result["arms"]}
    for pair in pairs:
        found = paired_difference(ends[pair["arm"]], ends[pair["ablation"]])
        assert [pair["difference"][key] for key in ("mean", "low", "high", "n")] == [
            found.mean,
            found.low,
            found.high,
            3,
        ]
        assert f"ended {abs(found.mean or 0):.3f} nats" in pair["sentence"]
    # Adjusted among themselves.
    assert [pair["difference"]["adjusted_p"] for pair in pairs] == holm([pair["difference"]["p"] for pair in pairs])
    assert "the same learning rate for every block" in pairs[0]["sentence"]
    said = {arm["name"]: arm["definition"] for arm in result["arms"]}
    assert said["adamw"] == "The baseline: Adam with decoupled weight decay, as torch's AdamW."
    assert said["adamw+blockwise"].startswith("adamw with multipliers by block type: ")
    assert said[arms[2]].startswith("adamw with the mean multiplier of blockwise for every block: x")
    assert said[arms[2]].endswith(" everywhere; a control.")
    assert said[arms[5]].startswith("AdamW with one second moment per block, with the multipliers of blockwise in rev")


def test_arms_with_other_settings_are_no_ablations(data: Path, tmp_path: Path) -> None:
    control = "adamw+mean_matched(blockwise)"
    for settings, pairs in (({}, 1), ({"optimizer.weight_decay": 0.3}, 0)):
        given = study(data, arms={"adamw": {}, "adamw+blockwise": {}, control: {"settings": settings}})
        assert len(list(ablations(make_study(given)))) == pairs
    del given["arms"]["adamw+blockwise"]
    assert list(ablations(make_study(given))) == []


def test_other_settings_of_a_block_lr_are_compared_with_the_first(data: Path) -> None:
    arms = ["adamw", "adamw+llr(every=10)", "adamw+llr(stop=0)", "adamw+llr(low=2)", "adamw+only(llr(stop=0))",
            "adam-mini+llr(stop=5)", "adamw+llr*layer_decay", "adamw+llr*layer_decay(rate=0.8)"]  # fmt: skip
    pairs = [(arm.name, other.name) for arm, other in ablations(make_study(study(data, arms=arms)))]
    assert pairs == [(arms[1], arms[2]), (arms[1], arms[3]), (arms[2], arms[4])]
    assert [instead(make_study(study(data, arms=arms)).arm(name)) for name in (arms[2], arms[4])] == [
        "llr(stop=0)",
        "the multipliers for Emb alone",
    ]


def test_every_optimizer_and_block_lr_can_say_what_it_is() -> None:
    assert set(RULES) == set(CONSTRUCTORS)
    assert set(INSTEAD) == set(ABLATIONS.values())
    for kind in (*RULES.values(), *BLOCK_LRS.values(), *ABLATIONS.values()):
        assert 10 < len(first_line(kind)) < 90
        assert not {":", ";", "\n"} & set(first_line(kind))


def test_multipliers_that_are_measured_on_the_way_are_not_taken_from_the_start(data: Path, tmp_path: Path) -> None:
    found = fill(study(data, arms=["adamw", "sgd-sai", "adamw+sharpness", "adamw+blockwise"]), tmp_path / "a")
    arms = {arm["name"]: arm for arm in result_of(found, tmp_path / "a")["arms"]}
    for name in ("sgd-sai", next(name for name in arms if "sharpness" in name)):
        assert (arms[name]["mean_multiplier"], arms[name]["mean_lr"]) == (None, None)
        assert not re.search(r"x\d", arms[name]["definition"])
    assert "with multipliers by the signal-to-noise ratio of the first gradient" in arms["sgd-sai"]["definition"]
    assert arms["adamw+blockwise"]["mean_multiplier"] > 1 and "Emb x10" in arms["adamw+blockwise"]["definition"]


def test_larger_steps_are_one_caveat_for_all_arms(data: Path, tmp_path: Path) -> None:
    given = study(data, arms=["adamw", "adamw+blockwise", "adam-mini+blockwise"])
    result = result_of(fill(given, tmp_path), tmp_path)
    assert sum("lr x mean factor" in note for note in result["caveats"]) == 1
    for arm in result["arms"]:
        assert arm["mean_lr"] == arm["setting"]["optimizer.lr"] * arm["mean_multiplier"]


def test_a_complete_study_is_looked_at_and_nothing_is_timed(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    found = fill(study(data), tmp_path)
    built: list[str] = []
    real = stored.build

    def build(config: Any) -> Any:
        built.append(config.optimizer.block_lr)
        return real(config)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this is not needed")

    monkeypatch.setattr(stored, "build", build)
    monkeypatch.setattr(budget, "train_steps", refuse)
    state = run_study(found, tmp_path, on_budget=refuse)
    assert state.complete
    assert built == [""]  # the baseline alone
    assert state.budget.seconds is None


def test_the_estimate_is_of_what_is_left_and_of_validation(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def steps_of_32_ms(*_: object) -> Iterator[Any]:
        yield from (SimpleNamespace(seconds=seconds) for seconds in (9.0, 0.032, 0.032, 0.032))

    monkeypatch.setattr(budget, "train_steps", steps_of_32_ms)
    budgets = []
    for runs in (0, 4):
        found = fill(study(data), tmp_path / str(runs), runs=runs)
        done = Storage(tmp_path / str(runs) / "study.db").losses
        built = stored.build_arms(found, found.arms)
        budgets.append(budget.work_out(found, built, done, timed=True))
    assert [budget.done for budget in budgets] == [0, 4]
    assert budgets[0].seconds is not None and budgets[1].seconds is not None
    assert budgets[0].seconds[0] - budgets[1].seconds[0] == pytest.approx(4 * 1.6 * (1 + 8 / 100 / 3))


def test_where_it_ran_is_where_the_runs_were_made(data: Path, tmp_path: Path) -> None:
    found = fill(study(data), tmp_path)
    for i, trial in enumerate(Storage(tmp_path / "study.db").results):
        place = tmp_path / place_of(trial)
        place.mkdir(parents=True)
        start = {"step": 1, "date": f"2020-01-{i + 1:02}", "torch": "1.0", "device": "abacus"}
        (place / "environment.json").write_text(json.dumps([start]))
    result = result_of(found, tmp_path)
    last = f"2020-01-{i + 1:02}"
    assert result["environment"] == {"date": last, "torch": "1.0", "device": "abacus", "runs_at_a_time": 2}
    assert not any("made alike" in note for note in result["caveats"])
    (place / "environment.json").write_text(json.dumps([{**start, "device": "slide rule"}]))
    assert any("they differ in device." in note for note in result_of(found, tmp_path)["caveats"])


def test_what_was_not_tuned_is_told_for_those_for_whom_it_was_not(data: Path, tmp_path: Path) -> None:
    decay = {"search": {"optimizer.weight_decay": [0.3]}}
    notes = result_of(fill(study(data), tmp_path / "none"), tmp_path / "none")["not_tested"]
    assert any(note.startswith("Not tuned: weight decay, warm-up, momentum") for note in notes)
    given = study(data, arms={"adamw": decay, "adamw+blockwise": {}}, horizons=[])
    notes = result_of(fill(given, tmp_path / "some"), tmp_path / "some")["not_tested"]
    assert "Tuned for adamw alone: weight decay." in notes
    assert not any("half" in note or "numbers of tokens" in note for note in notes)
    notes = result_of(fill(study(data, **decay), tmp_path / "all"), tmp_path / "all")["not_tested"]
    assert not any("weight decay" in note for note in notes)


def test_results_that_an_older_version_stored_can_be_read(data: Path, tmp_path: Path) -> None:
    found = fill(study(data), tmp_path)
    state = look(found, tmp_path)
    older = {trial: {k: v for k, v in r.items() if k != "jobs"} for trial, r in state.results.items()}
    object.__setattr__(state, "results", older)
    assert results(state)["complete"]


def test_there_is_nothing_to_look_at_before_the_first_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="study holds no runs yet"):
        look(open_study(study(data), tmp_path / "study"), tmp_path / "study")
