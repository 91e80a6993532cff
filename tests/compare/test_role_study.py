"""Searches of factors as studies: what is refused, what they take, real ones to their end, stopped, and their page."""

import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from report.parse import parse
from train.kill_rig import processes

from compare.test_results import fill, result_of
from compare.test_runner import losses, study
from sharpwise import tune
from sharpwise.block_lr import PerRole, make_block_lr
from sharpwise.compare import budget
from sharpwise.compare.budget import expected, work_out
from sharpwise.compare.report import search
from sharpwise.compare.report.page import render
from sharpwise.compare.report.runs import csv_text
from sharpwise.compare.roles import BLOCK_LR, SEEDS
from sharpwise.compare.runner import plan, run_study
from sharpwise.compare.storage import Storage
from sharpwise.compare.stored import build_arms, differences, open_study
from sharpwise.compare.trial import SETTINGS_OF, Trial, plain

OPTIMUM = {"Emb": 4.0, "VO": 0.5}
SEARCH = {"name": "adamw", "setting_of": "adamw", "tune": "roles"}


def searching(data: Path, table: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """AdamW and itself with searched factors."""
    return study(data, arms={"adamw": {}, "mine": {**SEARCH, **(table or {})}}, horizons=[], **changes)


def loss(trial: Trial) -> float | None:
    """A bowl in factors and learning rate; a head at twice the rate diverges."""
    found = make_block_lr(dict(trial.setting).get(BLOCK_LR))
    at = dict(found.ratios) if isinstance(found, PerRole) else {}
    if at.get("Head") == 2:
        return None
    far = sum(math.log2(at.get(name, 1.0) / OPTIMUM.get(name, 1.0)) ** 2 for name in ("Emb", "QK", "VO", "FFN", "Norm"))
    chance = random.Random(f"{trial.setting}{trial.seed}").gauss(0, 0.002)
    return 4.0 + 0.05 * far + 0.1 * math.log(trial.lr / 3e-3) ** 2 + 0.01 * (trial.seed % 7) + chance


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"tune": "role"}, "arm 'mine': tune must be \"roles\", got 'role'; leave it out"),
        (
            {"runs": 25},
            r"runs must be 26 or more, got 25: a search over Emb, QK, VO, FFN, Norm, Head takes 2 .* up to 4",
        ),
        ({"runs": 9, "types": ["Emb", "FFN"]}, "runs must be 10 or more, got 9: a search over Emb, FFN takes 2 for"),
        ({"runs": 0}, "runs must be a whole number above 0, got 0"),
        ({"runs": 40.0}, r"runs must be a whole number above 0, got 40\.0"),
        ({"runs": True}, "runs must be a whole number above 0, got True"),
        (
            {"types": ["Emb", "pos_emb"]},
            "arm 'mine': .*'pos_emb' is no block of this model .*; it has the types Emb, .* the",
        ),
        ({"types": ["ffn"]}, r"'ffn' is no block of this model \(did you mean 'FFN'\?\); it has the types"),
        ({"types": ["q", "QK"]}, "'q' has no block of its own; of several .* the last one holds, so name it after QK"),
        ({"types": []}, r"types must be different block types or roles, such as \['Emb', 'FFN'\], got \[\]"),
        ({"types": "Emb"}, "types must be different block types or roles, .* got 'Emb'"),
        ({"types": ["Emb", "Emb"]}, "types must be different block types"),
        ({"types": [3]}, "types must be different block types"),
        (
            {"name": "adamw+blockwise"},
            "arm 'mine': a search starts at one rate for all blocks, and its .* has blockwise",
        ),
        ({"name": "torch.optim:RAdam"}, "torch.optim:RAdam is of another library, and moves all blocks alike"),
        ({"lrs": [1e-3, 2e-3, 4e-3]}, "takes the setting of 'adamw' and has lrs of its own"),
        ({"of": ["lr", "weight_decy"]}, r"of must be some of lr, .* got .* \(did you mean 'weight_decay'\?\)"),
        ({"of": []}, "of must be some of lr, weight_decay, beta2, each once, got \\[\\]"),
        ({"of": "lr"}, "of must be some of lr, weight_decay, beta2, each once, got 'lr'"),
        ({"of": ["lr", "lr"]}, "of must be some of lr, weight_decay, beta2, each once"),
        (
            {"of": ["weight_decay"], "settings": {"optimizer.weight_decay": 0}},
            "arm 'mine': of: a weight decay of 0 has nothing to multiply; give adamw one above 0, as with --set",
        ),
        ({"name": "lion", "of": ["beta2"]}, "of: lion has no second moment, whose beta2 .*, or take one of adam-mini,"),
        ({"name": "sgd", "of": ["beta2"]}, "of: sgd has no second moment, whose beta2 could differ by type"),
        ({"name": "lion", "of": ["weight_decay"]}, "a weight decay of 0 has nothing to multiply; give lion one above"),
        (
            {"of": ["beta2"], "settings": {"optimizer.settings_of": {"Emb": {"eps": 1e-6}}}},
            "a search of beta2 starts at one value for all blocks, and its optimizer has settings_of; leave that out",
        ),
        (
            {"of": ["lr", "weight_decay"], "types": ["Emb"], "runs": 9},
            "runs must be 10 or more, got 9: a search over Emb takes 2 .* to try each of the 2 factors",
        ),
        ({"types": ["Emb"], "lr_only": ["FFN"]}, r"lr_only must be some of types, got \['FFN'\] of \['Emb'\]"),
        ({"tunes": "roles"}, r"arm 'mine' has no 'tunes' \(did you mean 'tune'\?\)"),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(data, tmp_path, table, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_study(searching(data, table), tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"adamw": {"runs": 30}, "lion": {}}},
            "arm 'adamw': runs are those of a search; say tune = \"roles\"",
        ),
        (
            {"arms": {"adamw": {}, "a": SEARCH, "b": {**SEARCH, "setting_of": "a"}}},
            "'b' takes the setting of a, which has",
        ),
        ({"seeds": 1001}, "seeds must be below 1001, got 1001"),
    ],
)
def test_a_study_around_a_search_that_cannot_be_meant_is_refused(data, tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_study(study(data, **changes), tmp_path / "study")


def test_a_weight_decay_that_tuning_may_set_to_0_has_nothing_to_multiply(data, tmp_path) -> None:
    given = searching(data, {"of": ["weight_decay"]}, search={"optimizer.weight_decay": [0.1, 0]})
    with pytest.raises(ValueError, match="a weight decay of 0 has nothing to multiply"):
        open_study(given, tmp_path / "study")


def test_types_that_are_parts_of_parameters_are_named(data, tmp_path) -> None:
    gpt2 = {**study(data)["run"], "model": {"name": "gpt2-tiny", "settings": {"vocab_size": 300}}}
    found = open_study(searching(data, {"of": ["lr", "beta2"]}, run=gpt2), tmp_path)
    roles = found.roles["mine"]
    assert roles.types_of("lr") == ("Emb", "pos_emb", "QK", "VO", "FFN", "Norm")
    assert roles.types_of("beta2") == ("Emb", "pos_emb", "FFN", "Norm")
    assert found.given["arms"]["mine"]["lr_only"] == ["QK", "VO"]
    assert open_study(found.given, tmp_path) == found
    assert roles.said == (
        "a factor on lr for each of Emb, pos_emb, QK, VO, FFN, Norm; on beta2 for each of Emb, pos_emb, FFN, Norm (QK, "
        "VO left out of beta2: parts of fused parameters, which have one for all)"
    )
    assert (roles.least, roles.most) == (2 * (1 + 2 * 10), 2 * (1 + 4 * 10))
    build_arms(found, found.arms)  # with a setting for every type
    for types, message in (
        (["Emb", "QK"], r"'QK' shares transformer.h.0.attn.c_attn.weight with VO|'QK' shares .*c_attn.* with others"),
        (
            ["q", "k"],
            "'q' shares .*c_attn.* with k and others, and weight_decay can differ between whole parameters only;",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            open_study(searching(data, {"of": ["weight_decay"], "types": types}, run=gpt2), tmp_path)
    named = searching(data, {"of": ["weight_decay"], "types": ["Emb", "*.c_attn.*"]}, run=gpt2)
    build_arms(named := open_study(named, tmp_path), named.arms)
    alone = searching(data, {"of": ["lr", "beta2"], "types": ["QK"], "lr_only": ["QK"]}, run=gpt2)
    with pytest.raises(
        ValueError, match="of: beta2 can differ between whole parameters only, and all of QK are parts of"
    ):
        open_study(alone, tmp_path)


def test_an_optimizer_that_takes_no_factors_is_named_before_anything_is_trained(data, tmp_path, monkeypatch) -> None:
    from sharpwise.compare import stored

    monkeypatch.setattr(stored, "build", _refusing(stored.build))
    found = open_study(searching(data), tmp_path / "study")
    with pytest.raises(ValueError, match="arm 'mine' cannot be built: no factors here"):
        plan(found, tmp_path / "study")


def _refusing(real):
    def build(config):
        if config.optimizer.block_lr:
            raise ValueError("no factors here")
        return real(config)

    return build


# --- what it takes ---------------------------------------------------------------------------------------------------


def test_the_types_are_those_of_the_model(data, tmp_path) -> None:
    found = open_study(searching(data), tmp_path)
    assert found.roles["mine"].types == ("Emb", "QK", "VO", "FFN", "Norm", "Head")
    assert found.given["arms"]["mine"]["types"] == ["Emb", "QK", "VO", "FFN", "Norm", "Head"]
    gpt2 = searching(data, run={**study(data)["run"], "model": {"name": "gpt2-tiny", "settings": {"vocab_size": 300}}})
    assert open_study(gpt2, tmp_path).roles["mine"].types == ("Emb", "pos_emb", "QK", "VO", "FFN", "Norm")


@pytest.mark.parametrize(
    ("table", "least", "most"),
    [
        # 3 to 7 learning rates, 26 to 50 runs of a search on top, and 2 x 2 final runs.
        ({}, 3 + 26 + 4, 7 + 50 + 4),
        ({"runs": 30}, 3 + 26 + 4, 7 + 30 + 4),
        ({"types": ["Emb"]}, 3 + 6 + 4, 7 + 10 + 4),
        # Tuned itself: adamw gets as many.
        ({"setting_of": "", "runs": 30}, 2 * (3 + 26) + 4, 2 * (7 + 30) + 4),
    ],
)
def test_what_it_takes_is_said_and_kept(data, tmp_path, table, least, most) -> None:
    found = open_study(searching(data, table), tmp_path)
    taken = work_out(found, build_arms(found, found.arms), {})
    assert taken.runs == (least, most)
    fill(found.given, tmp_path / "study", loss)
    runs = len(Storage(tmp_path / "study" / "study.db").results)
    assert least <= runs <= most
    done = Storage(tmp_path / "study" / "study.db").losses
    assert sum(expected(found, done).values()) == runs
    for count in range(0, runs, 5):  # on the way it is no less than what there is
        some = dict(list(done.items())[:count])
        assert count <= sum(expected(found, some).values()) <= most


def test_the_estimate_of_time_knows_that_a_search_has_two_runs_at_a_time(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(budget, "_seconds_per_token", lambda *_: 1e-3)
    found = open_study(searching(data, {"runs": 30}), tmp_path)
    built = build_arms(found, found.arms)
    per_run = 1.6
    seconds = {jobs: work_out(found, built, {}, jobs, timed=True).seconds for jobs in (1, 2, 8)}
    assert seconds[1] == pytest.approx((33 * per_run, 41 * per_run))
    assert seconds[2] == pytest.approx((33 * per_run / 2, 41 * per_run / 2))
    assert seconds[8] == pytest.approx(((7 / 8 + 26 / 2) * per_run, (11 / 8 + 30 / 2) * per_run))


# --- what came out ---------------------------------------------------------------------------------------------------


def test_a_search_is_told_on_the_page_and_in_the_files(data, tmp_path) -> None:
    found = fill(searching(data), tmp_path, loss)
    result = result_of(found, tmp_path)
    arm = result["arms"][1]
    told = arm["search"]
    assert told["block_lr"] == "per_role(ratios={Emb: 4, QK: 1, VO: 0.5, FFN: 1, Norm: 1, Head: 1})"
    assert arm["setting"] == {"optimizer.lr": 3e-3, BLOCK_LR: told["block_lr"]}
    assert told["ended"] == "nothing" and len(told["runs"]) <= told["most"] == 50
    assert {block["multipliers"]["mine"] for block in result["blocks"] if block["type"] == "Emb"} == {4.0}
    assert "a factor for every type of block that a search has found: Emb x4, others x1, VO x0.5" in arm["definition"]
    assert f"block_lr='{told['block_lr']}'" in arm["code"].replace('"', "'")
    # The gains are the differences of the steps that were taken, at each seed.
    by_type = {row.type: row for row in search.rows(told)}
    for name, row in by_type.items():
        taken = [step for step in told["steps"] if step["type"] == name and step["taken"]]
        gains = [sum(s["against"][i] - s["losses"][i] for s in taken) for i in range(2)] if taken else []
        assert list(row.gains) == pytest.approx(gains)
        assert row.factor == (taken[-1]["after"] if taken else 1)
    assert by_type["Emb"].factor == 4 and sum(by_type["Emb"].gains) / 2 == pytest.approx(0.2, abs=0.01)
    assert by_type["Head"].tried[0] == "x1 to x2: diverged"
    # Terminal and page tell the same.
    page = parse(render(result))
    for text in (
        f'block_lr="{told["block_lr"]}"',
        search.summary(told)[3:],
        by_type["Emb"].gained,
        "x1 to x2",
        "diverged",
    ):
        assert text in page.text
    assert {f"chart-factor-0-{i}" for i in range(6)} <= set(page.ids)
    # Every run is listed, with its seed.
    rows = [row.split(",") for row in csv_text(result).splitlines()]
    roles = [row for row in rows if row[2] == "roles"]
    assert len(roles) == len(told["runs"]) and {row[3] for row in roles} == {str(seed) for seed in SEEDS}
    # What it had and adamw had not stands with the caveats.
    notes = " ".join(result["caveats"])
    assert f"mine had a search of {len(told['runs'])} runs on top of the tuning of adamw" in notes
    assert "was not tuned: its runs have the setting" not in notes
    assert f"and from there a search of {len(told['runs'])} runs for a factor per type of block" in page.text


def test_weight_decay_and_beta2_are_told_too(data, tmp_path) -> None:
    def lossy(trial: Trial) -> float | None:
        emb = plain(trial.setting).get(SETTINGS_OF, {}).get("Emb", {})
        far = math.log2(emb.get("weight_decay", 0.01) / 0.02), math.log2((1 - emb.get("betas", [0, 0.999])[1]) / 2e-3)
        found = loss(trial)
        return None if found is None else found + 0.05 * sum(x * x for x in far)

    given = searching(data, {"of": ["lr", "weight_decay", "beta2"], "types": ["Emb", "VO"]})
    found = fill(given, tmp_path, lossy)
    result = result_of(found, tmp_path)
    arm = result["arms"][1]
    told = arm["search"]
    assert told["factors"] == {"Emb": 4.0, "VO": 0.5}
    assert told["factors_of"] == {"weight_decay": {"Emb": 2.0, "VO": 1.0}, "beta2": {"Emb": 2.0, "VO": 1.0}}
    settings = {
        "Emb": {"weight_decay": 0.02, "betas": [0.9, 0.998]},
        "VO": {"weight_decay": 0.01, "betas": [0.9, 0.999]},
    }
    assert told["settings_of"] == arm["setting"][SETTINGS_OF] == settings
    assert {step["of"] for step in told["steps"]} == {"lr", "weight_decay", "beta2"}
    rows = search.rows(told)
    assert [(row.of, row.type, row.factor) for row in rows if row.factor != 1] == [
        ("lr", "Emb", 4.0), ("lr", "VO", 0.5), ("weight_decay", "Emb", 2.0), ("beta2", "Emb", 2.0),
    ]  # fmt: skip
    assert [sum(row.gains) / 2 for row in rows if row.of != "lr" and row.gains] == pytest.approx([0.05] * 2, abs=0.01)
    groups = "sharpwise.param_groups(model, {'Emb': {'weight_decay': 0.02, 'betas': (0.9, 0.998)}, 'VO': {"
    assert groups in arm["code"]
    assert "weight decay and 1 - beta2 by type of block as a search has found them" in arm["definition"]
    page = parse(render(result))
    for text in (*search.spelled(told), groups, "1 - beta2", "weight decay"):
        assert text in page.text
    assert {f"chart-factor-0-{i}" for i in range(6)} <= set(page.ids)
    assert "weight_decay" in csv_text(result)


def test_an_unfinished_search_can_be_looked_at_at_any_time(data, tmp_path) -> None:
    for runs in (1, 3, 20):
        found = fill(searching(data), tmp_path / str(runs), loss, runs=runs)
        result = result_of(found, tmp_path / str(runs))
        told = result["arms"][1]["search"]
        assert not result["complete"] and (told is None) == (runs < 3)
        assert told is None or (told["ended"] == "" and len(told["runs"]) == runs - 3)


def test_a_search_that_finds_nothing_says_so(data, tmp_path) -> None:
    found = fill(searching(data), tmp_path, lambda trial: 4.0 + 0.1 * math.log(trial.lr / 3e-3) ** 2)
    result = result_of(found, tmp_path)
    arm = result["arms"][1]
    assert arm["search"]["block_lr"] == "" and set(arm["search"]["factors"].values()) == {1.0}
    assert "Every factor is 1: no step was taken." in parse(render(result)).text
    assert arm["setting"] == result["arms"][0]["setting"]


def test_with_as_many_trials_for_all_no_caveat_speaks_of_more(data, tmp_path) -> None:
    found = fill(searching(data, {"setting_of": "", "runs": 30}), tmp_path, loss)
    result = result_of(found, tmp_path)
    base, own = result["arms"]
    count = len(own["tuning"]) + len(own["search"]["runs"])
    assert len(base["tuning"]) + len(base["refined"]) == count
    assert f"Each was tuned with the same number of trials: {count} runs" in parse(render(result)).text
    assert not any("on top of the tuning" in note for note in result["caveats"])


def test_another_arm_may_take_the_factors_that_were_found(data, tmp_path) -> None:
    arms = {"adamw": {}, "mine": SEARCH, "mini": {"name": "adam-mini", "setting_of": "mine"}}
    found = fill(study(data, arms=arms, horizons=[]), tmp_path, loss)
    settings = {arm["name"]: arm["setting"] for arm in result_of(found, tmp_path)["arms"]}
    assert settings["mini"] == settings["mine"] != settings["adamw"]


def test_an_arm_that_cannot_have_what_is_searched_for_another_is_named_before_anything_is_trained(
    data, tmp_path
) -> None:
    search_of = {**SEARCH, "of": ["beta2"], "types": ["Emb"]}
    arms = {"adamw": {}, "mine": search_of, "plain": {"name": "sgd", "setting_of": "mine"}}
    found = open_study(study(data, arms=arms, horizons=[]), tmp_path)
    with pytest.raises(ValueError, match=r"arm 'plain' cannot be built: .*'Emb' has 'betas'; the groups of sgd may"):
        build_arms(found, found.arms)


def test_more_runs_may_be_given_and_nothing_else(data, tmp_path) -> None:
    before, more = (open_study(searching(data, {"runs": runs}), tmp_path) for runs in (26, 50))
    assert not differences(before, more)
    for other in (
        searching(data, {"runs": 26, "types": ["Emb", "QK"]}),
        searching(data, {"tune": "roles"}, margin=0.1),
    ):
        assert differences(more, open_study(other, tmp_path))
    (said,) = differences(more, before)
    assert said.endswith(
        "now it is adamw, setting_of adamw, settings {}, a search of 26 runs over Emb, QK, VO, FFN, Norm, Head"
    )
    fill(before.given, tmp_path, loss)
    stored = losses(tmp_path)
    fill(more.given, tmp_path, loss)
    assert stored.items() <= losses(tmp_path).items() and len(losses(tmp_path)) > len(stored)


# --- real ones -------------------------------------------------------------------------------------------------------


def tiny(data: Path, of: str = "lr") -> dict[str, Any]:
    """A search of one type: 6 to 10 runs of 10 steps."""
    return searching(data, {"types": ["Emb"], "of": [of]}, tokens=10 * 32)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of ten steps say enough here."""
    monkeypatch.setattr(budget, "FEWEST_STEPS", 10)


def test_a_search_from_python_to_its_end_and_again(data, tmp_path) -> None:
    given = study(data)
    arguments = {"run": given["run"], "tokens": 320, "folder": tmp_path / "search", "types": ["Emb"], "seeds": 2}
    found = tune.roles("adamw", **arguments, lrs=[1e-3, 1e-2, 1e-1], settings={"optimizer.weight_decay": 0.0})
    assert found.page.is_file() and found.result["complete"]
    base, own = found.result["arms"]
    assert base["setting"]["optimizer.lr"] == found.lr
    assert own["difference"]["n"] == 2
    if found.block_lr is not None:
        assert str(found.block_lr) == own["search"]["block_lr"]
        assert dict(found.block_lr.ratios) == own["search"]["factors"]
    first = {run["seed"]: run["train_loss"][0] for run in own["final"]}
    assert first == {run["seed"]: run["train_loss"][0] for run in base["final"]}  # paired
    before = (tmp_path / "search" / "study.db").read_bytes()
    again = tune.roles("adamw", **arguments, lrs=[1e-3, 1e-2, 1e-1], settings={"optimizer.weight_decay": 0.0})
    assert again == found and (tmp_path / "search" / "study.db").read_bytes() == before


def _run_and_die(given: dict[str, Any], folder: str, after: int) -> None:
    """Run a study and die when so many runs are stored."""
    budget.FEWEST_STEPS = 10
    real = Storage.add

    def add(self: Storage, trial: Any, result: Any) -> None:
        real(self, trial, result)
        if len(self.results) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    Storage.add = add  # type: ignore[method-assign]
    run_study(open_study(given, Path(folder)), Path(folder))


@pytest.mark.slow
@pytest.mark.parametrize("of", ["lr", "weight_decay"])
def test_a_search_that_was_killed_goes_on_and_finds_the_same_in_two_processes(data, tmp_path, of) -> None:
    seen: list[Any] = []
    state = run_study(open_study(tiny(data, of), tmp_path / "whole"), tmp_path / "whole", on_progress=seen.append)
    assert seen[-1].done == seen[-1].expected == len(state.results)
    whole = losses(tmp_path / "whole")
    assert sum("roles" in key for key in whole) >= 6
    for after in (2, 5, 7):  # in the tuning, in the search
        process = processes.Process(target=_run_and_die, args=(tiny(data, of), str(tmp_path / "killed"), after))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert len(losses(tmp_path / "killed")) == after
    run_study(open_study(tiny(data, of), tmp_path / "killed"), tmp_path / "killed", jobs=2)
    assert losses(tmp_path / "killed") == whole
