"""The environment of a run: which commit made it, never that of another repository; whether its CPU has bf16."""

import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from sharpwise.train import environment
from sharpwise.train.environment import slow_bf16

GIT = ("git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run([*GIT, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def copied_to(folder: Path) -> Any:
    """The module as it is in another folder."""
    path = shutil.copy(environment.__file__, folder / "environment.py")
    spec = importlib.util.spec_from_file_location("copied_environment", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commit_is_that_of_a_clone_of_its_own(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "of a user, into whose repository it was installed")
    module = copied_to(tmp_path)
    assert module.commit() is None
    git(tmp_path, "add", "environment.py")
    git(tmp_path, "commit", "-q", "-m", "a clone")
    assert module.commit() == git(tmp_path, "rev-parse", "--short=12", "HEAD")
    (tmp_path / "environment.py").write_text("changed")
    assert module.commit().endswith("-dirty")


def test_without_a_repository_there_is_none(tmp_path: Path, monkeypatch: Any) -> None:
    module = copied_to(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert module.commit() is None
    monkeypatch.setenv("PATH", "")
    assert module.commit() is None


@pytest.mark.parametrize(
    ("precision", "device", "machine", "has", "slow"),
    [
        ("bf16-autocast", "cpu", "x86_64", {"avx512": True}, True),
        ("bf16", "cpu", "AMD64", {}, True),
        ("bf16-autocast", "cpu", "x86_64", {"avx512_bf16": True}, False),
        ("bf16-autocast", "cpu", "x86_64", {"amx_bf16": True}, False),
        ("bf16-autocast", "cpu", "aarch64", {}, False),
        ("bf16-autocast", "cuda:0", "x86_64", {}, False),
        ("bf16-autocast", "cpu", "x86_64", None, False),  # torch cannot tell
        ("fp32", "cpu", "x86_64", {}, False),
        (None, "cpu", "x86_64", {}, False),
    ],
)
def test_bf16_is_called_slow_where_the_processor_emulates_it(
    monkeypatch, precision, device, machine, has, slow
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    if has is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    said = slow_bf16(precision, device)
    assert bool(said) == slow and "\n" not in said
    assert not slow or (precision in said and said.endswith("--set compute.precision=fp32"))
