"""What a file says to run is run only when it was confirmed: the planted code of these tests leaves a mark."""

import builtins
import json
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sharpwise.cli.main import create_app
from sharpwise.compare.stored import open_study
from sharpwise.measure.subject import open_subject
from sharpwise.train.data import prepare_tokens
from sharpwise.train.data.tokenizer import load_tokenizer
from sharpwise.train.models import load_model, load_pretrained
from sharpwise.train.run import run

PLANTED = """
from pathlib import Path
Path("ran").touch()
def build(**settings):
    raise ValueError(f"ran with {settings}")
"""
MODEL = '[model]\nname = "planted.inner:build"\n[model.settings]\nwidth = 7\n'
DATA = '[data]\npath = "tokens"\n'
OPTIMIZER = '[optimizer]\nname = "planted.inner:build"\nlr = 0.1\nwidth = 7\n'
STUDY = (
    f'arms = ["adamw", "lion"]\ntokens = 10000\n{MODEL.replace("[model", "[run.model")}[run.data]\npath = "tokens"\n'
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = [f"The fox {i} jumps over {i * 7} dogs; who saw it? Fox {i * i}.\n" * 20 for i in range(40)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(text))
    prepare_tokens([folder / "text.txt"], folder / "tokens", vocabulary=300, validation=0.1)
    return folder / "tokens"


@pytest.fixture
def here(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with somebody else's package, run, study and files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokens").symlink_to(tokens)
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    (tmp_path / "planted" / "inner.py").write_text(PLANTED)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(MODEL + DATA)
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "study.toml").write_text(STUDY)
    (tmp_path / "given.toml").write_text(MODEL + DATA)
    (tmp_path / "compared.toml").write_text(STUDY)
    for name in ("planted", "planted.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(create_app(), list(arguments))


COMMANDS = [
    ("run/config.toml", ["train", "run"]),
    ("run/config.toml", ["train", "--out", "run", "--profile", "1"]),
    ("run/config.toml", ["train", "run", "--set", "checkpoint.keep=3"]),
    ("run/config.toml", ["train", "run/config.toml", "--out", "mine"]),
    ("run/config.toml", ["measure", "spectrum", "run"]),
    ("run/config.toml", ["measure", "sharpness", "run"]),
    ("run/config.toml", ["measure", "hessian", "run"]),
    ("run/config.toml", ["measure", "updates", "run"]),
    ("study/study.toml", ["compare", "--out", "study"]),
    ("study/study.toml", ["compare", "--out", "study", "--jobs", "1"]),
    ("compared.toml", ["compare", "compared.toml", "--seeds", "2"]),
]


@pytest.mark.parametrize(("source", "command"), COMMANDS, ids=[" ".join(command) for _, command in COMMANDS])
def test_a_function_that_a_file_names_has_to_be_confirmed(here: Path, source: str, command: list[str]) -> None:
    result = call(*command)
    assert result.exit_code == 2, result.output
    assert not (here / "ran").exists()
    assert "planted" not in sys.modules
    said = result.stderr.replace(str(here) + "/", "")
    assert said.startswith(f"error: {source} has its model built by a function: ")
    assert "would import planted.inner (planted/inner.py) and call build(width=7)" in said
    assert "--trust-code" in said

    result = call(*command, "--trust-code")
    assert (here / "ran").exists(), result.output
    assert "ran with {" in result.stderr and "'width': 7" in result.stderr


def _with_optimizer(here: Path) -> None:
    """The files name a model that runs no code, and a class for the optimizer."""
    text = f'[model]\nname = "gpt2-tiny"\n{OPTIMIZER}{DATA}'
    for name in ("run/config.toml", "given.toml"):
        (here / name).write_text(text)
    arms = '[arms.adamw]\n[arms.mine]\nname = "planted.inner:build"\nsettings = {"optimizer.width" = 7}\n'
    study = f'tokens = 100000\n{arms}[run.model]\nname = "gpt2-tiny"\n[run.data]\npath = "tokens"\n'
    for name in ("study/study.toml", "compared.toml"):
        (here / name).write_text(study)


@pytest.mark.parametrize(("source", "command"), COMMANDS, ids=[" ".join(command) for _, command in COMMANDS])
def test_a_class_that_a_file_names_has_to_be_confirmed(here: Path, source: str, command: list[str]) -> None:
    _with_optimizer(here)
    result = call(*command)
    assert result.exit_code == 2, result.output
    assert not (here / "ran").exists() and "planted" not in sys.modules
    said = result.stderr.replace(str(here) + "/", "")
    assert said.startswith(f"error: {source} has a class for its optimizer: ")
    assert "would import planted.inner (planted/inner.py) and call build(lr=" in said and ", width=7), which" in said
    assert "--trust-code" in said

    result = call(*command, "--trust-code")
    assert (here / "ran").exists(), result.output
    assert "planted.inner:build is the function build, expected a class derived from torch.optim" in result.stderr


def test_a_class_that_was_typed_is_imported_and_not_that_of_the_file(here: Path) -> None:
    _with_optimizer(here)
    (here / "other.py").write_text("class Own: ...\n")
    typed = ["--set", "optimizer.name=other:Own"]
    for command in (["train", "given.toml"], ["train", "run"], ["train", "run/config.toml", "--out", "x"]):
        assert "other:Own is the class Own, expected a class" in call(*command, *typed).stderr
    result = call("compare", "adamw", "other:Own", "--budget", "1M", "--model", "gpt2-tiny", "--data", "tokens")
    assert "arm 'other:Own' cannot be built: other:Own is the class Own, expected" in result.stderr
    assert not (here / "ran").exists()
    (here / "run" / "config.toml").write_text(f"{MODEL}{OPTIMIZER}{DATA}")
    said = call("train", "run", *typed).stderr
    assert "has its model built by a function: it would import planted.inner" in said and "other" not in said
    said = call("train", "run").stderr
    assert "has its model built by a function, and a class for its optimizer: it would import planted.inner" in said
    assert said.count("and call build(") == 2
    assert not (here / "ran").exists()


def test_a_function_that_was_typed_runs(here: Path) -> None:
    """And not the one in the file."""
    (here / "mine.py").write_text("def build(width):\n    raise ValueError(f'mine, with {width}')\n")
    for command in (
        ["train", "given.toml"],
        ["compare", "compared.toml"],
        ["train", "--set", "model.settings.width=7"],
    ):
        result = call(*command, "--model", "mine:build", "--data", "tokens")
        assert "mine, with 7" in result.stderr
    assert not (here / "ran").exists()


def test_a_configuration_that_is_given_to_train_runs(here: Path) -> None:
    """It is what the user asks for, as a script would be."""
    result = call("train", "given.toml", "--lr", "1")
    assert (here / "ran").exists(), result.output
    assert "'width': 7" in result.stderr


def test_the_same_in_python(here: Path) -> None:
    for start in (
        lambda **trust: run(None, Path("run"), **trust),
        lambda **trust: open_subject(Path("run"), **trust),
        lambda **trust: open_study(None, Path("study"), **trust),
    ):
        with pytest.raises(ValueError, match=r"would import planted\.inner .* trust_code=True"):
            start()
        assert not (here / "ran").exists()
    with pytest.raises(ValueError, match=r"ran with \{.*'width': 7"):
        run(None, Path("run"), trust_code=True)


@pytest.mark.parametrize("name", ["os:getcwd", "nowhere:f", "planted.nowhere:f", "planted.inner.f:f", "sys:exit"])
def test_functions_of_any_module(here: Path, name: str) -> None:
    (here / "run" / "config.toml").write_text(f'[model]\nname = "{name}"\n{DATA}')
    result = call("measure", "spectrum", "run")
    assert result.exit_code == 2
    assert f"would import {name.partition(':')[0]} (" in result.stderr
    assert not (here / "ran").exists()


def test_a_module_in_folders_without_init(here: Path) -> None:
    """As a recipe's: `recipes/int8/flat2048.py`."""
    (here / "outer" / "inner").mkdir(parents=True)
    (here / "outer" / "inner" / "own.py").write_text(PLANTED)
    own = f"{here}/outer/inner/own.py"
    for name, file in {"outer.inner.own": own, "outer.inner.none": "not found", "outer.none.own": "not found"}.items():
        (here / "run" / "config.toml").write_text(f'[model]\nname = "{name}:build"\n{DATA}')
        result = call("measure", "spectrum", "run")
        assert result.exit_code == 2 and f"would import {name} ({file}) and call build" in result.stderr
    assert not (here / "ran").exists() and "outer" not in sys.modules


def test_what_runs_no_code_needs_no_confirmation(here: Path) -> None:
    (here / "run" / "config.toml").write_text('[model]\nname = "gpt2-tiny"\n[data]\npath = "nowhere"\n')
    assert "no such folder: nowhere" in call("measure", "spectrum", "run").stderr
    (here / "run" / "config.toml").write_text(f'[model]\nname = "planted:build"\ninit_from = "nowhere"\n{DATA}')
    assert "nowhere: no such folder" in call("train", "run").stderr
    assert not (here / "ran").exists()


# --- folders of models -----------------------------------------------------------------------------------------------


def test_code_beside_a_model_is_not_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where somebody is there to say yes; transformers would ask."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = here / "model"
    load_model("gpt2-tiny").save_pretrained(folder)  # type: ignore[operator]
    config = json.loads((folder / "config.json").read_text())
    mark = f"from pathlib import Path\nPath({os.fspath(here / 'ran')!r}).touch()\nclass Own: pass\n"
    (folder / "own.py").write_text(mark)
    config |= {"auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Own"}}
    config |= {"attn_implementation": "somebody/kernel", "_attn_implementation": "somebody/kernel"}
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_pretrained):
        assert load(folder).config._attn_implementation in ("sdpa", "eager")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"'somebody/kernel' is code on the hub, which is not run"):
        load_model(folder, settings={"attn_implementation": "somebody/kernel"})
    assert not (here / "ran").exists()
    for path in folder.iterdir():
        path.unlink()
    (folder / "own.py").write_text(mark)
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}))
    about = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="no tokenizer"):
        load_tokenizer(str(folder))
    assert not (here / "ran").exists()
