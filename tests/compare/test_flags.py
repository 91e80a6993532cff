"""What the flags of `sharpwise compare` say beyond a study file: settings to search, a look at what there is."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner, Result

from compare.test_results import fill
from compare.test_runner import study
from sharpwise.cli.compare import _budget, _study
from sharpwise.cli.main import create_app
from sharpwise.compare.study import make_study


def _sharpwise(*arguments: object) -> Result:
    return CliRunner().invoke(create_app(), [str(argument) for argument in arguments])


def test_a_study_is_shown_so_far_and_nothing_is_trained(data: Path, tmp_path: Path) -> None:
    given = study(data)
    fill(given, tmp_path, runs=4)
    (tmp_path / "study.toml").write_text(tomli_w.dumps(given))
    before = (tmp_path / "study.db").read_bytes()
    outcome = _sharpwise("compare", "--out", tmp_path, "--trust-code", "--so-far")
    assert outcome.exit_code == 0, outcome.output
    assert "Unfinished: 4 of 14 runs" in outcome.stdout
    assert "diverged" not in outcome.stdout
    assert (tmp_path / "study.db").read_bytes() == before
    assert not (tmp_path / "runs").exists()
    assert not json.loads((tmp_path / "result.json").read_text())["complete"]
    assert "No pair of final runs yet." in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_there_has_to_be_something_to_show(tmp_path: Path) -> None:
    outcome = _sharpwise("compare", "--out", tmp_path / "none", "--so-far")
    assert outcome.exit_code == 2
    assert "holds no study to go on with" in outcome.stderr.replace("\n", " ")


def test_settings_to_search_by_flags() -> None:
    search = ["optimizer.weight_decay=[0, 0.3]", "optimizer.betas=[[0.9, 0.99]]", "schedule.warmup=[0.02]"]
    given, _ = _study(["adamw", "lion"], None, None, "4M", {}, [], search)
    assert given is not None
    space = make_study(given).arm("lion").space
    assert space.search == {
        "optimizer.weight_decay": (0, 0.3), "optimizer.betas": ((0.9, 0.99),), "schedule.warmup": (0.02,),
    }  # fmt: skip


@pytest.mark.parametrize("text", ["nan", "inf", "infx", "1e999"])
def test_a_budget_is_finite(text: str) -> None:
    with pytest.raises(ValueError, match="expected tokens, as 4000000 or 4M"):
        _budget(text)


@pytest.mark.parametrize(
    ("run", "cuda", "on_gpu"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"compute": {"device": "cpu"}}, True, False),
        ({"compute": {"device": "cuda:1"}}, True, True),
    ],
)
def test_runs_share_one_gpu(run: dict[str, Any], cuda: bool, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so they are made one at a time, unless said otherwise."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    assert make_study({"arms": ["adamw", "lion"], "tokens": 1, "run": run}).on_gpu == on_gpu


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "..", ".", "/tmp/x", "a/b", "a\\\\b", "C:x", "", " ", ".hidden", "-x", "nul", "COM1.old", "x."),
        *("x" * 101, "a\\u0000b", "a\\u001b[2Jb", "a\\nb"),
    ],
)
def test_a_study_stays_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = 'arms = ["adamw", "lion"]\ntokens = 9999\n[run.data]\npath = "nowhere"\n'
    Path("study.toml").write_text(f'name = "{name}"\n{text}')
    outcome = _sharpwise("compare", "study.toml")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: name: got ")
    assert "which can be no folder's name here; take one of at most 100 letters" in outcome.stderr
    assert outcome.stderr.isascii() and outcome.stderr[:-1].isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["study.toml"]
    # Elsewhere, it is only the heading of a page.
    assert "no such folder: nowhere" in _sharpwise("compare", "study.toml", "--out", "out").stderr


def test_names_of_studies_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Größe 2, lr=3e-4 (again)", "v1.5+x", "null", "x" * 100):
        Path("s.toml").write_text(f'name = "{name}"\narms = ["adamw", "lion"]\ntokens = 9999\n')
        outcome = _sharpwise("compare", "s.toml", "--data", "nowhere")
        assert "no such folder: nowhere" in outcome.stderr
    Path("s.toml").write_text('name = ["x"]\narms = ["adamw", "lion"]\ntokens = 9999\n')
    assert "error: name must be text, got ['x']" in _sharpwise("compare", "s.toml", "--out", "x").stderr
    Path("...toml").write_text('[data]\npath = "nowhere"\n')
    assert "the name of ...toml: got '..', which can be no folder's name" in _sharpwise("train", "...toml").stderr
    for recipe in ("../recipes/blockwise_lr", "blockwise_lr/", "blockwise_lr/../llr/gpu", "/etc/x", "sgd_sai/"):
        assert f"no recipe is called {recipe!r}" in _sharpwise("compare", "--recipe", recipe).stderr
