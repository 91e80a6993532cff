"""Checkpoints: whole or not at all, byte for byte what was saved, and the one before where one is damaged."""

import contextlib
import errno
import json
import logging
import os
import threading

import pytest
import torch

from sharpwise import files
from sharpwise.train import checkpoint
from sharpwise.train.checkpoint import Checkpoints, read_checkpoint
from sharpwise.train.config import CheckpointConfig, Config, check


def state(value: float) -> dict:
    tensor = torch.full((3, 4), value)
    return {"model": {"a": tensor, "tied": tensor}, "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "n": 1}}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_was_saved_is_what_is_read(tmp_path, asynchronous) -> None:
    saved = Checkpoints(tmp_path, asynchronous=asynchronous)
    saved.save(7, state(1.5), {"note": "x"})
    saved.close()
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    assert (found.step, found.about["note"]) == (7, "x")
    assert found.state["optimizer"]["n"] == 1
    assert torch.equal(found.state["model"]["a"], torch.full((3, 4), 1.5))
    a, tied = found.state["model"]["a"], found.state["model"]["tied"]
    assert a.data_ptr() == tied.data_ptr()  # one tensor, saved once


def test_an_asynchronous_one_holds_what_there_was_when_it_was_saved(tmp_path, monkeypatch) -> None:
    go = threading.Event()
    real = checkpoint.replace_folder
    monkeypatch.setattr(checkpoint, "replace_folder", lambda *args: (go.wait(10), real(*args)))
    saved = Checkpoints(tmp_path, asynchronous=True)
    tensor = torch.ones(5)
    saved.save(1, {"a": tensor}, {})
    tensor.zero_()
    go.set()
    saved.close()
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    assert torch.equal(found.state["a"], torch.ones(5))


def test_no_checkpoint_is_none(tmp_path) -> None:
    assert Checkpoints(tmp_path / "none").latest() is None


def test_the_last_k_and_the_best_stay(tmp_path) -> None:
    saved = Checkpoints(tmp_path, keep=2, best=True)
    for step, loss in enumerate((3.0, 1.0, 2.0, None, 2.5), start=1):
        saved.save(step, state(step), {"validation_loss": loss})
    assert saved.steps() == [2, 4, 5]
    saved = Checkpoints(tmp_path, keep=1)
    saved.save(6, state(6), {"validation_loss": None})
    assert names(tmp_path) == ["step-00000006"]


def test_milestones_stay(tmp_path) -> None:
    saved = Checkpoints(tmp_path, keep=1, milestones=(1, 3))
    for step in range(1, 6):
        saved.save(step, state(step), {})
    assert saved.steps() == [1, 3, 5]
    assert read_checkpoint(tmp_path, 3).state["model"]["a"][0, 0] == 3
    (tmp_path / "step-00000001" / "state.pt").write_bytes(b"cut")
    for step, said in ((1, "3 bytes instead of"), (2, "No such file")):
        with pytest.raises(ValueError, match=said):
            read_checkpoint(tmp_path, step)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "half", float("nan"), float("inf")])
def test_milestones_are_steps_or_fractions(bad) -> None:
    assert CheckpointConfig(milestones=[0.001, 0.5, 7]).steps_of_milestones(100) == {1, 50, 7}
    with pytest.raises(ValueError, match="milestones: steps, or fractions below 1"):
        check(Config(checkpoint=CheckpointConfig(milestones=[bad])))


def test_saving_a_step_again_replaces_it(tmp_path) -> None:
    saved = Checkpoints(tmp_path)
    saved.save(1, state(1), {})
    saved.save(1, state(2), {})
    assert names(tmp_path) == ["step-00000001"]
    assert saved.latest().state["model"]["a"][0, 0] == 2  # type: ignore[union-attr]


def cut(path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: cut(folder / "state.pt"), "bytes instead of"),
        (lambda folder: flip(folder / "state.pt"), "has changed since"),
        (lambda folder: (folder / "state.pt").unlink(), "FileNotFoundError"),
        (lambda folder: cut(folder / "about.json"), "JSONDecodeError"),
        (lambda folder: (folder / "about.json").write_text("[]"), "about.json has changed since"),
        (lambda folder: (folder / "about.json").write_text("{}"), "about.json has changed since"),
        (lambda folder: (folder / "about.json").unlink(), "FileNotFoundError"),
    ],
)
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, caplog, damage, reason) -> None:
    saved = Checkpoints(tmp_path)
    saved.save(1, state(1), {})
    saved.save(2, state(2), {})
    damage(tmp_path / "step-00000002")
    with caplog.at_level(logging.WARNING):
        found = Checkpoints(tmp_path).latest()
    assert found is not None
    assert found.step == 1
    assert "step-00000002 is passed over" in caplog.text
    assert reason in caplog.text
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]


def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path) -> None:
    saved = Checkpoints(tmp_path, keep=1)
    for step in (1, 5):
        Checkpoints(tmp_path, keep=9).save(step, state(step), {})
    flip(tmp_path / "step-00000005" / "state.pt")
    assert saved.latest().step == 1  # type: ignore[union-attr]
    saved.save(2, state(2), {})
    assert names(tmp_path) == ["damaged-step-00000005", "step-00000002"]


def test_one_that_does_not_fit_the_run_is_passed_over(tmp_path) -> None:
    saved = Checkpoints(tmp_path)
    saved.save(1, state(1), {"fits": True})
    saved.save(2, state(2), {"fits": False})
    found = Checkpoints(tmp_path, check=lambda about: "" if about["fits"] else "too long").latest()
    assert found is not None
    assert found.step == 1


def test_if_all_are_damaged_nothing_is_begun_anew(tmp_path) -> None:
    Checkpoints(tmp_path).save(1, state(1), {})
    flip(tmp_path / "step-00000001" / "state.pt")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; bring one back from a copy"):
        Checkpoints(tmp_path).latest()


class Full:
    """A disk with room for so many bytes more, for what is written through Python."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, file, data) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)


@pytest.mark.parametrize("room", [0, 500, 1500])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_on_a_full_disk_the_one_before_is_intact(tmp_path, monkeypatch, room, asynchronous) -> None:
    saved = Checkpoints(tmp_path, keep=1, asynchronous=asynchronous)
    saved.save(1, state(1), {})
    saved.wait()
    disk = Full(room)

    def write(self, data) -> int:
        try:
            disk.write(self.file, data)
        except OSError as error:
            self.error = error
            raise
        return len(data)

    monkeypatch.setattr(checkpoint._Hashing, "write", write)

    def save() -> None:
        saved.save(2, state(2), {})
        saved.wait()

    with pytest.raises(OSError, match="No space left"):
        save()
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert Checkpoints(tmp_path).latest().step == 1  # type: ignore[union-attr]


def test_what_a_killed_process_left_is_removed(tmp_path) -> None:
    Checkpoints(tmp_path).save(1, state(1), {})
    for name in (".writing-step-00000002", ".removed-step-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_text("half")
    saved = Checkpoints(tmp_path)
    assert names(tmp_path) == ["step-00000001"]
    assert saved.steps() == [1]


class Killed(BaseException):
    """In place of a kill: nothing that handles errors handles it, and what was done stays."""


@pytest.mark.parametrize("operation", ["fsync", "replace", "rmtree"])
def test_stopped_at_any_operation_the_latest_is_whole(tmp_path, monkeypatch, operation) -> None:
    """Stops at the first, second, ... call of what writes, moves or removes, with a checkpoint to go back to."""
    for at in range(1, 30):
        folder = tmp_path / f"{operation}-{at}"
        saved = Checkpoints(folder, keep=1)
        saved.save(1, state(1), {})
        owner = files.shutil if operation == "rmtree" else files.os
        real, calls = getattr(owner, operation), [0]

        def stop_at(*args, real=real, calls=calls, at=at, **options):
            calls[0] += 1
            if calls[0] >= at:
                raise Killed  # and everything that would clean up after it is stopped too
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, operation, stop_at)
            patch.setattr(
                files.shutil, "rmtree", stop_at if operation == "rmtree" else dead(calls, at, files.shutil.rmtree)
            )
            with contextlib.suppress(Killed):
                saved.save(2, state(2), {})
        found = Checkpoints(folder, keep=1).latest()
        assert found is not None
        assert torch.equal(found.state["model"]["a"], torch.full((3, 4), float(found.step)))
        assert all(name.startswith("step-") for name in names(folder))
        if calls[0] < at:
            assert found.step == 2
            return
    raise AssertionError("never ran to its end")


def dead(calls, at, real):
    """Removing, until the process was stopped."""

    def remove(*args, **options):
        if calls[0] >= at:
            raise Killed
        return real(*args, **options)

    return remove


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "a.json"
    files.write_whole(path, "old")
    with pytest.raises(RuntimeError, match="half"), files.replacing(path) as file:
        file.write(b"new")
        raise RuntimeError("half")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]
    files.write_whole(path, json.dumps({"new": 1}))
    assert json.loads(path.read_text()) == {"new": 1}
