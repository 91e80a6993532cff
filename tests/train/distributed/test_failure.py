"""Processes that die, hang or are killed while they write: the job ends, says which, and goes on from what is whole."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from sharpwise.train import final
from sharpwise.train.run import run
from train.distributed.rig import LENGTH, STEPS, job, launch, settings, work
from train.run_rig import lines, prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def given(data: Path) -> dict[str, Any]:
    return settings(data, mesh={"fsdp": 2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def killed(given: dict[str, Any], folder: Path) -> str:
    """A run of two processes that is never stopped, and one whose rank 1 is killed while it writes; what was said."""
    with pytest.raises(AssertionError, match="SIGKILL") as raised:
        work(2, folder, [job("reference", given), job("killed", given, spoil="kill")])
    return str(raised.value)


@pytest.fixture(scope="module")
def reference(killed: str, folder: Path) -> Path:
    """That which was never stopped."""
    return folder / "reference"


def command(given: dict[str, Any], place: Path) -> list[str]:
    """What a user types after torchrun; every checkpoint is whole before the next step, whoever dies then."""
    toml = place.parent / f"{place.name}.toml"
    toml.write_text(tomli_w.dumps(given | {"checkpoint": given["checkpoint"] | {"asynchronous": False}}))
    return ["-m", "sharpwise", "train", str(toml), "--out", str(place)]


def names(place: Path) -> list[str]:
    return sorted(path.name for path in (place / "checkpoints").iterdir())


def test_a_rank_is_killed_and_torchrun_starts_all_again(given, reference: Path, tmp_path: Path) -> None:
    """At step 7, after the checkpoint of step 4; torchrun starts the two once more, and they go on from there."""
    place = tmp_path / "run"
    done = launch(2, "--max-restarts=1", *command(given, place), TROUBLE="kill 1 13")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "no answer from rank 1" in done.stderr
    starts = [start["step"] for start in json.loads((place / "environment.json").read_text())]
    assert starts == [1, 5]
    assert (place / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


def torchrun_alone(torchrun: int) -> list[int]:
    """To which Kubernetes sends the signal; it sends it on to its workers, and kills them 30 seconds later."""
    return [torchrun]


def every_process(torchrun: int) -> list[int]:
    """To all of which Slurm sends it, so that workers have it twice."""
    return [*map(int, Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()), torchrun]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("to", [torchrun_alone, pytest.param(every_process, marks=pytest.mark.slow)])
def test_sigterm_ends_all_and_the_same_command_goes_on(
    given, reference: Path, tmp_path: Path, to: Callable[[int], list[int]]
) -> None:
    """In step 7, after the checkpoint of step 4. Told once, all save before they end; told twice, they may."""
    place, sent = tmp_path / "run", []

    def tell(torchrun: subprocess.Popen[str]) -> None:
        metrics, until = place / "metrics.jsonl", time.monotonic() + 120
        while torchrun.poll() is None and time.monotonic() < until:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= 6:
                break
            time.sleep(0.02)
        sent.append(time.monotonic())
        for process in to(torchrun.pid):
            os.kill(process, signal.SIGTERM)

    done = launch(2, *command(given, place), TROUBLE="term 1 13", meanwhile=tell)
    assert done.returncode != 0
    assert time.monotonic() - sent[0] < 60, done.stderr[-6000:]
    assert len(lines(place)) >= 6, done.stderr[-6000:]
    kept = names(place)
    assert kept == ["step-00000004", "step-00000007"] or (to is every_process and kept[-1] == "step-00000004"), kept
    if kept[-1] == "step-00000007":
        status = json.loads((place / "status.json").read_text())
        assert (status["state"], status["step"]) == ("interrupted", 7)
        assert "Saved after step 7 of 20" in done.stdout
    done = launch(2, *command(given, place))
    assert done.returncode == 0, done.stderr[-6000:]
    assert (place / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_without_restarts_the_job_ends_soon(given, tmp_path: Path) -> None:
    place = tmp_path / "run"
    began = time.monotonic()
    done = launch(2, *command(given, place), TROUBLE="kill 1 13")
    assert done.returncode == 1
    assert time.monotonic() - began < 120
    assert "error: rank 0 of 2: no answer from rank 1, which was killed, hangs or cannot be reached" in done.stderr
    assert "rank      : 1 (local_rank: 1)" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    status = json.loads((place / "status.json").read_text())
    assert status["state"] == "failed"
    assert "no answer from rank 1" in status["message"]
    assert names(place) == ["step-00000004"]
    assert not (place / "final").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_job_after_the_timeout(given, tmp_path: Path) -> None:
    began = time.monotonic()
    done = launch(2, *command(given, tmp_path / "run"), TROUBLE="hang 1 13", SHARPWISE_TIMEOUT="4")
    assert done.returncode == 1
    assert time.monotonic() - began < 120
    assert "error: rank 0 of 2: no answer from rank 1" in done.stderr


def test_killed_while_it_writes_its_part(data: Path, killed: str, reference: Path, folder: Path) -> None:
    """What the two had written of the third checkpoint is never read; one process goes on from the second."""
    assert "rank      : 1 (local_rank: 1)" in killed  # torchrun's own words
    place = folder / "killed"
    assert names(place) == [".writing-parts-00000012", "step-00000004", "step-00000008"]
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(final, "LENGTH", LENGTH)
        run(settings(data), place, on_start=lambda start: seen.append(start.step))
    assert seen == [8]
    assert names(place) == [f"step-{n:08d}" for n in (12, 16, 20)]
    mine, other = lines(place), lines(reference)
    assert [line["step"] for line in mine] == list(range(1, STEPS + 1))
    assert mine[:8] == other[:8]
    for a, b in zip(mine, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)


@pytest.mark.slow
def test_an_error_before_the_first_step_is_said_once(given, tmp_path: Path) -> None:
    place = tmp_path / "run"
    done = launch(2, *command(given | {"mesh": {"tp": 3}}, place))
    assert done.returncode == 1
    assert done.stderr.count("error: mesh.fsdp=1 and mesh.tp=3 take a multiple of 3 processes, and there are 2") == 1
    assert not place.exists()
