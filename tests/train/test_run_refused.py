"""Runs that are refused: another configuration, other tokens, a folder that is taken, what cannot be built."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sharpwise.train.folder import RunFolder
from sharpwise.train.run import run
from train.kill_rig import settings
from train.run_rig import ADAMW, changed, content, prepare, stop_after


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def given(data: Path) -> dict[str, Any]:
    return settings(data, ADAMW)


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
            run(again, folder, trust_code=True)
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


@pytest.mark.skipif(sys.platform != "linux", reason="folders of any bytes")
def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_first_step(given, tmp_path, monkeypatch) -> None:
    foreign = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match=r"/caf\\xe9/run: the name is not UTF-8, and models .* name another folder"):
        run(given, foreign / "run", on_step=pytest.fail)
    assert not foreign.exists()
    foreign.mkdir()
    monkeypatch.chdir(foreign)  # where its name is not part of the folder's, all is as anywhere
    assert run(given, Path("run")).state == "finished"
    assert (foreign / "run" / "final" / "tokenizer.json").exists()


def test_a_folder_is_free_again(tmp_path) -> None:
    place = RunFolder(tmp_path / "run")
    place.write_json("facts.json", {})
    place.close()
    RunFolder(tmp_path / "run").close()
    assert sorted(os.listdir(tmp_path / "run")) == ["facts.json", "run.lock"]
