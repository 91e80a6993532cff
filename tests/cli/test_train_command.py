"""`sharpwise train` from its options to its files: what it prints, and how it ends."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from sharpwise.cli.main import create_app
from sharpwise.cli.train import View
from sharpwise.train import run as run_module
from sharpwise.train.config_file import read_given
from sharpwise.train.data import prepare_tokens

MODEL = """
import os, time, math, torch
from torch import nn
class Bigram(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, tokens):
        time.sleep(float(os.environ.get("SLOW", 0)) * self.training)
        self.calls += self.training and torch.is_grad_enabled()
        bad = self.calls == float(os.environ.get("BAD_AT", -1))
        return self.table(tokens) * torch.where(bad, math.nan, 1.0)
"""

CONFIG = """
[model]
name = "bigram:Bigram"
[data]
path = "data/tokens"
context = 16
[batch]
sequences = 2
[optimizer]
name = "lion"
cut = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    text = "The fox {} jumps over {} dogs; who saw it? Fox {}.\n"
    documents = [text.format(i, i * 7, i * i) * 20 for i in range(40)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    prepare_tokens([folder / "text.txt"], folder / "tokens", vocabulary=300, validation=0.1)
    return folder


@pytest.fixture
def here(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with tokens in data/tokens, a model in bigram.py and a configuration c.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokens").symlink_to(place / "tokens")
    (tmp_path / "bigram.py").write_text(MODEL)
    (tmp_path / "c.toml").write_text(CONFIG.replace("cut = 1\n", ""))
    monkeypatch.setenv("COLUMNS", "60")  # narrower than most lines
    monkeypatch.delitem(sys.modules, "bigram", raising=False)
    return tmp_path


QUICK = (
    *("--set", "compute.threads=1", "--set", "compute.precision=fp32", "--set", "log.tensorboard=false"),
    *("--set", "validation.sequences=4", "--set", "schedule.warmup=1"),
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(create_app(), ["train", *map(str, arguments)])


def own(*arguments: object) -> Result:
    """With the model and the data of these tests."""
    return call("--model", "bigram:Bigram", "--data", "data/tokens", "-s", "data.context=16", *QUICK, *arguments)


def stored(folder: Path) -> dict[str, Any]:
    return read_given(folder / "config.toml")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and ".pyc" not in p.name
    }


# --- what is trained, and where --------------------------------------------------------------------------------------


def test_settings_come_from_the_file_then_options_then_set(here: Path) -> None:
    (here / "c.toml").write_text(CONFIG.replace("cut = 1", "lr = 1.0\n[schedule]\nsteps = 9"))
    result = call(
        "c.toml", "--trust-code", *QUICK, "--lr", "0.5", "--steps", "4", "--set", "schedule.steps=3", "-s", "seed=8"
    )
    assert result.exit_code == 0, result.output
    found = stored(here / "runs" / "c")  # named after the file
    assert found["optimizer"]["name"] == "lion"
    assert found["optimizer"]["lr"] == 0.5
    assert found["schedule"]["steps"] == 3
    assert found["seed"] == 8


def test_every_option_arrives(here: Path) -> None:
    result = own("--optimizer", "sgd", "--lr", "0.25", "--steps", "2", "-s", "optimizer.momentum=0.5", "-o", "a b/c")
    assert result.exit_code == 0, result.output
    found = stored(here / "a b" / "c")
    assert (found["model"]["name"], found["data"]["path"]) == ("bigram:Bigram", "data/tokens")
    assert (found["optimizer"]["name"], found["optimizer"]["lr"], found["schedule"]["steps"]) == ("sgd", 0.25, 2)
    assert found["optimizer"]["momentum"] == 0.5


def test_names_of_folders(here: Path) -> None:
    assert own("--steps", "1").exit_code == 0
    assert own("--steps", "1", "--optimizer", "sgd").exit_code == 0
    (here / "sub").mkdir()
    assert [p.name for p in sorted((here / "runs").iterdir())] == ["bigram_Bigram-adamw", "bigram_Bigram-sgd"]
    result = own("--init-from", "weights/of mine", "--steps", "1")
    assert "weights/of mine: no such folder" in result.stderr


@pytest.mark.parametrize("name", ["data/to'ke\"ns", "data\\new", "data/[/b]", "données"])
def test_paths_of_any_kind(here: Path, name: str) -> None:
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).symlink_to((here / "data" / "tokens").resolve())
    out = f"runs/[/x] {Path(name).name}"
    result = own("--data", name, "--steps", "1", "--out", out)
    assert result.exit_code == 0, result.output
    assert stored(here / out)["data"]["path"] == name
    assert f"model: {out}/final\n" in result.stdout
    assert call(out).exit_code == 0
    assert call(out, "--profile", "1").exit_code == 2  # too short, and no error of the terminal


# --- what is said ----------------------------------------------------------------------------------------------------


def test_what_is_said_and_where(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # the bar is cut where there is no room for it
    result = own("--steps", "3")
    assert result.exit_code == 0
    out, err = result.stdout, result.stderr
    assert out.startswith("3 steps done. Validation loss ")
    assert out.count("nats per token.") == 1
    assert re.search(r"\nA text that the model wrote; it was given what stands before >>>:\n(.*\n)*.* >>> ", out)
    assert out.endswith("model: runs/bigram_Bigram-adamw/final\npage: runs/bigram_Bigram-adamw/index.html\n")
    assert "bigram:Bigram: 90,000 parameters, 0 without embeddings\n" in err
    assert "data/tokens: " in err
    assert "sharpwise.create_optimizer(model, 'adamw', lr=0.001, " in err
    assert "3 steps of 256 tokens, cosine schedule, fp32 on cpu\n" in err
    assert "into runs/bigram_Bigram-adamw\n" in err
    assert "3/3" in err  # of the bar
    assert "parameters" not in out
    assert "\x1b" not in out + err  # no colours into a file


def test_a_processor_that_emulates_bf16_is_named_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    said = own("--steps", "1", "--set", "compute.precision=bf16-autocast").stderr
    lines = [line for line in said.splitlines() if line.startswith("Slow: ")]
    assert len(lines) == 1 and lines[0].endswith("--set compute.precision=fp32")
    assert said.index("bf16-autocast on cpu") < said.index("Slow: ") < said.index("1/1")
    assert "Slow: " not in own("--steps", "2", "--out", "fp32").stderr


def test_a_finished_run_says_so(here: Path) -> None:
    assert own("--steps", "3").exit_code == 0
    before = {name: data for name, data in tree(here / "runs").items() if "index.html" not in name}
    folder = "runs/bigram_Bigram-adamw"
    for again in (own("--steps", "3"), call(folder), call("--out", folder), call(folder, "--out", folder)):
        assert again.exit_code == 0
        assert again.stdout.startswith("It had finished already. Validation loss ")
        assert again.stderr.strip() == ""
    assert {name: data for name, data in tree(here / "runs").items() if "index.html" not in name} == before


def test_a_terminal_is_told_nothing_that_it_would_act_on(here: Path) -> None:
    assert own("--steps", "1").exit_code == 0
    sample = here / "runs" / "bigram_Bigram-adamw" / "sample.txt"
    sample.write_text("a \x1b[31m >>> [bold]b\x07\n")
    assert "a �[31m >>> [bold]b" in call("runs/bigram_Bigram-adamw").stdout


def test_a_damaged_checkpoint_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 4)
    own("--steps", "6", "-s", "checkpoint.every=2")
    folder = here / "runs" / "bigram_Bigram-adamw"
    (folder / "checkpoints" / "step-00000004" / "state.pt").write_bytes(b"")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    result = call(folder, "--trust-code")
    assert result.exit_code == 0
    said = " ".join(result.stderr.split())
    assert "WARNING" in said
    assert "step-00000004 is passed over: state.pt has 0 bytes instead of" in said.replace("- ", "-")
    assert "going on after step 2" in said
    assert not logging.getLogger("sharpwise").handlers


# --- stopping and going on -------------------------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As Ctrl-C, at a certain step."""
    real = View.step

    def after(self: View, done: Any) -> None:
        real(self, done)
        if done.step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(View, "step", after)


@pytest.mark.parametrize("again", ["run", "out", "command"])
def test_going_on(here: Path, monkeypatch: pytest.MonkeyPatch, again: str) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        result = own("--steps", "6", "--out", "r/my run")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert result.exit_code == 130
    assert result.stdout == "Saved after step 3 of 6. To go on: sharpwise train 'r/my run' --trust-code\n"
    assert (here / "r" / "my run" / "index.html").exists()
    result = {
        "run": lambda: call("r/my run", "--trust-code"),
        "out": lambda: call("--out", "r/my run", "--trust-code"),
        "command": lambda: own("--steps", "6", "--out", "r/my run"),
    }[again]()
    assert result.exit_code == 0, result.output
    assert "going on after step 3\n" in result.stderr
    assert own("--steps", "6", "--out", "reference").exit_code == 0
    for name in ("metrics.jsonl", "sample.txt", "final/model.safetensors"):
        assert (here / "r" / "my run" / name).read_bytes() == (here / "reference" / name).read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_processes_that_are_told_to_end(here: Path) -> None:
    arguments = [*("--model", "bigram:Bigram", "--data", "data/tokens", "-s", "data.context=16", *QUICK)]
    arguments += ["--steps", "120", "-s", "checkpoint.every=0", "-s", "log.diagnostics=0"]
    environment = {**os.environ, "SLOW": "0.03", "OMP_NUM_THREADS": "1"}
    processes = {
        number: subprocess.Popen(
            [sys.executable, "-m", "sharpwise", "train", *arguments, "--out", number.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    assert call(*arguments, "--out", "reference").exit_code == 0
    for number, process in processes.items():
        metrics, until = here / number.name / "metrics.jsonl", time.monotonic() + 60
        while time.monotonic() < until and process.poll() is None:
            if metrics.exists() and metrics.stat().st_size > 300:
                break
            time.sleep(0.02)
        process.send_signal(number)
    for number, process in processes.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        folder = here / number.name
        step = json.loads((folder / "status.json").read_text())["step"]
        assert 0 < step < 120
        assert out == f"Saved after step {step} of 120. To go on: sharpwise train {number.name} --trust-code\n"
        assert "Traceback" not in err
        assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{step:08d}"]
        assert call(number.name, "--trust-code").exit_code == 0
        assert (folder / "metrics.jsonl").read_bytes() == (here / "reference" / "metrics.jsonl").read_bytes()


def test_a_run_that_diverges(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAD_AT", "4")
    result = own("--steps", "6", "-s", "checkpoint.every=1")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "error: step 4: the loss is not finite (loss nan, gradient norm nan, lr " in result.stderr
    assert "begin at train-00000.bin:" in result.stderr
    assert "Last good checkpoint: runs/bigram_Bigram-adamw/checkpoints/step-00000003." in result.stderr
    assert "Traceback" not in result.stderr
    result = call("runs/bigram_Bigram-adamw", "--trust-code", "--set", "optimizer.on_nonfinite=skip")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (here / "runs/bigram_Bigram-adamw/metrics.jsonl").read_text().splitlines()]
    assert [(line["loss"] is None, line.get("skipped", False)) for line in lines] == [
        (i == 3, i == 3) for i in range(6)
    ]


def test_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(run_module, "save_final", full)
    result = own("--steps", "2")
    assert result.exit_code == 2
    assert "the disk is full (runs/bigram_Bigram-adamw); make room and start the run again" in result.stderr
    assert result.stdout == ""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert own("--steps", "2").exit_code == 0


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "gpt2-tinny"], "error: unknown model 'gpt2-tinny' (did you mean 'gpt2-tiny'?)"),
        (["-m", "nothing:here"], "nothing:here: no module 'nothing' here or among the installed ones"),
        (["-m", "bigram:Bigrm"], "module 'bigram' has no 'Bigrm'"),
        (["-m", "c.toml"], "c.toml: not JSON"),
        (["-d", "data/token"], "no such folder: data/token; make it with: sharpwise prepare --out data/token (did you"),
        (["-d", "data"], "data has no manifest.json"),
        (["-m", "gpt2-tiny", "-s", "data.context=129"], "data.context=129 is longer than the model's 128 positions"),
        (["-m", "gpt2-tiny", "-s", "model.settings.vocab_size=299"], "the model has a vocabulary of 299"),
        (["-s", "data.context=99999999"], "tokens, and a context of 99999999 needs"),
        (["-s", "schedule.tokens=0"], "error: schedule.tokens must be at least 1, got 0"),
        (["-s", "schedule.tokens=5"], "schedule.tokens=5 is less than one step of"),
        (["--steps", "0"], "error: schedule.steps must be at least 1, got 0"),
        (["-s", "batch.sequences=6", "-s", "batch.micro=4"], "batch.micro=4 does not divide batch.sequences=6; divis"),
        (["--optimizer", "adamww"], "no optimizer is called 'adamww' (did you mean 'adamw'?)"),
        (["--lr", "nan"], "error: optimizer.lr must be at least 0.0, got nan"),
        (["-s", "optimizer.lr"], "error: --set 'optimizer.lr': expected a.b=value"),
        (["-s", "model=3"], "error: model: expected a table [model], got 3"),
        (["-s", "optimizer=3"], "error: optimizer: expected a table [optimizer], got 3"),
        (["-s", "optimizer.betas=0.9"], "error: the optimizer cannot be built: "),
        (["-s", "sed=3"], "error: no setting is called 'sed' (did you mean 'seed'?)"),
        (["-s", "compute.device=gpu"], "error: compute.device: got 'gpu', expected cpu, cuda or cuda:N"),
        (["--init-from", "nowhere"], "error: nowhere: no such folder"),
        (["nowhere.toml"], "error: cannot read the configuration nowhere.toml: No such file or directory"),
        (["bigram.py"], "error: bigram.py is not a TOML file"),
        (["data"], "error: cannot read the configuration data/config.toml: No such file or directory"),
        (["--out", "c.toml"], "error: c.toml is a file; name another folder for the run"),
        (["--out", "data"], "error: data holds something else than a run; name an empty or new folder"),
        (["--out", "c.toml/x"], "c.toml/x"),
        (["--profile", "3", "-d", "nowhere"], "error: no such folder: nowhere"),
        (["--profile", "3", "--steps", "6"], "error: the run has 6 steps; a profile of 3 needs 11"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(here: Path, arguments: list[str], message: str) -> None:
    before = tree(here), sorted(here.rglob("*"))
    result = own(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    after = sorted(path for path in here.rglob("*") if "__pycache__" not in str(path))
    assert (tree(here), after) == before


def test_a_run_of_nothing_at_all(here: Path) -> None:
    """Without any argument, where the standard library was not prepared."""
    result = call()
    assert result.exit_code == 2
    assert "error: no such folder: data/stdlib; make it with: sharpwise prepare --out data/stdlib" in result.stderr
    assert not (here / "runs").exists()


def test_another_configuration_is_refused_and_changes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        own("--steps", "5")
    before = tree(here)
    result = own("--steps", "6", "--lr", "0.5")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: runs/bigram_Bigram-adamw holds a run with another configuration:\n"
        "  optimizer.lr: the run has 0.001, now it is 0.5\n"
        "  schedule.steps: the run has 5, now it is 6\n"
        "Name another folder with --out, or leave out what differs to go on with that run\n"
    )
    result = call("runs/bigram_Bigram-adamw", "--out", "elsewhere")
    assert "error: the run in runs/bigram_Bigram-adamw goes on there; leave out --out elsewhere" in result.stderr
    assert tree(here) == before


# --- --profile -------------------------------------------------------------------------------------------------------


def test_a_profile_of_what_would_be_trained(here: Path) -> None:
    before = tree(here)
    result = own("--profile", "2")
    assert result.exit_code == 0, result.output
    assert " ms a step, " in result.stdout
    assert "(median of 2 steps)" in " ".join(result.stdout.split())
    for name in ("part of a step", "data", "forward", "backward", "optimizer", "the rest", "operation", "aten::"):
        assert name in result.stdout
    assert tree(here) == before
    assert not (here / "runs").exists()


def test_a_profile_of_a_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        own("--steps", "50")
    before = tree(here)
    assert "tokens/s" in call("runs/bigram_Bigram-adamw", "--trust-code", "--profile", "1").stdout
    assert "tokens/s" in call("--out", "runs/bigram_Bigram-adamw", "--trust-code", "--profile", "1").stdout
    assert tree(here) == before
