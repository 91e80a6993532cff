"""`sharpwise blocks`: what it prints, what it refuses, and how."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sharpwise.blocks import BlockMap
from sharpwise.cli.main import create_app
from sharpwise.installing import install_line
from sharpwise.train.models import PRESETS, load_model

CUSTOM = """
from torch import nn

def build():
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 10))

def broken():
    raise RuntimeError("no data")

def number():
    return 3

instance = nn.Linear(2, 2)
"""

GPT2_TINY = """\
gpt2-tiny: 124,672 trainable parameters in 28 tensors, 36 segments
name                     shape     role     rows     heads
──────────────────────────────────────────────────────────
transformer.wte.weight   256 x 64  tok_emb  all
  = lm_head.weight
transformer.wpe.weight   128 x 64  pos_emb  all
transformer.h.{0..1}
  ln_1.weight            64        norm     all
  ln_1.bias              64        norm     all
  attn.c_attn.weight     64 x 192  q        0:64         4
                                   k        64:128       4
                                   v        128:192      4
  attn.c_attn.bias       192       q        0:64         4
                                   k        64:128       4
                                   v        128:192      4
  attn.c_proj.weight     64 x 64   o        all
  attn.c_proj.bias       64        o        all
  ln_2.weight            64        norm     all
  ln_2.bias              64        norm     all
  mlp.c_fc.weight        64 x 256  up       all
  mlp.c_fc.bias          256       up       all
  mlp.c_proj.weight      256 x 64  down     all
  mlp.c_proj.bias        64        down     all
transformer.ln_f.weight  64        norm     all
transformer.ln_f.bias    64        norm     all

block type   roles              parameters   share
──────────────────────────────────────────────────
Emb          tok_emb, pos_emb       24,576   19.7%
Norm         norm                      640    0.5%
QK           q, k                   16,640   13.3%
VO           v, o                   16,640   13.3%
FFN          up, down               66,176   53.1%
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "custom_model.py").write_text(CUSTOM)
    yield
    sys.modules.pop("custom_model", None)


def lines(text: str) -> str:
    """Without the blanks that Rich fills its tables with."""
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(create_app(), ["blocks", *arguments])


def test_table_of_a_preset() -> None:
    result = run("gpt2-tiny")
    assert (result.exit_code, result.stderr) == (0, "")
    assert lines(result.stdout) == GPT2_TINY


@pytest.mark.parametrize("model", sorted(PRESETS))
def test_every_preset_is_known_and_fits_80_columns(model: str) -> None:
    result = run(model, "--strict")
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    # Nothing is folded: every line of a parameter ends a word that a parameter ends in.
    names = [line.split()[0] for line in result.stdout.splitlines() if " norm " in line]
    assert names
    assert all(name.endswith((".weight", ".bias")) for name in names if name != "Norm")


@pytest.mark.parametrize(
    ("model", "parameters", "heads"),
    [
        ("gpt2", "124,439,808", {12}),
        ("gpt2-medium", "354,823,168", {16}),
        ("gpt2-large", "774,030,080", {20}),
        ("gpt2-xl", "1,557,611,200", {25}),
        ("llama-2-7b", "6,738,415,616", {32}),
        ("llama-3-8b", "8,030,261,248", {32, 8}),
        ("pythia-160m", "162,322,944", {12}),
    ],
)
def test_presets_have_the_published_sizes(model: str, parameters: str, heads: set[int]) -> None:
    block_map = BlockMap.of(load_model(model, device="meta"))
    assert f"{sum(s.numel for s in block_map):,}" == parameters
    assert {s.heads for s in block_map} - {None} == heads


def test_json_is_the_block_map() -> None:
    result = run("llama-tiny", "--json")
    assert result.exit_code == 0
    assert BlockMap.from_json(result.stdout) == BlockMap.of(load_model("llama-tiny", device="meta"))


def test_all_shows_every_segment() -> None:
    result = run("gpt2-tiny", "--all")
    assert result.stdout == str(BlockMap.of(load_model("gpt2-tiny", device="meta")).table()) + "\n"


def test_unknown_parameters_are_said() -> None:
    result = run("custom_model:build", "--no-trace")
    assert result.exit_code == 0
    assert re.search(r"^\{1\.\.2\}\n  weight +4 x 4 +other +all", lines(result.stdout), re.M)
    assert "7 of 7 tensors have no known role and count as 'other'; say what they are" in result.stdout


def test_overrides() -> None:
    fields = '{"role":"q","heads":2}'
    result = run(
        "custom_model:build", "-o", "*=up", "-o", "0.weight=tok_emb", "--override", f"1.weight={fields}", "--strict"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(r"^0\n  weight +10 x 4 +tok_emb +all", lines(result.stdout), re.M)
    assert re.search(r"^1\n  weight +4 x 4 +q +all +2", lines(result.stdout), re.M)
    assert "no known role" not in result.stdout


def test_configs_of_hugging_face(tmp_path: Path) -> None:
    config = load_model("llama-tiny", device="meta").config
    config.save_pretrained(tmp_path / "model")
    expected = BlockMap.of(load_model("llama-tiny", device="meta")).to_json()
    assert run("model", "--json").stdout == expected
    assert run(str(tmp_path / "model" / "config.json"), "--json").stdout == expected


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt3"], r"unknown model 'gpt3'; give one of the presets gpt2, .*llama-tiny, a folder or \.json file"),
        (["nowhere/config.json"], r"unknown model 'nowhere/config.json'"),
        (["."], r"no config.json in this folder"),
        (["custom_model.py"], r"custom_model.py: not JSON \(.*\); expected a Hugging Face config"),
        (["empty.json"], r"empty.json: no 'model_type'; expected a Hugging Face config"),
        (["strange.json"], r"strange.json: transformers .* has no model_type 'strange'"),
        (["vision.json"], r"vision.json: model_type 'vit' has no causal language model .*give module:function"),
        (["heads.json"], r"heads.json: transformers cannot build this config: .*divisible by num_heads"),
        (["words.json"], r"words.json: transformers cannot build this config: .*'hidden_size' expected int, got str"),
        (["no_such_module:build"], r"no module 'no_such_module' here or among the installed ones; .*gpt2-tiny"),
        (["custom_model:nothing"], r"module 'custom_model' has no 'nothing'"),
        (["custom_model:broken"], r"custom_model:broken: the function raised RuntimeError: no data"),
        (["custom_model:number"], r"the function returned a int, expected a torch.nn.Module"),
        (["custom_model:instance"], r"'instance' is a Linear, expected a function that returns a module"),
        (["failing:build"], r"failing:build: importing failing failed: ZeroDivisionError"),
        (["importing:build"], r"importing:build: importing importing failed: No module named 'no_such_dependency'"),
        (["gpt2-tiny", "-o", "up"], r"--override 'up': expected GLOB=ROLE"),
        (["gpt2-tiny", "-o", "=up"], r"--override '=up': expected GLOB=ROLE"),
        (["gpt2-tiny", "-o", "*.[ab].c=up"], r"override '\*\.\[ab\]\.c' matches none of 28 parameters"),
        (
            ["gpt2-tiny", "-o", "*=queries"],
            r"override '\*': unknown role 'queries'; roles are tok_emb, pos_emb, patch_emb",
        ),
        (["gpt2-tiny", "-o", "*={role:q}"], r"--override '\*=\{role:q\}': not JSON .*; expected a role or a segment's"),
        (
            ["custom_model:build", "--strict", "--no-trace"],
            r"7 parameters have no known role: \{0\.\.3\}\.weight, .* --override '\S+=\w+', .*or no --strict to",
        ),
    ],
)
def test_errors_are_one_message_on_stderr(arguments: list[str], message: str) -> None:
    write("empty.json", "{}")
    write("strange.json", '{"model_type":"strange"}')
    write("vision.json", '{"model_type":"vit"}')
    write("heads.json", '{"model_type":"gpt2","n_embd":10,"n_head":3}')
    write("words.json", '{"model_type":"llama","hidden_size":"x"}')
    write("failing.py", "1 / 0")
    write("importing.py", "import no_such_dependency")
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.match(r"error: .*" + message, result.stderr)
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1


def shell(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        timeout=120,
        check=False,
    )


def test_as_a_program() -> None:
    done = shell("-m", "sharpwise.cli.main", "blocks", "gpt2-tiny", FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b[3" not in done.stdout  # NO_COLOR wins over a terminal: bold at most
    failed = shell("-m", "sharpwise.cli.main", "blocks", "gpt3")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: unknown model 'gpt3'")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from sharpwise.cli.main import main; main()"
    done = shell("-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: the command line needs {missing}, which is not installed: {install_line('cli')}\n"


def test_without_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; sys.argv[1:] = ['blocks', 'gpt2']; "
    done = shell("-c", code + "from sharpwise.cli.main import main; main()")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: model 'gpt2' needs transformers, which is not installed: {install_line('hf')}\n"


def test_blocks_import_nothing_heavy() -> None:
    code = "import sys, sharpwise.blocks; print([m for m in ('transformers', 'typer', 'rich') if m in sys.modules])"
    assert shell("-c", code).stdout == "[]\n"


def test_help_and_version() -> None:
    runner = CliRunner()
    overview = runner.invoke(create_app(), ["--help"])
    assert overview.exit_code == 0
    assert "blocks" in overview.stdout
    assert re.fullmatch(r"sharpwise \d+\.\d+.*\n", runner.invoke(create_app(), ["--version"]).stdout)
    options = runner.invoke(create_app(), ["blocks", "--help"]).stdout
    assert all(option in options for option in ("MODEL", "--override", "--json", "--strict", "--all"))
    assert runner.invoke(create_app(), ["blocks"]).exit_code == 2
