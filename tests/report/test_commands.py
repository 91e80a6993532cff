"""`sharpwise runs` and `sharpwise page` from their arguments to what they print."""

import fcntl
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from report.canned import write_run
from sharpwise.cli.main import create_app
from sharpwise.report.listing import find_runs, list_runs


def _call(*arguments: object, columns: int = 80) -> Result:
    return CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(create_app(), list(map(str, arguments)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write_run(folder / "run-10", steps=40)
    write_run(folder / "run-9", steps=40, until=20, block_lr="layer_decay")
    write_run(folder / "nested" / "deep" / "bad", steps=40, diverged_at=12, block_lr="")
    write_run(folder / "run-10" / "checkpoints" / "not-a-run", steps=3)
    write_run(folder / ".hidden", steps=3)
    (folder / "demo").mkdir()
    return folder


def test_runs_are_found_in_order_and_not_in_each_other(folder: Path) -> None:
    assert [str(path.relative_to(folder)) for path in find_runs(folder)] == ["nested/deep/bad", "run-9", "run-10"]
    assert find_runs(folder / "run-9") == [folder / "run-9"]


def test_the_table_fits_80_columns(folder: Path) -> None:
    with (folder / "run-9" / "run.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        outcome = _call("runs", folder)
    assert outcome.exit_code == 0, outcome.output
    shared, *lines = outcome.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert shared == "model of all runs: gpt2-0.4m"
    assert lines[0].split() == ["run", "optimizer", "lr", "step", "loss", "valid.", "tok/s", "state"]
    wide = {line.split()[0]: line for line in _call("runs", folder, columns=140).stdout.splitlines()[3:]}
    assert wide["run-10"].split()[1:6] == ["adamw", "+", "blockwise", "0.003", "40"]
    assert wide["run-10"].split()[-1] == "finished"
    assert "12/40" in wide["nested/deep/bad"]
    assert wide["nested/deep/bad"].split()[-1] == "diverged"
    assert "running" in outcome.stdout
    assert wide["run-9"].split()[-1] == "killed"


def test_long_names_break_after_their_signs(tmp_path: Path) -> None:
    for name, model in (("adamw-reversed_blockwise_-0003/seed-3", "gpt2-0.4m"), ("b", "some/Model-of-3.2-1B-letters")):
        write_run(tmp_path / "a-study-of-mine" / "runs" / name, steps=20000, until=100, model=model)
    shared, *lines = _call("runs", tmp_path).stdout.splitlines()
    assert shared == "optimizer of all runs: adamw + blockwise"
    assert max(map(len, lines)) <= 80
    parts = [line[: lines[0].index("model") - 1].strip() for line in lines[2:]]
    assert "".join(parts) == "a-study-of-mine/runs/adamw-reversed_blockwise_-0003/seed-3a-study-of-mine/runs/b"
    assert all(part[-1] in "-_/" for part in parts if part and not part.endswith(("seed-3", "b")))


def test_json_has_all_of_it(folder: Path) -> None:
    lines = {line["name"]: line for line in json.loads(_call("runs", folder, "--json").stdout)}
    assert list(lines) == ["nested/deep/bad", "run-9", "run-10"]
    last = json.loads((folder / "run-10" / "metrics.jsonl").read_text().splitlines()[-1])
    line = lines["run-10"]
    assert (line["loss"], line["validation_loss"], line["step"]) == (last["loss"], last["validation_loss"], 40)
    assert line["tokens_per_second"] == pytest.approx(2048 / 0.085, rel=0.1)
    assert lines["nested/deep/bad"]["loss"] is None
    assert lines["nested/deep/bad"]["optimizer"] == "adamw"


def test_a_run_may_be_damaged_or_at_its_beginning(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps=3)
    (tmp_path / "a" / "config.toml").write_text("[")
    write_run(tmp_path / "b", steps=3)
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1, "lo')
    (tmp_path / "b" / "timing.jsonl").unlink()
    outcome = _call("runs", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    assert "config.toml: not TOML" in outcome.stderr
    lines = list_runs(tmp_path)
    assert [(line.name, line.step, line.loss, line.tokens_per_second) for line in lines] == [
        ("a", 0, None, None),
        ("b", 0, None, None),
    ]


def test_a_validation_far_back_is_found(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"step": {i}, "tokens": {i}, "loss": 2.5, "lr": 0.1}}\n' for i in range(3, 9000))
    (line,) = list_runs(tmp_path)
    assert (line.step, line.loss) == (8999, 2.5)
    assert line.validation_loss is not None
    assert math.isfinite(line.validation_loss)


def test_an_empty_folder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ((), (".",)):
        outcome = _call("runs", *arguments)
        assert outcome.exit_code == 0
        assert "Train one with `sharpwise train`" in outcome.stderr
        assert outcome.stdout == ""
    assert _call("runs", "--json").stdout == "[]\n"


@pytest.mark.parametrize(("name", "message"), [("nothing", "no such folder"), ("file", "is a file")])
@pytest.mark.parametrize("command", ["runs", "page"])
def test_a_folder_that_is_none_is_an_error(command: str, name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = _call(command, tmp_path / name)
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: ")
    assert message in outcome.stderr
    assert "Traceback" not in outcome.output


def test_page_writes_the_page_and_opens_it_if_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    outcome = _call("page", folder / "run-9")
    assert outcome.exit_code == 0, outcome.output
    page = folder / "run-9" / "index.html"
    assert outcome.stdout == f"{page}\n"
    assert 10_000 < page.stat().st_size < 1_000_000
    assert opened == []
    assert _call("page", folder / "run-9", "--open").exit_code == 0
    assert opened == [page.as_uri()]


def test_page_refuses_what_is_no_run(folder: Path) -> None:
    outcome = _call("page", folder)
    assert outcome.exit_code == 2
    assert "is no run" in outcome.stderr


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, sharpwise\nbefore = set(sys.modules)\nimport sharpwise.report.listing\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not new & {'transformers', 'datasets', 'pandas', 'matplotlib'}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
