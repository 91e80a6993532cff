"""Runs on disks that are full, with files that are damaged, and with losses that are not finite."""

import errno
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sharpwise import files
from sharpwise.train import checkpoint, final, folder
from sharpwise.train import run as run_module
from sharpwise.train.checkpoint import Checkpoints
from sharpwise.train.run import Diverged, run
from sharpwise.train.steps import Plan, step_starts
from train.kill_rig import STEPS, Tiny, assert_same_run, settings
from train.run_rig import ADAMW, prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def given(data: Path) -> dict[str, Any]:
    return settings(data, ADAMW)


@pytest.fixture(scope="module")
def reference(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reference") / "run"
    run(given, place)
    return place


@pytest.fixture(scope="module")
def stopped_once(given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("stopped") / "run"
    run(given, place, **stop_after(14))
    return place


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of a run that was stopped after step 14, to damage."""
    return Path(shutil.copytree(stopped_once, tmp_path / "run"))


def stop_after(step: int) -> dict[str, Any]:
    at: list[int] = []
    return {"on_step": lambda done: at.append(done.step), "should_stop": lambda: at[-1] == step}


def lines(place: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (place / "metrics.jsonl").read_text().splitlines()]


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_size(path: Path) -> None:
    """The last digit of metrics_bytes: still a number, still within the file."""
    text = path.read_text()
    at = text.index(",", text.index("metrics_bytes")) - 1
    path.write_text(text[:at] + str((int(text[at]) + 9) % 10 if text[at] != "0" else 1) + text[at + 1 :])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda newest: cut(newest / "state.pt"), "bytes instead of"),
        (lambda newest: flip(newest / "state.pt", 2000), "the content of state.pt has changed"),
        (lambda newest: cut(newest / "about.json"), "JSONDecodeError"),
        (lambda newest: flip_size(newest / "about.json"), "the content of about.json has changed"),
        (lambda newest: (newest / "state.pt").unlink(), "FileNotFoundError"),
        (lambda newest: cut(newest.parent.parent / "timing.jsonl"), "no checkpoint"),
    ],
)
def test_the_checkpoint_before_the_damaged_one(given, reference, stopped, tmp_path, caplog, damage, reason) -> None:
    place = stopped
    newest = place / "checkpoints" / "step-00000014"
    assert newest.exists()
    damage(newest)
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        if reason == "no checkpoint":
            with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; bring one back from a copy"):
                run(given, place)
            assert "timing.jsonl has" in caplog.text
            return
        run(given, place, on_start=lambda start: seen.append(start.step))
    assert seen == [12]
    assert f"the checkpoint {newest} is passed over: " in caplog.text
    assert reason in caplog.text
    damaged = place / "checkpoints" / "damaged-step-00000014"
    assert damaged.is_dir()
    damaged.rename(tmp_path / "aside")
    assert_same_run(place, reference)


def test_metrics_that_are_shorter_than_a_checkpoint_says(given, reference, stopped, tmp_path, caplog) -> None:
    """As after a crash of the machine, where the file of the metrics lost what the checkpoint did not."""
    place = stopped
    kept = (place / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (place / "metrics.jsonl").write_bytes(b"".join(kept[:12]) + b'{"step":13,"to')
    seen: list[int] = []
    run(given, place, on_start=lambda start: seen.append(start.step))
    assert seen == [12]
    assert "metrics.jsonl has" in caplog.text
    (place / "checkpoints" / "damaged-step-00000014").rename(tmp_path / "aside")
    assert_same_run(place, reference)


def test_lines_after_the_checkpoint_are_cut(given, reference, stopped) -> None:
    place = stopped
    for name in ("metrics.jsonl", "timing.jsonl"):
        with (place / name).open("a") as file:
            file.write('{"step":15,"loss":0}\n{"st')
    run(given, place)
    assert_same_run(place, reference)


# --- a full disk -----------------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def full_disk(where: str, nth: int) -> Iterator[None]:
    """A disk that is full from the `nth` time on that something of this kind is written."""
    times = 0
    module, name, kind = {
        "lines": (folder.Lines, "write", None),
        "lines, half": (folder.Lines, "write", None),
        "sync": (folder, "sync", None),
        "checkpoint": (checkpoint.torch, "save", None),
        "checkpoint, renaming": (files.os, "replace", "step-"),
        "final": (final, "save_model", None),
        "final, of the library": (final, "save_model", None),
        "sample": (final, "write_whole", None),
        "status": (folder, "write_whole", "status.json"),
        "config": (folder, "write_whole", "config.toml"),
        "facts": (folder, "write_whole", "facts.json"),
    }[where]
    before = getattr(module, name)

    def instead(*args: Any, **kwargs: Any) -> Any:
        nonlocal times
        if kind is None or kind in str(args[-2:]):
            times += 1
            if times >= nth:
                if where == "lines, half":
                    os.write(args[0]._file.fileno(), b'{"half":')
                if where == "final, of the library":
                    raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
                full()
        return before(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, instead)
        yield


@pytest.mark.parametrize(
    ("where", "nth", "asynchronous"),
    [
        ("lines", 1, True),
        ("lines, half", 31, True),
        ("sync", 8, True),
        *[("checkpoint", nth, asynchronous) for nth, asynchronous in ((1, False), (4, True), (4, False))],
        *[("checkpoint, renaming", nth, asynchronous) for nth, asynchronous in ((5, True), (12, False))],
        ("final", 1, True),
        ("final, of the library", 1, True),
        ("sample", 1, True),
        ("status", 1, True),
        ("config", 1, True),
        ("facts", 1, True),
    ],
)
def test_a_full_disk_ends_the_run_and_it_goes_on(given, reference, tmp_path, caplog, where, nth, asynchronous) -> None:
    place = tmp_path / "run"
    given = given | {"checkpoint": {"every": 2, "keep": 2, "best": True, "asynchronous": asynchronous}}
    with full_disk(where, nth), pytest.raises(OSError, match="the disk is full") as raised:
        run(given, place)
    assert raised.value.errno == errno.ENOSPC
    assert str(place) in str(raised.value)
    assert "make room and start the run again: it goes on from its last checkpoint" in str(raised.value)
    assert threading.active_count() < 20
    if where == "config":
        assert not place.exists()  # nothing had come about
    elif where != "status":
        status = json.loads((place / "status.json").read_text())
        assert (status["state"], status["message"]) == ("failed", "[Errno 28] No space left on device")
    else:
        assert "could not note that the run failed" in caplog.text
        assert not (place / "status.json").exists()
    assert not (place / "final").exists() or where in ("status", "sample")
    if place.exists():
        left = Checkpoints(place / "checkpoints", keep=9).latest()
        assert (left is None) == (where in ("config", "facts") or (where, nth) in (("lines", 1), ("checkpoint", 1)))
    assert run(given, place).state == "finished"
    assert_same_run(place, reference)


def test_any_other_error_of_the_disk_is_as_it_is(given, tmp_path) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "I/O error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder.Lines, "write", broken)
        with pytest.raises(OSError, match=r"^\[Errno 5\] I/O error$"):
            run(given, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_too_little_memory(given, tmp_path, monkeypatch, kind) -> None:
    def forward(self: Any, tokens: Tensor) -> Tensor:
        raise kind("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(run_module, "train_steps", lambda *args, **kwargs: (forward(None, None) for _ in range(1)))
    with pytest.raises(ValueError, match=r"cpu has not enough memory for windows of this size, 2 at a time\. In anoth"):
        run(given, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


# --- losses that are not finite --------------------------------------------------------------------------------------

HOW: dict[str, Any] = {}
"""What goes wrong with `Bad`: `at`, training passes after which it does, and `kind`."""


class Bad(Tiny):
    """Goes wrong in one training pass, in two a step."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = super().forward(tokens)
        if not self.training:
            return logits * math.nan if HOW.get("passes", 0) >= HOW.get("validation", math.inf) else logits
        if not torch.is_grad_enabled():
            return logits
        HOW["passes"] = HOW.get("passes", 0) + 1
        if HOW["passes"] != HOW.get("at"):
            return logits
        if HOW["kind"] == "gradient":
            logits.register_hook(lambda g: g * math.inf)
            return logits
        if HOW["kind"] == "impossible target":
            return logits.masked_fill(torch.arange(logits.shape[-1]) > 3, -math.inf)
        return logits * math.nan


def bad(vocab_size: int) -> nn.Module:
    return Bad(vocab_size)


@pytest.fixture
def going_wrong(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    HOW.clear()
    yield given | {"model": {"name": f"{__name__}:bad"}}
    HOW.clear()


@pytest.mark.parametrize("kind", ["loss", "gradient", "impossible target"])
def test_a_loss_that_is_not_finite_stops_the_run(going_wrong, reference, data, tmp_path, kind) -> None:
    HOW.update(at=2 * 14 + 2, kind=kind)  # in the second half of step 15
    place = tmp_path / "run"
    with pytest.raises(Diverged) as raised:
        run(going_wrong, place)
    said = str(raised.value)
    what = "a gradient" if kind == "gradient" else "the loss"
    assert said.startswith(f"step 15: {what} is not finite (loss {'nan' if kind == 'loss' else ''}")
    assert "gradient norm nan" in said or "gradient norm inf" in said
    assert f"Last good checkpoint: {place / 'checkpoints' / 'step-00000014'}." in said
    assert said.endswith("To leave such steps out: --set optimizer.on_nonfinite=skip")
    from sharpwise.train.data import open_tokens

    train = open_tokens(data).train
    plan = Plan(None, 0.0, 4, 2, 16, seed=3)  # type: ignore[arg-type]
    places = ", ".join("{}:{}".format(*train.where(int(start))) for start in step_starts(train, plan, 15))
    assert f"Its 4 windows of 16 tokens begin at {places} (seed 3)." in said
    assert places.count("train-00000.bin:") == 4
    assert json.loads((place / "status.json").read_text()) == {"state": "diverged", "step": 15, "message": said}
    assert [line["step"] for line in lines(place)] == list(range(1, 15))
    assert not (place / "final").exists()
    # What went wrong was no property of the weights: the run goes on, and nothing was damaged.
    HOW.clear()
    assert run(going_wrong, place).state == "finished"
    assert_same_run(place, reference)


@pytest.mark.parametrize("kind", ["loss", "gradient", "impossible target"])
def test_such_a_step_is_left_out_if_so_told(going_wrong, tmp_path, kind) -> None:
    optimizer = {**ADAMW, "lr": 3e-3, "on_nonfinite": "skip"}
    own = going_wrong | {"optimizer": optimizer, "checkpoint": {"every": 1, "keep": 99}}
    HOW.update(at=2 * 14 + 2, kind=kind)
    place = tmp_path / "run"
    assert run(own, place).state == "finished"
    found = lines(place)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    left_out = found[14]
    assert left_out["skipped"] is True
    assert left_out["grad_norm"] is None
    assert (left_out["loss"] is None) == (kind != "gradient")
    assert "validation_loss" not in left_out  # though it was due
    assert not any("skipped" in line for line in found if line is not left_out)
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in found if line is not left_out)

    def weights(step: int) -> dict[str, Tensor]:
        path = place / "checkpoints" / f"step-{step:08d}" / "state.pt"
        return torch.load(path, weights_only=True)["model"]

    before, after, later = weights(14), weights(15), weights(16)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert any(not torch.equal(tensor, later[name]) for name, tensor in before.items())
    assert all(tensor.isfinite().all() for tensor in load_file(place / "final" / "model.safetensors").values())


def test_it_goes_on_after_it_was_told_to(going_wrong, tmp_path) -> None:
    """A step that always fails: refused, then left out, with the same bytes as if that had been said at once."""
    skip = going_wrong | {"optimizer": {**ADAMW, "lr": 3e-3, "on_nonfinite": "skip"}}
    HOW.update(at=2 * 14 + 1, kind="loss")
    run(skip, tmp_path / "reference")
    HOW.update(passes=0)
    with pytest.raises(Diverged):
        run(going_wrong, tmp_path / "run")
    HOW.update(passes=2 * 14)
    assert run(skip, tmp_path / "run").state == "finished"
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def test_a_run_that_diverges_before_its_first_checkpoint(going_wrong, tmp_path) -> None:
    HOW.update(at=1, kind="loss")
    with pytest.raises(Diverged, match=r"step 1: the loss is not finite .* Last good checkpoint: none\."):
        run(going_wrong, tmp_path / "run")


def test_a_validation_loss_that_is_not_finite(going_wrong, reference, tmp_path) -> None:
    HOW.update(validation=2 * 15)  # after step 15
    place = tmp_path / "run"
    with pytest.raises(Diverged, match=r"step 15: the validation loss after it is not finite .*step-00000014\."):
        run(going_wrong, place)
    HOW.clear()
    run(going_wrong, place)
    assert_same_run(place, reference)


def test_a_validation_loss_that_is_not_finite_is_null(going_wrong, tmp_path, caplog) -> None:
    own = going_wrong | {"optimizer": {**ADAMW, "lr": 3e-3, "on_nonfinite": "skip"}}
    HOW.update(validation=2 * 15)
    place = tmp_path / "run"
    outcome = run(own, place)
    assert outcome.state == "finished"
    assert outcome.validation_loss is None
    assert json.loads((place / "status.json").read_text())["validation_loss"] is None
    found = {line["step"]: line["validation_loss"] for line in lines(place) if "validation_loss" in line}
    assert [step for step, loss in found.items() if loss is None] == [15, 20, 24]
    best = min((step for step in found if found[step] is not None), key=lambda step: found[step])
    assert (place / "checkpoints" / f"step-{best:08d}").is_dir()
    assert "step 24: the validation loss is not finite" in caplog.text
    # There is nothing to draw a text from.
    assert "logits that are not finite; the text that it writes ends there" in caplog.text
    assert (place / "sample.txt").read_text().endswith(" >>> \n")
