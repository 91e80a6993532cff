"""`sharpwise demo` from its flags to its files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from sharpwise.cli.main import create_app
from sharpwise.cli.malloc import keep_large_blocks
from sharpwise.compare import demo
from sharpwise.train.data import prepare_tokens

TEXT = "".join(f"def function_{i}(x):\n    return x + {i * i}\n\n" for i in range(3000))


def _demo(*arguments: object) -> Result:
    return CliRunner().invoke(create_app(), ["demo", *map(str, arguments)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "code.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that trains in milliseconds, in this process."""
    monkeypatch.setattr(demo, "MODEL", {"n_layer": 1, "n_embd": 16, "n_head": 2})
    monkeypatch.setattr(demo, "VOCABULARY", 300)


@pytest.mark.usefixtures("tiny")
def test_ten_steps_of_every_run(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    outcome = _demo("--data", text, "--out", out, "--steps", 10, "--seed", 5, "--jobs", 1)
    assert outcome.exit_code == 0, outcome.output
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "result.json"]

    result = json.loads((out / "result.json").read_text())
    assert [(run["arm"], run["lr"]) for run in result["runs"]] == [
        (arm.name, lr) for arm in demo.ARMS for lr in demo.LEARNING_RATES
    ]
    assert result["settings"]["seed"] == 5
    assert result["data"]["source"] == "code.txt"
    parameters = result["model"]["parameters"]
    assert sum(block["parameters"] for block in result["blocks"]) == parameters
    by_arm = {run["arm"]: run for run in result["runs"]}
    assert len({run["train_loss"][0] for run in result["runs"]}) == 1  # the same weights and the same first batch
    assert all(len(run["train_loss"]) == 10 and run["final_loss"] > 0 for run in result["runs"])
    assert by_arm["AdamW"]["state_bytes"] == pytest.approx(8 * parameters, rel=0.01)
    assert by_arm["Adam-mini"]["state_bytes"] < 0.6 * by_arm["AdamW"]["state_bytes"]
    rates = by_arm["AdamW + BlockwiseLR"]["learning_rates"]
    assert rates["q"] == pytest.approx([8 * lr for lr in rates["norm"]])

    html = (out / "index.html").read_text(encoding="utf-8")
    for arm in demo.ARMS:
        assert arm.name in html
        assert arm.name in outcome.stdout
    assert "index.html" in outcome.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file or folder"),
        (b"", "is empty"),
        (b"\x00\x01\x02 binary", "not text: it has a zero byte at offset 0"),
        ("größe".encode("latin-1"), "not UTF-8 text: byte 0xf6"),
        (b"a few words only", "too short"),
    ],
)
def test_a_text_that_cannot_be_used_ends_with_a_message(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = _demo("--data", path, "--out", tmp_path / "out")
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.output
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_cannot_be_written_is_found_before_training(text: Path) -> None:
    outcome = _demo("--data", text, "--out", text / "below")
    assert outcome.exit_code == 2
    assert "cannot write into" in outcome.stderr
    assert "--out" in outcome.stderr


def test_an_interrupt_writes_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupted)
    outcome = _demo("--data", text, "--out", tmp_path / "out")
    assert outcome.exit_code == 130
    assert "nothing was written" in outcome.stderr
    assert not list((tmp_path / "out").iterdir())


def test_the_allocator_is_asked_on_glibc_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(keep_large_blocks(), bool)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_large_blocks()


# --- processes -------------------------------------------------------------------------------------------------------


def test_two_processes_give_the_losses_of_one(text: Path, tmp_path: Path) -> None:
    corpus = prepare_tokens([text], tmp_path / "data", vocabulary=300, validation=0.1)
    settings = demo.Settings(steps=3, sequences=2, context=16, warmup=1, evaluations=1, validation_sequences=4)
    seen: dict[int, set[int]] = {1: set(), 2: set()}
    losses = {}
    for jobs in (1, 2):
        result = demo.run_demo(
            corpus,
            settings,
            folder=tmp_path / str(jobs),
            jobs=jobs,
            on_progress=lambda news, jobs=jobs: seen[jobs].add((news.run, news.step)),
        )
        losses[jobs] = [(run["train_loss"], run["final_loss"]) for run in result["runs"]]
    assert losses[1] == losses[2]
    assert seen[1] == seen[2] == {(run, 3) for run in range(9)}  # every run says that it has ended


def _alive(group: int) -> list[str]:
    """Processes of a group, those left out that have ended and wait for someone to ask."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # ended meanwhile
            continue
        state, _, pgrp = rest.split()[:3]
        if int(pgrp) == group and state not in "ZX" and "resource_tracker" not in (stat.parent / "cmdline").read_text():
            found.append(name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("wait", [0.0, 8.0], ids=["while workers start", "while they train"])
def test_ctrl_c_stops_every_process_at_once_and_quietly(wait: float, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sharpwise", "demo", "--data", str(text), "--out", str(out), "--jobs", "2"]
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        try:
            deadline = time.monotonic() + 120
            while "at a time" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(wait)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=120) == 130
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert "Stopped; nothing was written." in said
    assert "Traceback" not in said
    assert not list(out.iterdir())
    assert _alive(process.pid) == []
