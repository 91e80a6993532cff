"""Reading a run's folder: whole, half written, damaged, or no run at all."""

import fcntl
import json
import math
from pathlib import Path

import numpy as np
import pytest

from report.canned import TOKENS_PER_STEP, write_run
from sharpwise.report.run import read_run


def test_everything_is_read(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", steps=40, resumed_at=21, skipped=(7,)))
    assert run.status.state == "finished"
    assert (run.last_step, run.steps, run.tokens_per_step, run.tokens_seen) == (40, 40, 2048, 40 * 2048)
    assert run.setting("optimizer", "block_lr") == "blockwise"
    assert run.setting("optimizer", "nothing", "there") is None
    assert run.skipped.tolist() == [7]
    assert np.flatnonzero(np.isnan(run.grad_norm)).tolist() == [6]
    assert run.validation_step.tolist() == list(range(2, 41, 2))
    assert [start["step"] for start in run.starts] == [1, 21]
    assert run.blocks is not None
    assert len(run.diagnostics) == len(run.seconds) == len(run.memory) == 40
    assert run.sample.startswith("def main")
    assert run.problems == ()


def test_what_is_optional_may_be_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=5)
    for path in folder.iterdir():
        if path.name not in ("config.toml", "metrics.jsonl"):
            path.unlink()
    run = read_run(folder)
    assert run.status.state == "killed"
    assert (run.facts, run.blocks, run.starts, run.sample, len(run.seconds)) == ({}, None, (), "", 0)
    assert (run.steps, run.tokens_per_step) == (5, TOKENS_PER_STEP)  # from the configuration, and from the metrics
    assert run.problems == ()


def test_a_run_may_not_have_made_a_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=5)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert (run.last_step, run.tokens_seen, len(run.loss)) == (0, 0, 0)


@pytest.mark.parametrize("tail", ['{"step": 6, "loss": 3.', '{"step": 6, "loss": 3.1', "\n\n", '{"ste', "[1]", '"\xff'])
def test_a_last_line_that_is_cut_is_left_out(tail: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=5)
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(tail.encode("latin-1"))
    run = read_run(folder)
    assert run.step.tolist() == run.timing_step.tolist() == [1, 2, 3, 4, 5]
    assert run.problems == ()


def test_a_step_made_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=5)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 6, "lo\n{"step": 4, "tokens": 8192, "loss": 1.5}\n{"step": 5, "tokens": 10240, "loss": 1.25}\n'
        )
    run = read_run(folder)
    assert run.step.tolist() == [1, 2, 3, 4, 5]
    assert run.loss[3:].tolist() == [1.5, 1.25]
    assert run.problems == ("metrics.jsonl: 1 damaged line is left out.",)


def test_numbers_that_are_not_finite_are_not_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=3)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN, "lr": 1}\n{"step": 2, "loss": Infinity}\n{"step": 3}\n'
    )
    run = read_run(folder)
    assert all(math.isnan(value) for value in run.loss)


def test_damaged_files_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=3)
    (folder / "facts.json").write_text("[]")
    (folder / "environment.json").write_text("{")
    (folder / "blocks.json").write_text('{"version": 99, "segments": []}')
    run = read_run(folder)
    text = "\n".join(run.problems)
    assert "facts.json: holds a list, expected a dict" in text
    assert "environment.json: not JSON" in text
    assert "blocks.json: block map: version 99" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("state", ["finished", "interrupted", "diverged", "failed"])
def test_a_run_says_how_it_ended(state: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=9, until=3, status={"state": state, "step": 3, "message": "Why."})
    status = read_run(folder).status
    assert (status.state, status.step, status.message) == (state, 3, "Why.")


def test_who_holds_the_lock_trains(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=9, until=3)
    assert read_run(folder).status.state == "killed"
    (folder / "run.lock").touch()
    assert read_run(folder).status.state == "killed"
    with (folder / "run.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # What a former process said does not count.
        (folder / "status.json").write_text(json.dumps({"state": "interrupted", "step": 3, "message": ""}))
        assert read_run(folder).status.state == "running"
    assert read_run(folder).status.state == "interrupted"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing: no such folder; `sharpwise runs` lists"):
        read_run(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"is no run, which has at least config\.toml and metrics\.jsonl"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text("seed = 1")
    with pytest.raises(ValueError, match="is no run"):
        read_run(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    assert read_run(tmp_path).last_step == 0
    (tmp_path / "config.toml").write_text("seed = ")
    with pytest.raises(ValueError, match=r"config\.toml: not TOML"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="is a file, expected the folder of a run"):
        read_run(tmp_path / "config.toml")
