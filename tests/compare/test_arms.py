"""Arms that are called as they like, and arms that run with the tuned setting of another."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest

from compare.test_results import fill, result_of
from compare.test_runner import study
from sharpwise.compare.arms import definitions
from sharpwise.compare.budget import expected, work_out
from sharpwise.compare.report.page import render
from sharpwise.compare.report.runs import csv_text
from sharpwise.compare.report.text import method
from sharpwise.compare.runner import run_study
from sharpwise.compare.storage import Storage
from sharpwise.compare.stored import build_arms, differences, open_study
from sharpwise.compare.study import make_study
from sharpwise.compare.trial import Trial

DECAY = {"optimizer.weight_decay": [0.3]}
ARMS: dict[str, Any] = {
    "adamw": {"search": DECAY},
    "adamw+blockwise": {"setting_of": "adamw"},
    "adam-mini": {},
    "mine": {"name": "adam-mini", "setting_of": "adamw + blockwise()", "settings": {"optimizer.v_by": "tensor"}},
}


def loss(trial: Trial) -> float:
    at = 1e-3 if trial.arm == "adamw" else 9e-3
    decay = dict(trial.setting).get("optimizer.weight_decay", 0.0)
    return 4.0 + abs(trial.lr - at) - 0.1 * decay + 0.01 * trial.seed * len(trial.arm) - 0.1 * trial.horizon


def test_an_arm_runs_with_the_setting_of_another(data: Path, tmp_path: Path) -> None:
    found = fill(study(data, arms=ARMS), tmp_path, loss)
    stored = Storage(tmp_path / "study.db").results
    best = {"optimizer.lr": 9.49e-4, "optimizer.weight_decay": 0.3}
    result = result_of(found, tmp_path)
    arms = {arm["name"]: arm for arm in result["arms"]}
    assert [arm["setting_of"] for arm in arms.values()] == ["", "adamw", "", "adamw"]  # a chain ends at what is tuned
    for name in ("adamw", "adamw+blockwise", "mine"):
        assert arms[name]["setting"] == best
        assert {trial.setting for trial in stored if (trial.arm, trial.stage) == (name, "final")} == {(*best.items(),)}
        assert [run["seed"] for run in arms[name]["final"]] == [1, 2]
    assert {trial.stage for trial in stored if trial.arm in ("adamw+blockwise", "mine")} == {"final"}
    assert arms["adam-mini"]["setting"]["optimizer.lr"] == pytest.approx(9e-3, rel=0.2)
    assert all(arms[name]["tuning"] == [] and arms[name]["edge"] == "" for name in ("adamw+blockwise", "mine"))
    assert len(arms["adamw"]["tuning"]) == len(arms["adam-mini"]["tuning"])
    assert result["complete"] and result["progress"]["expected"] == len(stored)
    assert "weight_decay=0.3" in arms["mine"]["code"] and "v_by='tensor'" in arms["mine"]["code"]


def test_it_is_said_wherever_the_arm_is_shown(data: Path, tmp_path: Path) -> None:
    result = result_of(fill(study(data, arms=ARMS), tmp_path, loss), tmp_path)
    notes = [note for note in result["caveats"] if "was not tuned" in note]
    assert [note.partition(" was")[0] for note in notes] == ["adamw+blockwise", "mine"]
    assert "the setting that was best for adamw." in notes[1]
    assert ["larger steps at that lr" in note for note in notes] == [True, False]
    assert not any("lr x mean factor" in note for note in result["caveats"])
    page, trials = render(result), len(result["arms"][0]["tuning"])
    assert page.count("those of adamw</td>") == 2
    assert f"Each other was tuned with the same number of trials: {trials} runs" in method(result)[1]
    assert "mine has no trials, but the best setting of adamw." in method(result)[1]
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert {(row["arm"], row["setting_of"]) for row in rows} == {
        ("adamw", ""), ("adamw+blockwise", "adamw"), ("adam-mini", ""), ("mine", "adamw")
    }  # fmt: skip
    assert result["arms"][3]["definition"] == "AdamW with one second moment per block; v by tensor."


HALVED: dict[str, Any] = {
    "adamw": {"search": DECAY},
    "half": {"name": "adamw", "setting_of": "adamw", "lr_times": 0.5, "settings": {"schedule.warmup": 0.0}},
    "eighth": {"name": "adamw", "setting_of": "half", "lr_times": 0.25},
    "given": {"name": "adamw", "lr": 2e-3},
    "as given": {"name": "adam-mini", "setting_of": "given", "lr_times": 2},
}


def test_an_arm_takes_a_part_of_a_learning_rate_or_one_that_is_given(data: Path, tmp_path: Path) -> None:
    result = result_of(fill(study(data, arms=HALVED), tmp_path, loss), tmp_path)
    arms = {arm["name"]: arm for arm in result["arms"]}
    lr, decay = arms["adamw"]["setting"].values()
    assert decay == 0.3 and len(arms["adamw"]["tuning"]) > 3
    assert arms["half"]["setting"] == {"optimizer.lr": float(f"{lr / 2:.3g}"), "optimizer.weight_decay": 0.3}
    assert arms["eighth"]["setting"] == {"optimizer.lr": float(f"{lr / 8:.3g}"), "optimizer.weight_decay": 0.3}
    assert arms["given"]["setting"] == {"optimizer.lr": 2e-3}
    assert arms["as given"]["setting"] == {"optimizer.lr": 4e-3}
    stored = Storage(tmp_path / "study.db").results
    assert {trial.stage for trial in stored if trial.arm != "adamw"} == {"final"}
    assert result["complete"] and result["progress"]["expected"] == len(stored)
    assert all(arms[name]["edge"] == "" and arms[name]["tuning"] == [] for name in HALVED if name != "adamw")
    assert "half has no trials, but the best setting of adamw at 0.5 times its learning rate." in method(result)[1]
    assert "given has no trials, but the best setting of another study." in method(result)[1]
    assert "those of adamw at 0.125 times its learning rate</td>" in render(result)


def test_a_study_of_given_learning_rates_has_final_runs_alone(data: Path, tmp_path: Path) -> None:
    given = study(data, arms={"adamw": {"lr": 1e-3}, "lion": {"lr": 1e-4}}, horizons=[])
    found = make_study(given)
    assert expected(found, {}) == {1.0: 4} and work_out(found, build_arms(found, found.arms), {}).runs == (4, 4)
    result = result_of(fill(given, tmp_path, loss), tmp_path)
    assert result["complete"] and result["progress"] == {"done": 4, "expected": 4}
    assert method(result)[1].startswith("None was tuned here. adamw has no trials")
    assert render(result).count("those of another study</td>") == 2
    before = make_study(given)
    after = make_study(study(data, arms={"adamw": {"lr": 2e-3}, "lion": {"lr": 1e-4}}, horizons=[]))
    assert differences(before, after) == [
        "arm adamw: the study has adamw, lr 0.001, settings {}, now it is adamw, lr 0.002, settings {}"
    ]


def test_a_search_starts_at_a_learning_rate_that_is_given(data: Path) -> None:
    searching = {"name": "adamw", "setting_of": "adamw", "tune": "roles", "types": ["Emb", "FFN"]}
    found = make_study(study(data, arms={"adamw": {"lr": 1e-3}, "mine": searching}, horizons=[]))
    wanted = found.needed({})
    assert wanted and {(trial.arm, trial.stage, trial.lr) for trial in wanted} == {("mine", "roles", 1e-3)}
    search = found.search("mine", {})
    assert search is not None and not search.ended


def test_runs_that_an_arm_does_not_have_are_not_counted(data: Path, tmp_path: Path) -> None:
    found = make_study(study(data, arms=ARMS))
    assert expected(found, {}) == {0.5: 2, 2.0: 2, 1.0: 2 * 3 + 4 * 2}
    budget = work_out(found, build_arms(found, [found.arm("adamw")]), {})
    assert budget.runs == (2 * (3 + 1) + 2 * (4 + 2), 2 * (7 + 1) + 2 * (4 + 2))


def test_what_an_arm_does_when_is_judged_by_the_length_of_its_runs(data: Path) -> None:
    """Half of the shortest run ends before the second measurement, half of these runs later."""
    late = "adamw+sharpness(stop=0.5, every=30)"
    found = make_study(study(data, arms={late: {}, "adamw": {}}, baseline="adamw", tokens=100 * 32))
    assert build_arms(found, found.arms).plan.schedule.total == 100
    assert build_arms(found, [found.arm(late)]).plan.schedule.total == 100
    short = make_study(study(data, arms={"adamw": {}, late: {}}))
    with pytest.raises(ValueError, match=f"arm '{re.escape(late)}' cannot be built"):
        build_arms(short, short.arms)


def test_the_baseline_may_take_a_setting_and_really_trains(data: Path, tmp_path: Path) -> None:
    given = study(data, arms={"lion": {"setting_of": "adamw"}, "adamw": {}}, horizons=[0.5])
    state = run_study(open_study(given, tmp_path), tmp_path)
    result = result_of(state.study, tmp_path)
    assert [arm["setting"] for arm in result["arms"]] == [result["arms"][1]["setting"]] * 2
    assert len(result["horizons"][0]["final_losses"]) == 2
    assert open_study(None, tmp_path, trust_code=True) == state.study


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"adamw": {}, "lion": {"setting_of": "sgd"}}, "arm 'lion': setting_of 'sgd' is no arm; arms are adamw, lion"),
        ({"adamw": {}, "lion": {"setting_of": "adamww"}}, r"called 'adamww' \(did you mean 'adamw'\?\)"),
        ({"adamw": {}, "lion": {"setting_of": "lion"}}, r"comes back to where it was: lion -> lion; one of them"),
        (
            {"adamw": {"setting_of": "lion"}, "lion": {"setting_of": "sgd"}, "sgd": {"setting_of": "lion"}},
            r"arm 'adamw': setting_of comes back .*: adamw -> lion -> sgd -> lion; one of them has to be tuned",
        ),
        ({"adamw": {}, "lion": {"setting_of": "adamw", "search": DECAY}}, "has search of its own, which it would not"),
        (
            {"adamw": {}, "lion": {"setting_of": "adamw", "search": DECAY, "lrs": [1, 2, 3]}},
            "arm 'lion' takes the setting of 'adamw' and has lrs and search of its own",
        ),
        ({"adamw": {}, "lion": {"lr": 0}}, "arm 'lion': lr must be a number above 0, such as 1e-3, got 0"),
        (
            {"adamw": {}, "lion": {"setting_of": "adamw", "lr_times": "2"}},
            "lion': lr_times must be a number .*, got '2'",
        ),
        (
            {"adamw": {}, "lion": {"lr": 1e-3, "lrs": [1, 2, 3]}},
            "is not tuned, as it has a learning rate; leave out lrs",
        ),
        ({"adamw": {}, "lion": {"lr": 1e-3, "tune": "roles"}}, "'lion' is not tuned, .*; leave out tune"),
        ({"adamw": {}, "lion": {"lr": 1e-3, "setting_of": "adamw"}}, "'lion': give lr, or setting_of with lr_times"),
        ({"adamw": {}, "lion": {"lr_times": 2}}, "'lion': give lr, or setting_of with lr_times"),
        ({"adamw": {}, "lion": {"setting_of": 3}}, "setting_of must be the name of another arm, got 3"),
        ({"adamw": {}, "lion": {"setting_of": ["adamw"]}}, r"must be the name of another arm, got \['adamw'\]"),
        (
            {"adamw": {"search": {"optimizer.eps": [1e-6]}}, "lion": {"setting_of": "adamw"}},
            "arm 'lion' with the setting of adamw: optimizer.eps: lion has no such setting",
        ),
        (
            {
                "adamw": {"search": DECAY},
                "lion": {"setting_of": "adamw", "settings": {"optimizer.weight_decay": 0.1}},
            },
            "takes the setting of adamw, which tunes optimizer.weight_decay, and sets that itself",
        ),
        ({"adamw": {}, "lion": 3}, "arm 'lion': expected a table, got 3"),
        ({"adamw": {}, "lion": {"name": "sgd"}}, "arm 'lion': its optimizer is sgd, and lion is another one"),
        ({"adamw": {}, "x": {"name": "adamww"}}, r"called 'adamww' \(did you mean 'adamw'\?\)"),
        ({"adamw": {}, " ": {"name": "adamw"}}, "an arm needs a name that can be shown, got ' '"),
        ({"adamw": {}, "adamw ": {"name": "adamw"}}, "two arms are the same: adamw"),
    ],
)
def test_what_cannot_be_meant(data: Path, arms: dict[str, Any], message: str) -> None:
    for ablations in (False, True):
        with pytest.raises(ValueError, match=message):
            make_study(study(data, arms=arms, ablations=ablations))


def test_what_all_arms_begin_with_may_be_tuned(data: Path) -> None:
    arms = {"adamw": {"search": DECAY}, "lion": {"setting_of": "adamw"}}
    found = make_study(study(data, arms=arms, settings={"optimizer.weight_decay": 0.1}))
    assert found.arm("lion").settings == {"optimizer.weight_decay": 0.1}
    tuned = Trial("lion", "final", (("optimizer.weight_decay", 0.3), ("optimizer.lr", 1e-3)), 1)
    assert found.config(tuned, 50)["optimizer"] == {"name": "lion", "weight_decay": 0.3, "lr": 1e-3}


def test_arms_that_are_called_otherwise(data: Path) -> None:
    arms = {"plain": {"name": "adamw"}, "mine": {"name": "adamw + blockwise()", "settings": {"optimizer.eps": 1e-6}}}
    found = make_study(study(data, arms=arms, baseline="mine", ablations=True))
    assert [(arm.name, "+".join(arm.optimizer.values())) for arm in found.arms] == [
        ("plain", "adamw"),
        ("mine", "adamw+blockwise"),
        ("mine, mean_matched", "adamw+mean_matched(blockwise)"),
        ("mine, reversed", "adamw+reversed(blockwise)"),
        ("mine, shuffled", "adamw+shuffled(blockwise)"),
    ]
    assert found.baseline == "mine" and found.arm("mine, reversed").settings == {"optimizer.eps": 1e-6}


def test_another_source_of_a_setting_is_another_study(data: Path) -> None:
    one, other = (
        make_study(study(data, arms={"adamw": {}, "lion": {}, "adam-mini": {"setting_of": of}}))
        for of in ("adamw", "lion")
    )
    assert differences(one, one) == []
    assert differences(one, other) == [
        "arm adam-mini: the study has adam-mini, setting_of adamw, settings {}, now it is adam-mini, setting_of lion, "
        "settings {}"
    ]


def test_rates_begin_where_the_control_has_updates_begin(data: Path) -> None:
    """LionA's lr is AdamW's, and not Lion's; of what stays on a sphere it is relative."""
    own = {"settings": {"optimizer.control": "hyperball"}}
    arms: dict[str, Any] = {"lion": {}, "liona": {}, "lionar": {}, "muonh": {}, "adamw": own}
    middles = {arm.name: arm.space.lrs[1] for arm in make_study(study(data, arms=arms)).arms}
    assert middles == {"lion": 5e-4, "liona": 3e-3, "lionar": 3e-3, "muonh": 1e-2, "adamw": 1e-2}


def test_what_bounds_updates_is_said(data: Path) -> None:
    """The presets that have a control, and an arm of another one."""
    arms = {"adamw": {}, "liona": {}, "lionar": {}, "mine": {"name": "lion", "settings": {"optimizer.control": "l2"}}}
    said = definitions(make_study(study(data, arms=arms)), [])
    assert "with" not in said["adamw"].partition(", as")[2]
    assert "with updates of one l2 norm" in said["liona"] and "with updates of one l2 norm" in said["mine"]
    assert "with rows that turn by a set angle" in said["lionar"]
