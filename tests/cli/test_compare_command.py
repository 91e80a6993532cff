"""`sharpwise compare` and `sharpwise demo` from their arguments to their files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from sharpwise.cli.compare import _budget
from sharpwise.cli.main import create_app
from sharpwise.cli.malloc import keep_large_blocks
from sharpwise.compare import budget, demo
from sharpwise.compare.recipes import find_recipe, list_recipes
from sharpwise.compare.report.text import headline
from sharpwise.compare.study import make_study
from sharpwise.train.config_file import read_given
from sharpwise.train.data import prepare_tokens

TEXT = "".join(f"def function_{i}(x):\n    return x + {i * i}\n\n" for i in range(3000))
TINY = ["--set", "data.context=16", "--set", "batch.sequences=2", "--set", "validation.sequences=4"]


def _sharpwise(*arguments: object) -> Result:
    return CliRunner().invoke(create_app(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    prepare_tokens([folder / "text.txt"], folder / "tokens", vocabulary=300, validation=0.1)
    return folder / "tokens"


def _arguments(data: Path, out: Path) -> list[object]:
    return ["--model", "train.kill_rig:build", "--data", data, "--out", out, "--jobs", 1, "--seeds", 2, *TINY]


def test_a_study_by_flags_goes_from_arms_to_page(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    outcome = _sharpwise("compare", "adamw", "adamw+blockwise", "--budget", "1600", *_arguments(data, out))
    assert outcome.exit_code == 0, outcome.output
    assert "2 arms, 14 to 22 runs of 1,600 tokens (50 steps), 1 at a time" in outcome.stderr.replace("\n", " ")
    assert "estimated time" in outcome.stderr
    assert "2 seeds see a difference of about" in outcome.stderr
    # A line per run, and no bar, where nobody looks on.
    lines = re.findall(r"^(\d+) of about (\d+) runs: (runs/[\w.-]+/[\w.-]+), loss \d+\.\d{4}", outcome.stderr, re.M)
    assert {out / place for _, _, place in lines} == {path.parent for path in out.glob("runs/*/*/config.toml")}
    assert [int(done) for done, _, _ in lines] == [*range(1, len(lines) + 1)]
    assert lines[-1][1] == str(len(lines))
    assert "\u2501" not in outcome.stderr
    assert "adamw+blockwise" in outcome.stdout
    assert "index.html" in outcome.stdout
    assert {"index.html", "result.json", "result.csv", "study.toml", "study.db", "runs"} <= {
        p.name for p in out.iterdir()
    }
    found = json.loads((out / "result.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["adamw", "adamw+blockwise"]
    # The verdict, one list of caveats, the next command: as on the page.
    said = " ".join(outcome.stdout.split())
    parts = (headline(found), "Before you believe it", *found["caveats"], "What to do next", found["next"]["command"])
    places = [said.index(part) for part in (*parts, "The page:")]
    assert places == sorted(places) and places[0] == 0
    # What was tuned is a configuration to train by.
    config = out / found["arms"][1]["final"][0]["folder"] / "config.toml"
    assert _sharpwise("train", config, "--trust-code", "--out", tmp_path / "alone").exit_code == 0
    # The same command, and the folder alone, go on with it: there is nothing left to do.
    before = (out / "study.db").read_bytes()
    for again in (
        ["adamw", "adamw+blockwise", "--budget", "1600", *_arguments(data, out)],
        ["--out", out, "--trust-code"],
    ):
        outcome = _sharpwise("compare", *again)
        assert outcome.exit_code == 0, outcome.output
    assert (out / "study.db").read_bytes() == before


def test_a_processor_that_emulates_bf16_is_named_before_the_first_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    arguments = ["adamw", "lion", "--budget", "1600", *_arguments(data, tmp_path / "out"), "--dry-run"]
    for precision, slow in (("bf16-autocast", True), ("fp32", False)):
        outcome = _sharpwise("compare", *arguments, "--set", f"compute.precision={precision}")
        assert outcome.exit_code == 0, outcome.output
        assert outcome.stderr.count("To avoid that: --set compute.precision=fp32") == slow


def test_a_study_file(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'arms = ["adamw", "lion"]\nseeds = 3\ntokens = 1600\n[run.data]\npath = "{data}"\n')
    outcome = _sharpwise("compare", path, *_arguments(data, tmp_path / "out"))
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((tmp_path / "out" / "result.json").read_text())["seeds"] == [1, 2]  # an option wins over the file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say which optimizers to compare, or which study to go on with: --out FOLDER"),
        (["--budget", "4M"], "say which optimizers to compare, as in"),
        (["adamw", "adam-mini"], "say how long a run is: --budget 4M"),
        (["adamw", "adam-mini", "--budget", "4Q"], "expected tokens, as 4000000 or 4M"),
        (["adamw", "adam-mini", "--budget", "0"], "the budget of a run must be above 0"),
        (["adamw", "adamww", "--budget", "4M"], "no optimizer is called 'adamww' (did you mean 'adamw'?)"),
        (["adamw", "adamw", "--budget", "4M"], "two arms are the same: adamw"),
        (["adamw", "lion", "--budget", "4M", "--seeds", "1"], "seeds must be 2 or more"),
        (["adamw", "lion", "--budget", "4M", "--baseline", "lino"], "(did you mean 'lion'?)"),
        (["adamw", "lion", "--budget", "4M", "--model", "gpt2-0.4n"], "unknown model 'gpt2-0.4n'"),
        (["adamw", "lion", "--budget", "4M", "--data", "nowhere"], "nowhere"),
        (["--recipe", "blockwise_lt"], "(did you mean 'blockwise_lr'?)"),
        (["nowhere.toml", "--budget", "4M"], "cannot read the study nowhere.toml"),
    ],
)
def test_what_cannot_be_meant_ends_with_a_message(
    data: Path, tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "4M" in arguments and "--data" not in arguments:
        arguments = [*arguments, "--data", str(data)]
    outcome = _sharpwise("compare", *arguments)
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.stderr.replace("\n", " ")
    assert "Traceback" not in outcome.output
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_study_is_no_arm(tmp_path: Path) -> None:
    (tmp_path / "study.toml").touch()
    outcome = _sharpwise("compare", tmp_path)
    assert outcome.exit_code == 2
    said = "is the folder of a study; to go on with it: sharpwise compare --out"
    assert said in outcome.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("4000000", {"tokens": 4_000_000}),
        ("4_000_000", {"tokens": 4_000_000}),
        ("1.5M", {"tokens": 1_500_000}),
        ("2b", {"tokens": 2_000_000_000}),
        ("0.5x", {"ratio": 0.5}),
    ],
)
def test_budgets(text: str, budget: dict[str, Any]) -> None:
    assert _budget(text) == budget


def test_every_recipe_is_a_study() -> None:
    assert "blockwise_lr" in list_recipes()
    for name in [*list_recipes(), "blockwise_lr/gpu"]:
        study = make_study(read_given(find_recipe(name)))
        assert len(study.arms) >= 2


def test_ctrl_c_keeps_what_was_trained(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    arguments = ["compare", "adamw", "lion", "--budget", "64000", *_arguments(data, out)]
    command = [sys.executable, "-m", "sharpwise", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True, env=environment)
        try:
            deadline = time.monotonic() + 120
            while not list(out.glob("runs/*/*/metrics.jsonl")) and time.monotonic() < deadline:
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = log.read_text()
    assert "what was trained is kept, and the same command goes on" in said
    assert "Traceback" not in said


# --- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that trains in milliseconds."""
    settings = {"n_layer": 1, "n_embd": 16, "n_head": 2, "context": 16}
    monkeypatch.setattr(demo, "MODEL", {"name": "gpt2-0.4m", "settings": settings})
    monkeypatch.setattr(demo, "VOCABULARY", 300)
    monkeypatch.setattr(demo, "SEQUENCES", 2)
    monkeypatch.setattr(demo, "CONTEXT", 16)
    monkeypatch.setattr(demo, "SEEDS", 2)


@pytest.mark.usefixtures("tiny")
def test_the_demo_from_text_to_page_and_again(tmp_path: Path) -> None:
    text = tmp_path / "code.txt"
    text.write_text(TEXT)
    out = tmp_path / "out"
    outcome = _sharpwise("demo", "--data", text, "--out", out, "--steps", 50, "--jobs", 1)
    assert outcome.exit_code == 0, outcome.output
    found = json.loads((out / "result.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == list(demo.ARMS)
    assert found["data"]["source"] == "code.txt"
    state = {arm["name"]: arm["state_bytes"] for arm in found["arms"]}
    assert state["adam-mini"] < 0.6 * state["adamw"]
    html = (out / "index.html").read_text(encoding="utf-8")
    for arm in demo.ARMS:
        assert arm in html
        assert arm in outcome.stdout
    before = (out / "study.db").read_bytes()
    again = _sharpwise("demo", "--data", text, "--out", out, "--steps", 50, "--jobs", 1)
    assert again.exit_code == 0, again.output
    assert (out / "study.db").read_bytes() == before
    # With a seed more it is still the demo; with other steps it is not.
    more = _sharpwise("compare", out / "study.toml", "--seeds", 3, "--out", out, "--jobs", 1)
    assert more.exit_code == 0, more.output
    again = _sharpwise("demo", "--data", text, "--out", out, "--steps", 50, "--jobs", 1)
    assert again.exit_code == 0, again.output
    assert "3 seeds" in again.stdout
    other = _sharpwise("demo", "--data", text, "--out", out, "--steps", 60, "--jobs", 1)
    assert other.exit_code == 2
    assert "holds another study" in other.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"\x00\x01\x02 binary", "zero byte at offset 0"),
        ("größe".encode("latin-1"), "not UTF-8 text: byte 0xf6"),
        (b"a few words only", "tokens"),
    ],
)
def test_a_text_that_cannot_be_used_ends_with_a_message(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    outcome = _sharpwise("demo", "--data", path, "--out", tmp_path / "out")
    assert outcome.exit_code == 2
    assert message in outcome.stderr
    assert "Traceback" not in outcome.output


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    text = tmp_path / "code.txt"
    text.write_text(TEXT)
    outcome = _sharpwise("demo", "--data", text, "--out", text / "below")
    assert outcome.exit_code == 2
    assert "error" in outcome.stderr
    assert "Traceback" not in outcome.output


def test_the_allocator_is_asked_on_glibc_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(keep_large_blocks(), bool)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_large_blocks()


# --- search of factors -----------------------------------------------------------------------------------------------


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "FEWEST_STEPS", 10)


@pytest.mark.usefixtures("short_runs")
def test_factors_are_searched_for_one_optimizer(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "roles"
    arguments = ["compare", "--tune", "roles", "--types", "Emb", "--budget", "320", *_arguments(data, out)]
    dry = _sharpwise(*arguments, "--dry-run")
    assert dry.exit_code == 0, dry.output
    said = (
        "2 arms, 13 to 21 runs of 320 tokens (10 steps), 1 at a time 6 to 10 of them search a factor for each of Emb in"
    )
    assert said in dry.stderr.replace("\n", " ") and "estimated time" in dry.stderr
    assert not out.exists() and not dry.stdout
    outcome = _sharpwise(*arguments)
    assert outcome.exit_code == 0, outcome.output
    assert said in outcome.stderr.replace("\n", " ")
    (arm,) = (arm for arm in json.loads((out / "result.json").read_text())["arms"] if arm["search"])
    stdout = " ".join(outcome.stdout.split())
    assert f"Factors found by search, adamw, searched: {len(arm['search']['runs'])} runs of at most 10;" in stdout
    if found := arm["search"]["block_lr"]:
        assert f'block_lr="{found}"' in outcome.stdout
    # What is stored says the types; the folder alone goes on, with more runs too.
    assert read_given(out / "study.toml")["arms"]["adamw, searched"]["types"] == ["Emb"]
    for again in (arguments, ["compare", "--out", out, "--trust-code"], [*arguments, "--runs", "12"]):
        outcome = _sharpwise(*again, "--dry-run")
        assert outcome.exit_code == 0, outcome.output
    assert _sharpwise(*arguments, "--runs", "6").exit_code == 2


@pytest.mark.usefixtures("short_runs")
def test_weight_decay_and_beta2_are_searched_too(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "roles"
    arguments = ["compare", "--tune", "roles", "--types", "Emb", "--of", "weight_decay, beta2", "--runs", "10"]
    arguments += ["--margin", "1e-9", "--budget", "320", *_arguments(data, out)]
    outcome = _sharpwise(*arguments)
    assert outcome.exit_code == 0, outcome.output
    said = (
        "10 to 10 of them search a factor on weight_decay for each of Emb; on beta2 for each of Emb in adamw, searched"
    )
    assert said in outcome.stderr.replace("\n", " ")
    (arm,) = (arm for arm in json.loads((out / "result.json").read_text())["arms"] if arm["search"])
    told = arm["search"]
    assert {step["of"] for step in told["steps"]} == {"weight_decay", "beta2"} and told["block_lr"] == ""
    assert arm["setting"].get("optimizer.settings_of", {}) == told["settings_of"]
    for run in told["runs"]:  # ordinary runs, whose configuration says it all
        own = read_given(out / run["folder"] / "config.toml")["optimizer"]
        assert own["settings_of"] == run["setting"].get("optimizer.settings_of", {})
    if told["settings_of"]:
        assert "params=sharpwise.param_groups(model, {'Emb': {" in outcome.stdout
    again = _sharpwise("compare", "--out", out, "--trust-code")
    assert again.exit_code == 0 and again.stdout.splitlines()[:-1] == outcome.stdout.splitlines()[:-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--of", "lr"], "--runs, --types and --of are those of a search; say --tune roles too"),
        (["--tune", "roles", "--of", "wd"], "of must be some of lr, weight_decay, beta2, each once, got ['wd']"),
        (["lion", "--tune", "roles", "--of", "lr,beta2"], "of: lion has no second moment, whose beta2"),
        (["--tune", "role"], "--tune role: expected roles, for the factor of every block type"),
        (
            ["adamw", "lion", "--tune", "roles"],
            "--tune roles takes one optimizer, as in: sharpwise compare adamw --tune",
        ),
        (["--recipe", "blockwise_lr", "--tune", "roles"], "--tune roles takes one optimizer"),
        (["some.toml", "--tune", "roles"], "--tune roles takes one optimizer"),
        (["adamw", "lion", "--runs", "30"], "--runs, --types and --of are those of a search; say --tune roles too"),
        (["--tune", "roles", "--runs", "25"], "runs must be 26 or more, got 25"),
        (["--tune", "roles", "--types", "Emb,Had"], "'Had' is no block of this model (did you mean 'Head'?)"),
        (["--tune", "roles", "--types", ""], "'' is no block of this model; it has the types Emb"),
        (["adamww", "--tune", "roles"], "no optimizer is called 'adamww' (did you mean 'adamw'?)"),
        (["adamw+blockwise", "--tune", "roles"], "a search starts at one rate for all blocks"),
    ],
)
def test_a_search_that_cannot_be_meant_ends_with_a_message(
    data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = _sharpwise("compare", *arguments, "--budget", "1600", *_arguments(data, tmp_path / "out"))
    assert outcome.exit_code == 2, outcome.output
    assert message in outcome.stderr.replace("\n", " ")
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "out").exists()
