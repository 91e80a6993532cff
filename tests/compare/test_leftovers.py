"""What processes that were killed have left aside, and what living ones are writing."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from train.kill_rig import processes, settings

from compare.test_runner import study
from sharpwise.compare.runner import run_study
from sharpwise.compare.stored import open_study
from sharpwise.files import replacing
from sharpwise.measure.results import add
from sharpwise.train.run import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and locks")


class Enough(Exception):
    """It has begun."""


def enough(*_: Any) -> None:
    raise Enough


def train(data: Path, folder: Path) -> None:
    with pytest.raises(Enough):
        run(settings(data, {"name": "adamw"}), folder, on_start=enough)


def compare(data: Path, folder: Path) -> None:
    with pytest.raises(Enough):
        run_study(open_study(study(data), folder), folder, on_budget=enough)


def measure(data: Path, folder: Path) -> None:
    add(folder, [])


def die(path: Path) -> None:
    """Killed in the middle of a file."""
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("start", [train, compare, measure])
def test_a_start_removes_what_the_killed_left_and_nothing_of_the_living(
    data: Path, tmp_path: Path, start: Callable[[Path, Path], None]
) -> None:
    start(data, tmp_path)
    before = set(tmp_path.iterdir())
    for name in ("config.toml", "index.html"):
        process = processes.Process(target=die, args=(tmp_path / name,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert len(set(tmp_path.iterdir()) - before) == 2
    with replacing(tmp_path / "index.html") as page:
        page.write(b"a page")
        start(data, tmp_path)
        assert len(set(tmp_path.iterdir()) - before) == 1
    assert set(tmp_path.iterdir()) - before == {tmp_path / "index.html"}
    assert (tmp_path / "index.html").read_bytes() == b"a page"
