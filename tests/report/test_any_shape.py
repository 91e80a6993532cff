"""The files of a run's folder may hold anything: whoever reads them says so, or leaves it out, and goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from train.run_rig import half_a_run, stop_after
from typer.testing import CliRunner

from sharpwise.cli.main import create_app
from sharpwise.compare.record import read_environment, read_record
from sharpwise.train.run import run

FILES = ["environment.json", "facts.json", "status.json", "blocks.json", "metrics.jsonl", "timing.jsonl", "config.toml"]
SHAPES: dict[str, bytes] = {
    "list": b"[1]",
    "table": b"{}",
    "text": b'"x"',
    "nothing": b"",
    "null": b"null",
    "nan": b"[NaN, -Infinity]",
    "huge": b'[{"step": 1' + b"0" * 400 + b', "loss": 1' + b"0" * 400 + b"}]",
    "long": b"1" * 5000,
    "deep list": b"a = " + b"[" * 100_000,
    "deep": b"[" * 100_000,
    "deep table": b'{"a":' * 100_000,
    "bytes": b"\xff\xfe\x00",
    "half a letter": b'{"state": "failed", "step": 3, "message": "\\ud800"}',
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_a_run(tmp_path_factory.mktemp("half"))


@pytest.fixture
def place(half: Path, tmp_path: Path) -> Path:
    shutil.copytree(half, tmp_path / "runs" / "one")
    shutil.copytree(half, tmp_path / "runs" / "two")
    return tmp_path / "runs" / "one"


def call(*arguments: object) -> str:
    done = CliRunner().invoke(create_app(), [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in (0, 2)
    return done.output


@pytest.mark.parametrize("name", FILES)
def test_runs_are_listed_and_shown(place: Path, name: str) -> None:
    for data in SHAPES.values():
        (place / name).write_bytes(data)
        said = json.loads(call("runs", place.parent, "--json").partition("\nerror")[0])
        assert [line["name"] for line in said] == ["one", "two"]
        assert said[1]["step"] == 7
    for shape in ("list", "deep table", "half a letter"):
        (place / name).write_bytes(SHAPES[shape])
        said = call("page", place)
        assert said.strip().endswith("index.html") or name == "config.toml"


@pytest.mark.parametrize(
    ("key", "value"),
    [("update_relative", 3), ("update_relative", {"q": "x", "k": 1e300}), ("update_rms", [1]), ("loss", 10**400),
     ("update_rms", {"q": 1e300, "k": 10**400}), ("multipliers", 1), ("tokens", 10**400), ("lr", "x")],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)  # fmt: skip
def test_lines_of_any_shape(place: Path, key: str, value: Any) -> None:
    for name in ("metrics.jsonl", "timing.jsonl"):
        lines = [json.loads(line) for line in (place / name).read_text().splitlines()]
        changed = [{**line, **({key: value} if key in line else {"seconds": 10**400})} for line in lines]
        (place / name).write_text("".join(json.dumps(line) + "\n" for line in changed))
    assert call("page", place).strip().endswith("index.html")
    assert "one" in call("runs", place.parent)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_goes_on_whatever_its_environment_says(place: Path, shape: str) -> None:
    (place / "environment.json").write_bytes(SHAPES[shape])
    assert read_environment(place) is None or shape == "huge"
    if shape in ("list", "table", "text", "deep"):  # a second each
        assert run(None, place, trust_code=True, **stop_after(8)).step == 8
        starts = json.loads((place / "environment.json").read_text())
        assert [start["step"] for start in starts] == [8]
    if shape in ("nan", "bytes", "deep table"):
        for name in ("status.json", "facts.json", "metrics.jsonl"):
            before = (place / name).read_bytes()
            (place / name).write_bytes(SHAPES[shape])
            with pytest.raises(ValueError, match=r"the files of the run in .* are damaged"):
                read_record(place)
            (place / name).write_bytes(before)
