"""TensorBoard and Weights & Biases: what they get, and what it takes."""

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sharpwise.train import tracking
from sharpwise.train.run import run
from sharpwise.train.steps import Step
from sharpwise.train.tracking import points
from train.kill_rig import STEPS, settings
from train.run_rig import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


def given(data: Path, **log: Any) -> dict[str, Any]:
    own = settings(data, {"name": "adamw", "block_lr": "blockwise"}, checkpoint={"every": 4})
    return own | {"log": {"diagnostics": 6, "tensorboard": False, **log}}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- what is shown ---------------------------------------------------------------------------------------------------


def step(number: int, **other: Any) -> Step:
    return Step(number, number * 64, 2.5, 1e-3, 0.7, True, 0.5, 0.1, **other)


def test_points() -> None:
    assert points(step(3), 24) == {}
    for shown in (1, 10, 24):
        found = points(step(shown), 24)
        assert found == {"loss/train": 2.5, "lr": 1e-3, "tokens_per_second": 128.0, "grad_norm": 0.7}
    assert points(step(3, validation_loss=2.0), 24)["loss/validation"] == 2.0
    measured = step(
        3, notes={"update_rms": {"q": 0.1}, "sharpness": {"VO": 0.2}}, multipliers={"q": 8.0, "norm": [1.0, 2.0]}
    )
    found = points(measured, 24)
    assert {name: value for name, value in found.items() if "/" in name and not name.startswith("loss")} == {
        "update_rms/q": 0.1,
        "sharpness/VO": 0.2,
        "multiplier/q": 8.0,
        "multiplier/norm/0": 1.0,
        "multiplier/norm/1": 2.0,
    }
    without = step(10)
    without.grad_norm = None
    assert "grad_norm" not in points(without, 24)


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def interrupt(at: int) -> Any:
    def on_step(done: Step) -> None:
        if done.step == at:
            raise KeyboardInterrupt

    return on_step


def test_event_files_have_every_step_once(data, tmp_path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    own = given(data, tensorboard=True)
    for at in (11, 21):  # the checkpoint is of step 8, and of step 20: steps 10 and 21 are taken twice
        with pytest.raises(KeyboardInterrupt):
            run(own, folder, on_step=interrupt(at))
    run(own, folder)
    assert len(list((folder / "tensorboard").iterdir())) == 3
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    roles = {"tok_emb", "q", "k", "v", "o", "up", "down", "norm", "head"}
    assert set(tags) >= {
        *("loss/train", "loss/validation", "lr", "grad_norm", "tokens_per_second", "gradient_noise/model"),
        *(f"{what}/{role}" for what in ("update_rms", "update_relative", "multiplier") for role in roles),
        *(f"sharpness/{block}" for block in ("Emb", "QK", "VO", "FFN", "Norm")),
    }
    assert [event.step for event in events.Scalars("loss/validation")] == [5, 10, 15, 20, 24]
    assert [event.step for event in events.Scalars("multiplier/q")] == [6, 12, 18, 24]
    # The first, every tenth and the last; and all that have something else to show.
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 4, 5, 6, 10, 12, 15, 18, 20, 24]
    by_step = {line["step"]: line for line in metrics(folder)}
    for event in events.Scalars("loss/train"):
        assert event.value == pytest.approx(by_step[event.step]["loss"], rel=1e-6)
    assert {event.value for event in events.Scalars("multiplier/q")} == {8.0}


def test_tensorboard_is_on_where_it_is_installed(data, tmp_path, monkeypatch) -> None:
    own = given(data)
    del own["log"]["tensorboard"]
    own |= {"schedule": {"steps": 1, "warmup": 0}}
    run(own, tmp_path / "with")
    assert (tmp_path / "with" / "tensorboard").exists() == (importlib.util.find_spec("tensorboard") is not None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run(own, tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_tensorboard_is_missing(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tracking, "has_tensorboard", lambda: False)
    with pytest.raises(
        ImportError, match=r"log\.tensorboard = true, and tensorboard is not installed: .* -m pip install"
    ):
        run(given(data, tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- Weights & Biases ------------------------------------------------------------------------------------------------


class Fake(types.ModuleType):
    """What of wandb is used; every call is noted down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []

    def init(self, **arguments: Any) -> "Fake":
        self.calls.append(("init", arguments))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_run_of_wandb(data, tmp_path, wandb) -> None:
    folder = tmp_path / "my-run"
    with pytest.raises(KeyboardInterrupt):
        run(given(data, wandb="project"), folder, on_step=interrupt(11))
    assert wandb.calls[-1] == ("finish", None)
    first = len(wandb.calls)
    run(given(data, wandb="project"), folder)
    for what, arguments in (wandb.calls[0], wandb.calls[first]):
        assert what == "init"
        config = arguments.pop("config")
        assert config["schedule"]["steps"] == STEPS
        json.dumps(config)
        assert arguments == {
            "project": "project",
            "name": "my-run",
            "id": "my-run",
            "resume": "allow",
            "dir": str(folder),
        }
    steps = [
        [values[0] for what, values in part if what == "log"] for part in (wandb.calls[:first], wandb.calls[first:])
    ]
    assert steps == [[1, 2, 4, 5, 6, 10], [10, 12, 15, 18, 20, 24]]
    by_step = {line["step"]: line for line in metrics(folder)}
    for what, values in wandb.calls:
        if what == "log":
            assert values[1]["loss/train"] == by_step[values[0]]["loss"]
    assert [what for what, _ in wandb.calls].count("finish") == 2


def test_a_relative_folder_has_a_name(data, tmp_path, wandb, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(given(data, wandb="project") | {"schedule": {"steps": 1, "warmup": 0}}, Path())
    assert wandb.calls[0][1]["name"] == "here"


def test_wandb_can_be_asked_for_later(data, tmp_path, wandb) -> None:
    own = given(data)
    run(own, tmp_path / "run", should_stop=lambda: True)
    assert not wandb.calls
    run(given(data, wandb="project"), tmp_path / "run")
    assert wandb.calls[0][0] == "init"


def test_wandb_is_missing(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ImportError, match=r"log\.wandb = 'project', and wandb is not installed: .* -m pip install wandb"
    ):
        run(given(data, wandb="project"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wandb_refuses(data, tmp_path, wandb, monkeypatch) -> None:
    class UsageError(Exception):
        pass

    def refuse(**arguments: Any) -> None:
        raise UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"log\.wandb = 'project': UsageError: api_key not configured"):
        run(given(data, wandb="project"), tmp_path / "run")


@pytest.mark.parametrize("part", ["log", "finish"])
def test_the_run_is_whole_where_wandb_fails_on_the_way(data, tmp_path, wandb, monkeypatch, part) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, part, fail)
        with pytest.raises(ConnectionError):
            run(given(data, wandb="project"), tmp_path / "run")
    run(given(data, wandb="project"), tmp_path / "run")
    run(given(data), tmp_path / "reference")
    mine, other = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("run", "reference"))
    assert mine == other
