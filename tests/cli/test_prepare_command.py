"""`sharpwise prepare`: what it prints, how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sharpwise.cli.main import create_app
from sharpwise.cli.prepare import default_name
from sharpwise.train.data import open_tokens

TEXT = "\n<|endoftext|>\n".join(f"text {i} about {i * i}\nand more of it" for i in range(200))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.txt").write_text(TEXT)
    return tmp_path


def call(*arguments: str):
    return CliRunner().invoke(create_app(), ["prepare", "--vocab-size", "300", *arguments])


def test_a_first_call_prepares_and_a_second_does_nothing(here: Path) -> None:
    first = call("some.txt")
    assert first.exit_code == 0, first.output
    assert "training" in first.stdout
    assert "197 documents" in first.stdout
    assert "end of text <|endoftext|> = 0" in first.stdout
    assert first.stdout.rstrip().endswith("Folder: data/some")
    second = call("some.txt")
    assert second.exit_code == 0
    assert second.stdout.startswith("data/some is prepared already; nothing to do.")
    assert open_tokens(here / "data" / "some").vocabulary == 300


def test_every_option_arrives(here: Path) -> None:
    (here / "rows.jsonl").write_text("".join(json.dumps({"body": f"row {i} of them"}) + "\n" for i in range(500)))
    (here / "held.jsonl").write_text('{"body": "held out"}')
    result = call(
        *("rows.jsonl", "--out", "out", "--field", "body", "--validation-data", "held.jsonl", "--jobs", "1"),
        *("--max-mb", "0.002", "--token-type", "uint32", "--end-of-text", "<|endoftext|>", "--tokenizer", "bpe"),
    )
    assert result.exit_code == 0, result.output
    manifest = open_tokens("out").manifest
    assert manifest["token_type"] == "uint32"
    assert 1900 < manifest["counts"]["bytes"] <= 2010
    assert manifest["counts"]["validation_documents"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sme.txt"], "error: no such file, folder or data set: sme.txt; the data sets are stdlib, openwebtext"),
        (["minipil"], "did you mean minipile?"),
        (["a", "b"], "2 sources have no one name; name the folder with --out"),
        (["some.txt", "--validation", "1.5"], "validation must be a share between 0 and 1, got 1.5"),
        (["some.txt", "--vocab-size", "9"], "vocabulary must be from 257"),
    ],
)
def test_errors_are_one_line_and_exit_2(here: Path, arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_the_last_line_says_what_was_left_out(here: Path) -> None:
    (here / "notes").mkdir()
    (here / "some.txt").rename(here / "notes" / "some.txt")
    (here / "notes" / "settings.json").write_text("{}")
    (here / "notes" / "a.png").write_bytes(b"")
    for _ in range(2):  # the second call finds it in the folder
        result = call("notes")
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == (
            "left out: notes/a.png (.png is not read); notes/settings.json (no objects with a text in 'text')"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_names_that_are_not_utf8_are_read_and_named(here: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (here / name).write_text(TEXT)
    result = call(name, "--out", "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("caf\\xe9.txt: ")
    (here / name).write_text("")
    for arguments, message in (
        ([name, "--out", "new"], "error: caf\\xe9.txt is empty"),
        (["some.txt", "--out", os.fsdecode(b"\xff")], "error: \\xff: the name is not UTF-8"),
        ([os.fsdecode(b"\xff.txt"), "--out", "new"], "error: no such file, folder or data set: \\xff.txt"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(message)
    assert sorted(path.name for path in here.iterdir()) == [name, "out", "some.txt"]


def test_default_names() -> None:
    names = ["stdlib", "c4", "a/mix_00.txt.xz", "folder/", "hub:owner/name:config"]
    assert [default_name([name]) for name in names] == ["stdlib", "c4", "mix_00", "folder", "name-config"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_says_that_the_same_command_goes_on(here: Path) -> None:
    (here / "big.txt").write_text("".join(f"line {i} of a long text\n" for i in range(1_500_000)))
    command = [sys.executable, "-m", "sharpwise", "prepare", "big.txt", "--jobs", "2", "--out", "out"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 60
    while not (here / "out" / "tokenizer.json").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "Stopped; the same command goes on from here."
    assert out == ""
