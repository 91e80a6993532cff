"""`sharpwise memory`: table, JSON, page, and what it says of bad input."""

import json
from pathlib import Path

import pytest
from report.parse import parse
from typer.testing import CliRunner

from sharpwise.cli.main import create_app
from sharpwise.memory import plan
from sharpwise.train.models import load_model


def run(*words: str):
    return CliRunner().invoke(create_app(), ["memory", *words])


def test_the_table_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run("llama-2-7b", "--gpus", "8", "--fits", "80GB")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "llama-2-7b: 6,738,415,616 trainable parameters. On each of 8 GPUs, FSDP2."
    (adamw,) = [line.split() for line in lines if line.split()[:2] == ["adamw", "fp32"]]
    assert adamw[2:4] == ["6.28", "GiB"] and adamw[-1] == "x" and int(adamw[-2]) >= 1
    assert sum(line.split()[:1] == ["sgd"] for line in lines) == 1  # without state, storages are alike


def test_json_is_the_plan() -> None:
    result = run("gpt2-tiny", "--json", "--micro-batch", "4", "--optimizer", "adam*", "--fits", "1GB")
    found = json.loads(result.stdout)
    mine = plan(load_model("gpt2-tiny", device="meta"), precision="bf16-autocast", micro_batch=4)
    states = {(own.optimizer, own.storage): own.state for own in mine.combinations}
    got = {(own["optimizer"], own["storage"]): own["state"] for own in found["combinations"]}
    assert got == {key: state for key, state in states.items() if key[0].startswith("adam")}
    assert found["activations"] == mine.activations and all(own["fits"] for own in found["combinations"])


def test_a_config_and_a_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4}))
    for spec in (str(tmp_path), str(tmp_path / "config.json")):
        assert json.loads(run(spec, "--json").stdout)["parameters"]["pos_emb"] == 1024 * 64
    assert json.loads(run("opt", "--json", "--optimizer", "lion").stdout)["parameters"]["q"] > 0


def test_the_page_has_it_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    assert run("gpt2-tiny", "--page", str(path), "--fits", "1MB").exit_code == 0
    page = path.read_text()
    assert "adam-mini int8-dynamic" in page and "What a GPU holds" in page and "largest micro-batch" in page
    order = ("gpt2-tiny: ", " of state with adamw, ", "Into 976.56 KiB", "trainable parameters", "What a GPU holds",
             "State by role", "What to do next", "--data DATA --budget 1x")  # fmt: skip
    text = parse(page).text
    places = [text.find(part) for part in order]
    assert -1 not in places and places == sorted(places)
    assert page.count('role="img"') == 2 and "http" not in page.split("<main>")[1].split("<script")[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gpt2-tiny", "--fits"], "Option '--fits' requires an argument"),
        (["gpt2-tiny", "--fits", "80"], "got '80', expected a size with its unit"),
        (["gpt2-tiny", "--fits", "much"], "got 'much', expected a size with its unit"),
        (["gpt2-tiny", "--gpus", "0"], "processes must be a whole number >= 1, got 0"),
        (["gpt2-tiny", "--shard", "zero3"], "shard must be one of replicate, fsdp, tp, got 'zero3'"),
        (["gpt2-tiny", "--optimizer", "adafactor"], "--optimizer adafactor: no optimizer is called so"),
        (["gpt2-tiny", "--gpus", "2", "--shard", "tp"], "no plan for tensor parallelism"),
        (["gpt2-tiny", "--context", "500"], "context=500, and the model has 128 positions"),
        (["gpt3"], "unknown model 'gpt3'"),
        (
            ["meta/llama"],
            "unknown model 'meta/llama': there is no such file or folder, and nothing is fetched",
        ),
        (["models_of_mine:reads"], "it is called on the meta device, where tensors have shapes and no values"),
    ],
)
def test_bad_input(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "import torch\n\ndef reads():\n    torch.zeros(3).sum().item()\n    return torch.nn.Linear(2, 2)\n"
    Path("models_of_mine.py").write_text(source)
    result = run(*words)
    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_a_model_without_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("plain_of_mine.py").write_text("import torch\n\ndef linear():\n    return torch.nn.Linear(8, 8)\n")
    said = run("plain_of_mine:linear").stdout
    assert "Activations are not known" in said and "Not adam-mini. AdamMini: rule 'adam-mini' distinguishes" in said
