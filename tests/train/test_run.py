"""Runs in their folders: begun, stopped, gone on with, and finished."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sharpwise.train.config_file import make_config, read_given
from sharpwise.train.run import run
from train.kill_rig import STEPS, assert_same_run, settings
from train.run_rig import ADAMW, assert_same, changed, content, lines, prepare, stop_after


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def given(data: Path) -> dict[str, Any]:
    return settings(data, ADAMW)


@pytest.fixture(scope="module")
def reference(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert run(given, folder).state == "finished"
    return folder


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_the_folder_of_a_finished_run(reference, given) -> None:
    assert sorted(path.name for path in reference.iterdir()) == [
        *("blocks.json", "checkpoints", "config.toml", "environment.json", "facts.json", "final", "metrics.jsonl"),
        *("run.lock", "sample.txt", "status.json", "timing.jsonl"),
    ]
    status = json.loads((reference / "status.json").read_text())
    metrics = lines(reference)
    assert status == {
        "state": "finished",
        "step": STEPS,
        "message": f"{STEPS} steps done",
        "validation_loss": metrics[-1]["validation_loss"],
    }
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert [line["tokens"] for line in metrics] == [64 * step for step in range(1, STEPS + 1)]
    assert [line["step"] for line in metrics if "validation_loss" in line] == [5, 10, 15, 20, 24]
    assert [line["step"] for line in metrics if "update_rms" in line] == [1, 2, 4, 6, 12, 18, 24]
    assert all(line.keys() >= {"loss", "lr", "grad_norm"} and "skipped" not in line for line in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2
    [start] = json.loads((reference / "environment.json").read_text())
    assert (start["step"], start["threads"], start["device"]) == (1, 1, "cpu")
    assert (start["torch"], start["matrix_products"]) == (torch.__version__, "fp32")
    assert {"date", "commit", "sharpwise"} <= start.keys()
    facts = json.loads((reference / "facts.json").read_text())
    assert (facts["steps"], facts["tokens_per_step"], facts["context"]) == (STEPS, 64, 16)
    assert facts["optimizer"].startswith("sharpwise.create_optimizer(model, 'adamw', lr=0.003, ")
    segments = json.loads((reference / "blocks.json").read_text())["segments"]
    said = [dict(zip(facts["explained"]["columns"], row, strict=True)) for row in facts["explained"]["rows"]]
    assert [row["name"] for row in said] == [segment["name"] for segment in segments]
    assert {(row["rule"], row["cut"], row["storage"]) for row in said} == {("adamw", "element", "fp32")}
    timing = lines(reference, "timing.jsonl")
    assert all(line["seconds"] > 0 and line["memory"] > 1e6 for line in timing)
    stored = read_given(reference / "config.toml")
    assert stored["schedule"]["steps"] == STEPS
    assert stored["optimizer"]["weight_decay"] == 0.01  # of the constructor
    assert len(stored["data"]["sha256"]) == 64
    assert make_config(stored) == make_config(stored)


def test_what_was_left_open_is_worked_out_and_written_down(data, tmp_path) -> None:
    given = {
        "model": {"name": "gpt2-tiny", "settings": {"n_layer": 1}},
        "data": {"path": str(data)},
        "batch": {"sequences": 2},
        "schedule": {"tokens": 128 * 2 * 3 + 5},
        "compute": {"threads": 1},
        "log": {"tensorboard": False},
    }
    assert run(given, tmp_path / "run").steps == 3
    stored = read_given(tmp_path / "run" / "config.toml")
    assert stored["data"]["context"] == 128  # what the model has
    assert stored["batch"]["micro"] == 2
    assert stored["schedule"]["steps"] == 3
    assert (stored["validation"]["every"], stored["log"]["diagnostics"], stored["checkpoint"]["every"]) == (1, 1, 1)
    assert stored["compute"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert stored["compute"]["precision"] in ("fp32", "bf16-autocast")
    assert stored["model"]["attention"] in ("eager", "sdpa")
    again = run(given, tmp_path / "run")  # the same command
    assert again.message == "it had finished already"


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16"])
@pytest.mark.parametrize("model", ["train.kill_rig:build", "llama-tiny"])
def test_the_same_twice(given, tmp_path, precision, model) -> None:
    given = changed(given, compute={"precision": precision}, schedule={"steps": 6}, model={"name": model})
    for name in "ab":
        run(given, tmp_path / name)
    a, b = (content(tmp_path / name) for name in "ab")
    for name in ("metrics.jsonl", "sample.txt", "blocks.json", "config.toml", "final/model.safetensors"):
        assert a[name] == b[name]
    assert lines(tmp_path / "a")[-1]["loss"] < 5.8


def test_the_precisions_differ_a_little(given, tmp_path) -> None:
    found = {}
    for precision in ("fp32", "bf16-autocast", "bf16"):
        run(changed(given, compute={"precision": precision}, schedule={"steps": 4}), tmp_path / precision)
        found[precision] = [line["loss"] for line in lines(tmp_path / precision)]
    assert len({str(losses) for losses in found.values()}) == 3
    for losses in found.values():
        assert losses == pytest.approx(found["fp32"], abs=0.05)


def test_activation_checkpointing_changes_no_byte(given, tmp_path) -> None:
    dropout = {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    for again in (False, True):
        model = {"name": "gpt2-tiny", "settings": dropout, "activation_checkpointing": again}
        run(changed(given, model=model, schedule={"steps": 5}), tmp_path / str(again))
    assert lines(tmp_path / "True") == lines(tmp_path / "False")
    assert (tmp_path / "True" / "sample.txt").read_bytes() == (tmp_path / "False" / "sample.txt").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch's own inductor
def test_a_compiled_model(given, tmp_path) -> None:
    for compiled in (False, True):
        for name in ("a", "b") if compiled else ("a",):
            table = {"name": "gpt2-tiny", "settings": {"n_layer": 1}, "compile": compiled}
            own = changed(given, model=table, schedule={"steps": 3, "warmup": 1})
            run(own, tmp_path / f"{compiled}-{name}")
    assert content(tmp_path / "True-a")["metrics.jsonl"] == content(tmp_path / "True-b")["metrics.jsonl"]
    mine, other = ([line["loss"] for line in lines(tmp_path / name)] for name in ("True-a", "False-a"))
    assert mine == pytest.approx(other, abs=1e-4)


def test_text_in_front_of_a_sample(reference, data, given, tmp_path) -> None:
    said = (reference / "sample.txt").read_text()
    assert " >>> " in said
    run(changed(given, schedule={"steps": 1, "warmup": 0}), tmp_path / "run")
    other = (tmp_path / "run" / "sample.txt").read_text()
    assert said.partition(" >>> ")[0] == other.partition(" >>> ")[0]
    assert said != other


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 13, 23])
def test_stopped_and_gone_on_with_it_is_the_same_run(given, reference, tmp_path, step) -> None:
    folder = tmp_path / "run"
    outcome = run(given, folder, **stop_after(step))
    assert (outcome.state, outcome.step, outcome.steps) == ("interrupted", step, STEPS)
    assert outcome.message == f"stopped after step {step} of {STEPS}; the same command goes on from there"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", step)
    assert not (folder / "final").exists()
    seen: list[Any] = []
    outcome = run(
        given, folder, on_start=lambda start: seen.append(start.step), on_step=lambda done: seen.append(done.step)
    )
    assert outcome.state == "finished"
    assert seen == [step, *range(step + 1, STEPS + 1)]
    assert_same(folder, reference)
    assert [start["step"] for start in json.loads((folder / "environment.json").read_text())] == [1, step + 1]


def test_stopped_after_every_step(given, tmp_path) -> None:
    given = changed(given, schedule={"steps": 7})
    run(given, tmp_path / "reference")
    for _ in range(6):
        assert run(given, tmp_path / "run", should_stop=lambda: True).state == "interrupted"
    assert run(given, tmp_path / "run", should_stop=lambda: True).state == "finished"
    assert_same(tmp_path / "run", tmp_path / "reference")
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [start["step"] for start in starts] == list(range(1, 8))


def test_going_on_without_a_configuration(given, reference, tmp_path) -> None:
    run(given, tmp_path / "run", **stop_after(7))
    assert run(None, tmp_path / "run", trust_code=True).state == "finished"
    assert_same_run(tmp_path / "run", reference)


def test_a_stop_while_it_is_not_running_goes_back_to_the_checkpoint(given, reference, tmp_path) -> None:
    """An exception of the caller, as a second Ctrl-C is: steps 9 and 10 are taken again."""

    def interrupted(done: Any) -> None:
        if done.step == 10:
            raise KeyboardInterrupt

    given_seldom = changed(given, checkpoint={"every": 8})
    with pytest.raises(KeyboardInterrupt):
        run(given_seldom, tmp_path / "run", on_step=interrupted)
    assert len(lines(tmp_path / "run")) == 10
    seen: list[int] = []
    run(given, tmp_path / "run", on_start=lambda start: seen.append(start.step))  # checkpoint.every may change
    assert seen == [8]
    assert_same_run(tmp_path / "run", reference)


def test_a_finished_run_does_nothing(reference, given) -> None:
    before, times = content(reference), {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    for again in (given, None, changed(given, checkpoint={"keep": 7})):
        outcome = run(again, reference, on_start=pytest.fail, on_step=pytest.fail)
        assert (outcome.state, outcome.step, outcome.message) == ("finished", STEPS, "it had finished already")
        assert outcome.validation_loss == lines(reference)[-1]["validation_loss"]
    assert content(reference) == before
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == times


def test_only_what_is_missing_at_the_end_is_made_again(given, reference, tmp_path) -> None:
    shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    assert run(given, tmp_path / "run", on_step=pytest.fail).message == f"{STEPS} steps done"
    assert_same_run(tmp_path / "run", reference)


def test_what_may_change_does(given, reference, tmp_path) -> None:
    folder = tmp_path / "run"
    run(changed(given, checkpoint={"keep": 5, "best": False}), folder, **stop_after(9))
    assert len(list((folder / "checkpoints").iterdir())) == 5
    run(changed(given, checkpoint={"keep": 1, "best": False, "asynchronous": False}), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]
    assert (folder / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert read_given(folder / "config.toml")["checkpoint"]["keep"] == 1


def test_no_checkpoints_but_the_last(given, tmp_path) -> None:
    folder = tmp_path / "run"
    run(changed(given, checkpoint={"every": 0, "best": False}), folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]


def test_the_best_is_kept_though_later_ones_are_worse(given, tmp_path) -> None:
    """A learning rate that grows until it spoils what was learned."""
    schedule = {"kind": "constant", "warmup": 24}
    optimizer = {"name": "adamw", "lr": 2.0}
    own = given | {"optimizer": optimizer, "schedule": {"steps": STEPS, **schedule}}
    own = changed(own, checkpoint={"every": 4, "keep": 2, "best": True}, validation={"every": 1})
    folder = tmp_path / "run"
    run(own, folder, **stop_after(6))
    run(own, folder)
    losses = {line["step"]: line["validation_loss"] for line in lines(folder)}
    best = min(losses, key=losses.__getitem__)
    assert best < 16  # otherwise this shows nothing
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (best, 20, 24)
    ]
