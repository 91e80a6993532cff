"""Runs in their folders: begun, stopped, gone on with, finished, and refused."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sharpwise.train.config_file import make_config, read_given
from sharpwise.train.data import prepare_tokens
from sharpwise.train.folder import RunFolder
from sharpwise.train.run import run
from train.kill_rig import STEPS, assert_same_run, settings

ADAMW = {"name": "adamw", "block_lr": "blockwise"}


def prepare(folder: Path, text: str = "The fox {} jumps over {} dogs; who saw it? Fox {}.\n") -> Path:
    source = folder / "text.txt"
    source.write_text("\n<|endoftext|>\n".join(text.format(i, i * 7, i * i) * 20 for i in range(40)))
    prepare_tokens([source], folder / "tokens", vocabulary=300, validation=0.1)
    return folder / "tokens"


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


def changed(given: dict[str, Any], **tables: dict[str, Any]) -> dict[str, Any]:
    """The configuration with some keys of some tables replaced."""
    return given | {name: {**given.get(name, {}), **values} for name, values in tables.items()}


def stop_after(step: int) -> dict[str, Any]:
    """Arguments of `run` that end it after a step."""
    at: list[int] = []
    return {"on_step": lambda done: at.append(done.step), "should_stop": lambda: at[-1] == step}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / name).read_text().splitlines()]


def assert_same(folder: Path, reference: Path) -> None:
    """Metrics, weights and text; not the checkpoints, of which a stop makes one more."""
    mine, other = content(folder), content(reference)
    for name in ("metrics.jsonl", "sample.txt", "final/model.safetensors", "blocks.json", "facts.json"):
        assert mine[name] == other[name], name
    assert [line["step"] for line in lines(folder, "timing.jsonl")] == [line["step"] for line in lines(reference)]


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
    assert [line["step"] for line in metrics if "update_rms" in line] == [6, 12, 18, 24]
    assert all(line.keys() >= {"loss", "lr", "grad_norm"} and "skipped" not in line for line in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.2
    [start] = json.loads((reference / "environment.json").read_text())
    assert (start["step"], start["threads"], start["device"]) == (1, 1, "cpu")
    assert (start["torch"], start["matrix_products"]) == (torch.__version__, "fp32")
    facts = json.loads((reference / "facts.json").read_text())
    assert (facts["steps"], facts["tokens_per_step"], facts["context"]) == (STEPS, 64, 16)
    assert facts["optimizer"].startswith("sharpwise.create_optimizer(model, 'adamw', lr=0.003, ")
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
    assert run(None, tmp_path / "run").state == "finished"
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


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_configuration_is_refused_with_the_difference(given, tmp_path) -> None:
    folder = tmp_path / "run"
    run(given, folder, **stop_after(3))
    before, times = content(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    other = changed(given, optimizer={"lr": 0.1}, batch={"micro": 4}, model={"settings": {"vocab_size": 400}})
    with pytest.raises(ValueError, match="holds a run with another configuration") as raised:
        run(other, folder)
    said = str(raised.value)
    assert "  batch.micro: the run has 2, now it is 4\n" in said
    assert "  model.settings.vocab_size: the run has nothing, now it is 400\n" in said
    assert "  optimizer.lr: the run has 0.003, now it is 0.1\n" in said
    assert said.endswith("Name another folder with --out, or leave out what differs to go on with that run")
    assert content(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_a_run_that_failed_before_its_first_step_takes_another_configuration(given, tmp_path) -> None:
    def fail(start: Any) -> None:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        run(given, tmp_path / "run", on_start=fail)
    assert (tmp_path / "run" / "config.toml").exists()
    assert run(changed(given, batch={"micro": 1}), tmp_path / "run").state == "finished"
    assert RunFolder(tmp_path / "run").read_config().batch.micro == 1  # type: ignore[union-attr]


def test_other_text_under_the_same_name_is_refused(tmp_path) -> None:
    data = prepare(tmp_path)
    given = settings(data, ADAMW)
    folder = tmp_path / "run"
    run(given, folder, **stop_after(3))
    shutil.rmtree(data)
    assert prepare(tmp_path, "Quite {} another {} text than {} before.\n") == data
    before = content(folder)
    for again in (given, None):
        with pytest.raises(ValueError, match=r"are not those that the run began with \(data\.sha256\)"):
            run(again, folder)
    assert content(folder) == before
    shutil.rmtree(data)
    prepare(tmp_path)  # as it was
    assert run(given, folder).state == "finished"


def test_two_at_once(given, tmp_path) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    refused: list[str] = []

    def second(done: Any) -> None:
        if done.step == 3:
            before = content(folder)
            for again in (given, None):
                with pytest.raises(ValueError, match="another process is training") as raised:
                    run(again, folder)
                refused.append(str(raised.value))
            assert content(folder) == before

    run(changed(given, checkpoint={"asynchronous": False}), folder, on_step=second)
    assert refused == [f"another process is training in {folder}; wait for it or name another folder"] * 2


def test_nothing_to_go_on_with(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no run to go on with; say what to train"):
        run(None, tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("data", {"path": "nowhere"}, "no such folder: nowhere"),
        ("data", {"context": 200}, r"context=200 is longer than the model's 128 positions; take at most 128"),
        ("model", {"name": "gpt2-tinny"}, r"unknown model 'gpt2-tinny' \(did you mean 'gpt2-tiny'\?\)"),
        ("model", {"settings": {"vocab_size": 299}}, r"a vocabulary of 299, and the tokens in .* have one of 300"),
        ("model", {"settings": {"n_layers": 2}}, r"no field 'n_layers' \(did you mean 'n_layer'\?\)"),
        ("model", {"init_from": "nowhere"}, "nowhere: no such folder"),
        ("schedule", {"steps": None, "tokens": 10}, "schedule.tokens=10 is less than one step of 64 tokens"),
        ("schedule", {"steps": 7, "tokens": 640}, "the budget is given twice and differs"),
        ("schedule", {"warmup": 100}, "need 0 <= warmup <= total"),
        ("schedule", {"kind": "cosin"}, r"no schedule is called 'cosin' \(did you mean 'cosine'\?\)"),
        ("schedule", {"floor": 1.5}, "0 <= floor <= 1, got 1.5"),
        ("schedule", {"kind": "wsd", "decay": 30}, "warmup \\+ decay <= total"),
        ("optimizer", {"betas": 0.9}, "the optimizer cannot be built: "),
        ("optimizer", {"betas": [0.9, 1.5]}, "1.5"),
        ("optimizer", {"weight_decay": "much"}, "the optimizer cannot be built: .*weight_decay"),
        ("optimizer", {"storage": "fp8"}, "no storage is called 'fp8'"),
        ("optimizer", {"block_lr": {"name": "blockwise", "embb": 3.0}}, "optimizer.block_lr: .*embb"),
        ("optimizer", {"block_lr": {"name": "blockwise", "emb": "x"}}, "optimizer.block_lr: "),
        ("optimizer", {"no_decay": ["nrm"]}, "nrm"),
        ("compute", {"device": "gpu"}, "compute.device: got 'gpu', expected cpu, cuda or cuda:N"),
        ("compute", {"device": "mps"}, "compute.device: 'mps' is not there; this machine has cpu"),
        ("compute", {"device": "cuda:99"}, "compute.device: 'cuda:99' is not there; this machine has cpu"),
    ],
)
def test_what_cannot_be_run_leaves_nothing_behind(given, tmp_path, table, values, message) -> None:
    own = changed(given, model={"name": "gpt2-tiny"})
    own = changed(own, **{table: values})
    own[table] = {key: value for key, value in own[table].items() if value is not None}
    with pytest.raises(ValueError, match=message):
        run(own, tmp_path / "some" / "run")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_stays_empty_where_nothing_can_be_run(given, tmp_path) -> None:
    with pytest.raises(ValueError, match="no such folder: nowhere"):
        run(changed(given, data={"path": "nowhere"}), tmp_path)
    assert tmp_path.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_tokens_that_is_nearly_called_so(given, data, tmp_path, monkeypatch) -> None:
    misspelt = data.parent / "tokns"
    with pytest.raises(ValueError, match=rf"no such folder: {misspelt}.*did you mean '{data}'\?"):
        run(changed(given, data={"path": str(misspelt)}), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "minipile").symlink_to(data)
    with pytest.raises(ValueError, match=r"did you mean 'data/minipile'\?"):
        run(changed(given, data={"path": "minipil"}), tmp_path / "run")


def test_the_folder_is_a_file_or_holds_something_else(given, tmp_path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file; name another folder for the run"):
        run(given, file)
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a run; name an empty or new folder"):
        run(given, site)
    assert content(tmp_path) == {"file": b"mine", "site/index.html": b"mine"}
    with pytest.raises(OSError, match="file"):
        run(given, file / "below")


def test_a_configuration_that_was_damaged(given, tmp_path) -> None:
    folder = tmp_path / "run"
    run(given, folder, **stop_after(2))
    (folder / "config.toml").write_text("seed = ")
    before = content(folder)
    for again in (given, None):
        with pytest.raises(ValueError, match=r"config\.toml cannot be used: .* is not a TOML file"):
            run(again, folder)
    assert content(folder) == before


def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> str:
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return f"{name}:make"


BIGRAM = """
import torch
from torch import nn
class Bigram(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.table = nn.Embedding(rows, columns)
    def forward(self, tokens):
        assert tokens.shape[1] <= 64, "too long"
        return self.table(tokens)
"""


@pytest.mark.parametrize(
    ("code", "context", "message"),
    [
        ("def make(): return Bigram(200, 200)", 16, "fails on a window of 16 tokens, the highest of which is 299: Ind"),
        ("def make(vocab_size): return Bigram(vocab_size, 200)", 16, "gives logits for 200 tokens, and .* of 300"),
        (
            "def make(vocab_size): return Bigram(vocab_size, 300)",
            65,
            "a window of 65 tokens, .* AssertionError: too lo",
        ),
        ("def make(vocab_size): return nn.Embedding(300, 300, dtype=torch.int64)", 16, "the function raised"),
        ("def make(vocab_size): return nn.Flatten()", 16, "the model returned int64 values, expected logits"),
        ("def make(vocab_size): return nn.Linear(3, 3)", 16, "the model fails on a window of 16 tokens"),
    ],
)
def test_a_function_whose_model_does_not_fit(given, tmp_path, monkeypatch, code, context, message) -> None:
    name = function(tmp_path, monkeypatch, f"{BIGRAM}\n{code}\n")
    with pytest.raises(ValueError, match=message):
        run(changed(given, model={"name": name}, data={"context": context}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_whose_code_was_changed(given, tmp_path, monkeypatch) -> None:
    code = BIGRAM + "def make(vocab_size): return Bigram(vocab_size, {})\n"
    name = function(tmp_path, monkeypatch, code.format(300))
    own = changed(given, model={"name": name}, optimizer={"block_lr": ""})
    run(own, tmp_path / "run", **stop_after(3))
    function(tmp_path, monkeypatch, code.format(301) + "# longer, so that it is compiled anew")
    with pytest.raises(ValueError, match=r"step-00000003 does not fit the model as it is now; was the code changed"):
        run(own, tmp_path / "run")


def test_a_folder_is_free_again(tmp_path) -> None:
    place = RunFolder(tmp_path / "run")
    place.write_json("facts.json", {})
    place.close()
    RunFolder(tmp_path / "run").close()
    assert sorted(os.listdir(tmp_path / "run")) == ["facts.json", "run.lock"]
