"""What is missing is named, with a command that installs it from where sharpwise came from."""

import importlib.metadata
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sharpwise.installing import EXTRAS, install_line, lacks, needs

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def origin(monkeypatch):
    """Pretends that sharpwise was installed from somewhere, as pip notes it (PEP 610)."""

    class Distribution:
        def __init__(self, note):
            self.note = note

        def read_text(self, name):
            assert name == "direct_url.json"
            return None if self.note is None else json.dumps(self.note)

    def pretend(note, pip=True):
        def distribution(name):
            if name == "pip" and not pip:
                raise importlib.metadata.PackageNotFoundError(name)
            return Distribution(note)

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)

    return pretend


def clone(tmp_path):
    """A folder with a blank and a quote in its name, which a shell must not stumble over."""
    folder = tmp_path / "it's a clone"
    folder.mkdir()
    (folder / "pyproject.toml").touch()
    return folder


@pytest.mark.parametrize("editable", [True, False])
def test_from_a_clone(origin, tmp_path, editable):
    folder = clone(tmp_path)
    origin({"url": folder.as_uri(), "dir_info": {"editable": True} if editable else {}})
    words = shlex.split(install_line("train"))
    assert words == [sys.executable, "-m", "pip", "install", *["-e"] * editable, f"{folder}[train]"]
    (folder / "pyproject.toml").unlink()  # the clone is gone
    assert shlex.split(install_line("train"))[-1] == "PATH_OF_A_CLONE[train]"


@pytest.mark.parametrize(
    ("note", "wanted"),
    [
        (None, "sharpwise[cli]"),
        ({"url": "file:///tmp/sharpwise-1.whl", "archive_info": {}}, "sharpwise[cli] @ file:///tmp/sharpwise-1.whl"),
        (
            {"url": "https://example.org/sharpwise", "vcs_info": {"vcs": "git", "commit_id": "abc123"}},
            "sharpwise[cli] @ git+https://example.org/sharpwise@abc123",
        ),
    ],
    ids=["index", "wheel", "git"],
)
def test_from_elsewhere(origin, note, wanted):
    origin(note)
    assert shlex.split(install_line("cli"))[-1] == wanted


def test_from_a_path_that_is_not_installed(monkeypatch):
    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nowhere)
    assert shlex.split(install_line("hf"))[-2:] == ["-e", f"{ROOT}[hf]"]


def test_without_pip(origin):
    origin(None, pip=False)
    words = shlex.split(install_line("hf"))
    assert words == ["uv", "pip", "install", "--python", sys.executable, "sharpwise[hf]"]


def test_the_line_for_the_tests_own_python():
    """It names a project that has this extra, or one that pip can find by itself."""
    *_, where = shlex.split(install_line("train"))
    folder = Path(where.removesuffix("[train]"))
    found = tomllib.loads((folder / "pyproject.toml").read_text()) if folder.is_absolute() else {"project": PROJECT}
    assert "train" in found["project"]["optional-dependencies"]


def test_what_the_extras_bring():
    """All but those of developers, so that an error about a user's own module is not taken for one about ours."""
    extras = PROJECT["optional-dependencies"].items()
    listed = [line for name, lines in extras if name not in ("dev", "docs", "zoo") for line in lines]
    names = {line.partition(">")[0].replace("-", "_") for line in listed if not line.startswith("sharpwise[")}
    assert names == EXTRAS


def test_needs(origin):
    origin(None)
    says = r"^reading x needs pyarrow, which is not installed: .* -m pip install 'sharpwise\[train\]'$"
    with pytest.raises(ImportError, match=says), needs("reading x", "train"):
        raise ModuleNotFoundError("No module named 'pyarrow.parquet'", name="pyarrow.parquet")
    own = ModuleNotFoundError("No module named 'my_model'", name="my_model")
    assert lacks("this command", own) == str(own)
    with pytest.raises(ModuleNotFoundError, match="my_model"), needs("reading x", "train"):
        raise own


@pytest.mark.parametrize(
    ("missing", "arguments", "says"),
    [
        ("typer", ["runs"], "the command line needs typer, which is not installed: "),
        ("transformers", ["blocks", "gpt2"], "model 'gpt2' needs transformers, which is not installed: "),
        ("tokenizers", ["prepare", "--out", "nowhere"], "this command needs tokenizers, which is not installed: "),
    ],
)
def test_commands_without_an_extra(missing, arguments, says, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; from sharpwise.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {says}{sys.executable} -m pip install "), (
        done.stderr
    )
