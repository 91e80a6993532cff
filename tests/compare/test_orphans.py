"""A main process that is killed alone takes the processes along that it has started: training, idle, or encoding."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from train.kill_rig import Tiny, processes, settings

from compare.test_runner import study
from sharpwise.compare.runner import run_study
from sharpwise.compare.stored import open_study
from sharpwise.compare.workers import Workers
from sharpwise.train.data import prepare_tokens

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def slow() -> None:
    """Called first in every worker: a run then takes minutes."""
    real = Tiny.forward

    def forward(self: Tiny, tokens):
        time.sleep(0.5)
        return real(self, tokens)

    Tiny.forward = forward  # type: ignore[method-assign]


def train(data: Path, folder: Path, ready: Path) -> None:
    """Two runs at a time."""

    def note(progress) -> None:
        if len(list(folder.glob("runs/*/*/metrics.jsonl"))) >= 2:
            ready.touch()

    run_study(open_study(study(data), folder), folder, jobs=2, setup=slow, on_progress=note)


def idle(data: Path, folder: Path, ready: Path) -> None:
    """One run, and then nothing."""
    with Workers(2) as workers:
        workers.start("a", settings(data, {"name": "adamw"}), folder / "a")
        while not workers.wait():
            pass
        ready.touch()
        time.sleep(300)


def encode(data: Path, folder: Path, ready: Path) -> None:
    """A text whose chunks are put in two processes; killed when there are tokens."""
    folder.mkdir()
    text = folder / "some.txt"
    text.write_text("\n<|endoftext|>\n".join(f"line {i} of a long text" * 20 for i in range(4000)))

    def note(news) -> None:
        ready.touch()
        time.sleep(300)

    prepare_tokens([text], folder / "out", vocabulary=300, jobs=2, chunk_bytes=100_000, on_progress=note)


class Enough(Exception):
    """Three runs were stored: the two that were killed, and another one."""


def enough(progress) -> None:
    if progress.done == 3:
        raise Enough


def children(pid: int) -> set[int]:
    """Processes of a pool below this one."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.add(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("work", [train, idle, encode])
def test_workers_end_with_a_main_process_that_is_killed(
    data: Path, tmp_path: Path, work: Callable[[Path, Path, Path], None]
) -> None:
    folder, ready = tmp_path / "study", tmp_path / "ready"
    process = processes.Process(target=work, args=(data, folder, ready))
    process.start()
    left: set[int] = set()
    try:
        while not ready.exists() and process.is_alive():
            time.sleep(0.05)
        assert process.pid is not None
        left = children(process.pid)
        assert left
        process.kill()
        process.join(60)
        until = time.monotonic() + 20
        while any(map(alive, left)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(alive, left))
    finally:
        process.kill()
        for pid in left:
            if alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    if work is train:  # nobody holds a run: the same study goes on
        with pytest.raises(Enough):
            run_study(open_study(study(data), folder), folder, on_progress=enough)
