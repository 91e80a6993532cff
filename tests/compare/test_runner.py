"""Whole studies of a model that trains in a blink: to the end, stopped, killed, extended, in one process and in two."""

import json
import os
import shutil
import signal
import sqlite3
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from train.kill_rig import processes

from sharpwise.compare import runner
from sharpwise.compare.record import read_record
from sharpwise.compare.results import results
from sharpwise.compare.runner import place_of, run_study
from sharpwise.compare.storage import Storage
from sharpwise.compare.stored import open_study


def study(data: Path, **changes: Any) -> dict[str, Any]:
    """Two arms, two seeds, 50 steps of 32 tokens."""
    return {
        "arms": ["adamw", "adamw+blockwise"],
        "seeds": 2,
        "tokens": 50 * 32,
        "run": {
            "model": {"name": "train.kill_rig:build"},
            "data": {"path": str(data), "context": 16},
            "batch": {"sequences": 2},
            "compute": {"device": "cpu", "precision": "fp32"},
            "validation": {"sequences": 4, "every": 25},
            "log": {"diagnostics": 25},
        },
    } | changes


def losses(folder: Path) -> dict[str, float]:
    return {trial.key: loss for trial, loss in Storage(folder / "study.db").losses.items()}


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was never stopped, in this process."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    seen = []
    state = run_study(open_study(study(data), folder), folder, on_progress=seen.append)
    assert seen[-1].done == len(state.results) == seen[-1].expected
    return folder


def test_a_study_has_what_it_should_have(whole: Path, data: Path) -> None:
    state = run_study(open_study(None, whole, trust_code=True), whole)  # it is complete: nothing is trained
    found = results(state)
    assert [arm["name"] for arm in found["arms"]] == ["adamw", "adamw+blockwise"]
    assert len({len(arm["tuning"]) for arm in found["arms"]}) == 1
    for arm in found["arms"]:
        assert [run["seed"] for run in arm["final"]] == [1, 2]
        assert arm["setting"]["optimizer.lr"] in [run["lr"] for run in arm["tuning"]]
        assert all((whole / run["folder"] / "metrics.jsonl").exists() for run in arm["final"] + arm["tuning"])
    first = {run["train_loss"][0] for arm in found["arms"] for run in arm["final"] if run["seed"] == 1}
    assert len(first) == 1  # the same weights and the same first batch
    assert [h["share"] for h in found["horizons"]] == [0.5, 2.0]
    assert all(len(h["final_losses"]) == 2 for h in found["horizons"])
    json.dumps(found, allow_nan=False)
    blockwise = found["arms"][1]
    assert blockwise["mean_multiplier"] > 1
    assert blockwise["difference"]["n"] == 2
    assert blockwise["sentence"].startswith("ended ") and " adamw" in blockwise["sentence"]


def test_a_busy_machine_does_not_change_what_is_found(whole: Path, tmp_path: Path) -> None:
    run = next(whole.glob("runs/*/final-*"))
    shutil.copytree(run, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    slow = [{k: v if k == "step" or v is None else 10 * v for k, v in line.items()} for line in lines]
    (tmp_path / "run" / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slow))
    assert read_record(tmp_path / "run") == read_record(run)


def test_two_processes_find_the_same(whole: Path, data: Path, tmp_path: Path) -> None:
    run_study(open_study(study(data), tmp_path), tmp_path, jobs=2)
    assert losses(tmp_path) == losses(whole)


def _run_and_die(given: dict[str, Any], folder: str, after: int) -> None:
    """Run a study and die when so many runs are stored."""
    real = Storage.add

    def add(self: Storage, trial: Any, result: Any) -> None:
        real(self, trial, result)
        if len(self.results) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    Storage.add = add  # type: ignore[method-assign]
    run_study(open_study(given, Path(folder)), Path(folder))


def test_a_study_that_was_killed_goes_on_and_loses_nothing(whole: Path, data: Path, tmp_path: Path) -> None:
    for after in (1, 4):
        process = processes.Process(target=_run_and_die, args=(study(data), str(tmp_path), after))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert len(losses(tmp_path)) == after
    run_study(open_study(study(data), tmp_path), tmp_path)
    assert losses(tmp_path) == losses(whole)
    left = [{str(p.relative_to(folder)) for p in folder.glob("runs/*/*/*")} for folder in (tmp_path, whole)]
    assert left[0] == left[1]  # no checkpoints of the run that was stored and not tidied up


def _run_study(given: dict[str, Any], folder: str) -> None:
    run_study(open_study(given, Path(folder)), Path(folder))


def test_killed_at_any_time_nothing_is_counted_twice(whole: Path, data: Path, tmp_path: Path) -> None:
    for seconds in (0.7, 1.1, 0.9):
        process = processes.Process(target=_run_study, args=(study(data), str(tmp_path)))
        process.start()
        time.sleep(seconds)
        process.kill()
        process.join(60)
    run_study(open_study(study(data), tmp_path), tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_a_process_that_is_killed_is_replaced(whole: Path, data: Path, tmp_path: Path) -> None:
    killed = []

    def kill_one(progress: Any) -> None:
        if not killed and progress.done >= 1 and progress.running:
            workers = [int(p) for p in _children(os.getpid())]
            for pid in workers:
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    break

    run_study(open_study(study(data), tmp_path), tmp_path, jobs=2, on_progress=kill_one)
    assert killed
    assert losses(tmp_path) == losses(whole)


def _children(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found


def test_arms_and_seeds_can_be_added_and_nothing_else(whole: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    before = losses(folder)
    more = study(data, arms=["adamw", "adamw+blockwise", "adam-mini"], seeds=3)
    state = run_study(open_study(more, folder), folder)
    after = losses(folder)
    assert before.items() <= after.items()
    found = results(state)
    assert [len(arm["final"]) for arm in found["arms"]] == [3, 3, 3]
    with pytest.raises(ValueError, match=r"holds another study:\n  arms: the study has adam-mini, now it is missing"):
        open_study(study(data, seeds=3), folder)
    with pytest.raises(ValueError, match="tokens: the study has 1600, now it is 3200"):
        open_study({**more, "tokens": 3200}, folder)
    with pytest.raises(ValueError, match=r"arm adamw: .* most 7, .*, now it is .* most 5, "):
        open_study({**more, "most": 5}, folder)
    with pytest.raises(ValueError, match="seeds: the study has 3, now it is 2"):
        open_study({**more, "seeds": 2}, folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["adamw"]}, "needs two arms or more"),
        ({"arms": ["adamw", "adamw"]}, "two arms are the same: adamw"),
        ({"arms": ["adamw+blockwise", "adamw+blockwise()"]}, r"two arms are the same: adamw\+blockwise"),
        ({"arms": ["adamw", "adamww"]}, r"no optimizer is called 'adamww' \(did you mean 'adamw'\?\)"),
        ({"arms": "adamw"}, "arms must be a list of names"),
        ({"baseline": "lion"}, "the baseline 'lion' is no arm"),
        ({"seeds": 1}, "seeds must be 2 or more, got 1"),
        ({"margin": 0}, "margin must be a number of nats above 0"),
        ({"tokens": 0}, "the budget of a run must be above 0, got 0"),
        ({"ratio": 1.0}, r"tokens = N, or ratio = X .* give one of them"),
        ({"ratio": "x", "tokens": None}, "the budget of a run must be above 0, got 'x'"),
        ({"ratio": float("inf"), "tokens": None}, "the budget of a run must be above 0, got inf"),
        ({"horizons": [1.0]}, r"horizons must be different shares .* other than 1, got \[1.0\]"),
        ({"horizons": [0.5, 0.5]}, "horizons must be different shares"),
        ({"horizons": 2.0}, "horizons must be different shares"),
        ({"run": {"optimizer": {"lr": 1e-3}}}, "run.optimizer.lr is not shared by the runs of a study; say lrs"),
        ({"run": {"optimizer": {"block_lr": "blockwise"}}}, "run.optimizer.block_lr is not shared .* say arms"),
        ({"run": {"schedule": {"steps": 9}}}, "run.schedule.steps is not shared .* say tokens or ratio"),
        ({"run": {"seed": 3}}, "run.seed is not shared by the runs of a study; say seeds = N"),
        ({"run": {"compute": 2}}, "run.compute: expected a table, got 2"),
        ({"settings": {"batch.sequences": 4}}, "arm 'adamw': batch.sequences is no setting of an arm"),
        ({"settings": {"schedule.steps": 4}}, "schedule.steps is no setting of an arm; say tokens or ratio"),
        ({"search": {"optimizer.lr": [1e-3]}}, "optimizer.lr is no setting of an arm; say lrs"),
        ({"search": 3}, "search: expected a table, got 3"),
        ({"arms": {"adamw": {"lrs": ["a", "b", "c"]}, "lion": {}}}, "lrs must be three or more learning rates"),
        ({"arms": {"adamw": {"lrs": [1e-3, 1.0001e-3, 2e-3]}, "lion": {}}}, "lrs must be three or more learning rates"),
        ({"sedes": 3}, r"a study has no 'sedes' \(did you mean 'seeds'\?\)"),
        ({"arms": {"adamw": {"lrz": [1]}, "lion": {}}}, r"arm 'adamw' has no 'lrz' \(did you mean 'lrs?'\?\)"),
        ({"arms": {"adamw": {"lrs": [1, 2]}, "lion": {}}}, "lrs must be three or more learning rates"),
        ({"search": {"optimizer.weight_decay": 0.1}}, "must be a list of values to try"),
        ({"settings": {"optimizer.betaz": [0.9]}}, r"optimizer.betaz: adamw has no such setting"),
    ],
)
def test_a_study_that_cannot_be_meant_is_refused(data, tmp_path, changes, message) -> None:
    given = {key: value for key, value in study(data, **changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        open_study(given, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_ablations_are_of_block_lrs_and_not_of_ablations(data, tmp_path) -> None:
    own = {"lrs": [1, 2, 3]}
    arms = {"adamw": {}, "adamw + blockwise()": {}, "adamw+reversed(blockwise)": own}
    found = open_study(study(data, arms=arms, ablations=True), tmp_path)
    assert [arm.name for arm in found.arms] == [
        "adamw", "adamw+blockwise", "adamw+reversed(blockwise)", "adamw+mean_matched(blockwise)",
        "adamw+shuffled(blockwise)",
    ]  # fmt: skip
    assert found.arm("adamw+reversed(blockwise)").space.lrs == (1, 2, 3)  # as it was said


def test_a_budget_that_says_nothing_is_refused_with_the_number_that_would_do(data, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"640 tokens has 20 steps of 32: too few .* 1,600 tokens are the least"):
        run_study(open_study(study(data, tokens=640), tmp_path / "study"), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_an_arm_that_cannot_be_built_is_named_before_anything_is_trained(data, tmp_path) -> None:
    given = study(data, arms={"adamw": {}, "lion": {"settings": {"optimizer.betas": [2.0, 0.9]}}})
    with pytest.raises(ValueError, match="arm 'lion' cannot be built"):
        run_study(open_study(given, tmp_path / "study"), tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_full_disk_keeps_what_was_recorded(whole: Path, data: Path, tmp_path: Path, monkeypatch) -> None:
    calls = [0]
    real = runner.read_record

    def read(folder: Path) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        return real(folder)

    monkeypatch.setattr(runner, "read_record", read)
    with pytest.raises(OSError, match="No space left"):
        run_study(open_study(study(data), tmp_path), tmp_path)
    assert len(losses(tmp_path)) == 2
    monkeypatch.undo()
    run_study(open_study(study(data), tmp_path), tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_a_locked_database_says_so(whole: Path) -> None:
    with closing(sqlite3.connect(whole / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ValueError, match=r"study.db is locked by another process, .*, the same command goes on"):
            run_study(open_study(None, whole, trust_code=True), whole)


@pytest.mark.slow  # Optuna tries for half a minute
def test_a_database_that_is_locked_meanwhile_says_so(whole: Path, data: Path, tmp_path: Path) -> None:
    locks: list[sqlite3.Connection] = []
    with ExitStack() as held:

        def lock(progress: Any) -> None:
            if progress.done == 1 and not locks:
                other = held.enter_context(closing(sqlite3.connect(tmp_path / "study.db", isolation_level=None)))
                other.execute("BEGIN IMMEDIATE")
                locks.append(other)

        with pytest.raises(ValueError, match=r"study.db is locked by another process, .*, the same command goes on"):
            run_study(open_study(study(data), tmp_path), tmp_path, on_progress=lock)
    run_study(open_study(study(data), tmp_path), tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_a_damaged_database_says_so(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "study"
    shutil.copytree(whole, folder)
    (folder / "study.db").write_bytes((whole / "study.db").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"study.db cannot be used: .*\. Bring it back from a copy"):
        run_study(open_study(None, folder, trust_code=True), folder)


def test_every_trial_has_a_folder_of_its_own(whole: Path) -> None:
    trials = list(Storage(whole / "study.db").results)
    assert len({place_of(trial) for trial in trials}) == len(trials)
