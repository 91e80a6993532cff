"""Libraries that are built for the step are loaded from a folder that nobody else can write to, or not at all."""

import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.simulated import fake_device
from torch import nn

import sharpwise
from sharpwise.engine.backends import base, triton_launch
from sharpwise.engine.backends.base import compiler_present
from sharpwise.testing import fill_gradients, tiny_model

pytestmark = [
    pytest.mark.skipif(not compiler_present(), reason="needs a C++ compiler"),
    pytest.mark.skipif(os.name != "posix", reason="owners and modes"),
]

ONE_STEP = """
import torch, sharpwise
model = torch.nn.Linear(300, 300)
optimizer = sharpwise.create_optimizer(model, "adam-mini", blocks={"*": "up"}, compile=True)
model(torch.ones(1, 300)).sum().backward()
optimizer.step()
"""


def stepped(compile: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(300, 300)
    optimizer = sharpwise.create_optimizer(model, "adam-mini", blocks={"*": "up"}, compile=compile)
    for step in range(2):
        fill_gradients(model, step)
        optimizer.step()
    return model.weight.detach()


def test_they_are_kept_in_a_folder_of_the_users_own(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ONE_STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "going on without" not in done.stderr, done.stderr
    folder = tmp_path / "cache" / "sharpwise"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.rglob("*.so"))


def test_they_are_found_again_without_what_compiles_them(tmp_path: Path) -> None:
    """That takes half a second to import. A file that is no library is replaced."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    asks = f"{ONE_STEP}\nimport sys\nprint('torch._inductor.codecache' in sys.modules)"
    asked = []
    for broken in (False, False, True, False):
        if broken:
            for file in (tmp_path / "sharpwise").glob("*.so"):
                file.unlink()
                file.write_bytes(b"no library")
        done = subprocess.run([sys.executable, "-c", asks], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "going on without" not in done.stderr, done.stderr
        asked.append(done.stdout.strip())
    assert asked == ["True", "False", "True", "False"]


@pytest.mark.parametrize("kind", ["open to others", "somebody else's", "a link", "a file", "below a file"])
def test_another_folder_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, expected = tmp_path / "sharpwise", stepped(compile=False)
    message = f"libraries are loaded from {folder} only if it is yours alone, and it is {kind}"
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o750)
    elif kind == "somebody else's":
        folder.mkdir(mode=0o700)
        if os.geteuid():
            monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
        else:
            os.chown(folder, 1234, 1234)
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
        message = str(folder)
    elif kind == "a file":
        folder.touch(mode=0o600)
        message = str(folder)
    else:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        message = str(tmp_path / "file")
    with caplog.at_level(logging.WARNING, "sharpwise"):
        found = stepped(compile=True)
    assert [message in record.message for record in caplog.records] == [True]
    torch.testing.assert_close(found, expected)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.skipif(bool(triton_launch.absent()), reason=triton_launch.absent() or "triton is here")
@pytest.mark.parametrize("kind", ["open to others", "somebody else's", "a file", "below a file", "cannot be written"])
def test_nor_is_that_of_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder = tmp_path / "kernels"
    message = f"kernels are loaded from {folder} only if it is yours alone, and it is {kind}"
    if kind == "open to others":
        folder.mkdir()
        folder.chmod(0o777)
    elif kind == "somebody else's":
        folder.mkdir()
        about = folder.stat().st_uid + 1
        monkeypatch.setattr(os, "geteuid", lambda: about)
    elif kind == "cannot be written":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)
        message = f"kernels are kept in {folder}, which {kind}"
    else:
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "kernels" if kind == "below a file" else tmp_path / "file"
        message = str(folder)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(base, "_SAID", set())
    with fake_device(monkeypatch) as module, module.FakeCuda() as cuda, caplog.at_level(logging.WARNING, "sharpwise"):
        for _ in range(2):
            model, blocks = cuda.model(tiny_model)
            optimizer = sharpwise.Lion(model, lr=1e-3, blocks=blocks)
            counts = cuda.step(model, optimizer)
            rows = optimizer.explain()
    assert [message in record.message for record in caplog.records] == [True]
    assert {row["backend"] for row in rows} <= {"reference"}
    assert all(message in row["why"] for row in rows)
    assert not any("Triton" in name for name in counts.launches)
