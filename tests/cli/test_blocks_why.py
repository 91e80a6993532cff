"""`sharpwise blocks` with `--trace`, `--explain` and `--diff`: what it says about why, and when it fails."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sharpwise.blocks import BlockMap
from sharpwise.blocks.sources import Sources
from sharpwise.blocks.trace import trace
from sharpwise.cli.main import create_app
from sharpwise.train.models import load_model

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "blocks.md"

MODELS = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def swap(model):
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj


class Swapped(LlamaForCausalLM):
    # What is called k_proj makes the values, and v_proj the keys.
    def forward(self, input_ids, use_cache=False):
        swap(self)
        try:
            return super().forward(input_ids=input_ids, use_cache=use_cache)
        finally:
            swap(self)


class Closed(LlamaForCausalLM):
    def forward(self, points, faces):
        return super().forward(points[faces])


def llama(kind):
    return kind(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
        )
    )


class Unknown(nn.Module):
    # One fused matrix whose rows are v, q, k: no family has that.
    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(40, width)
        self.mixed = nn.Linear(width, 3 * width, bias=False)
        self.back = nn.Linear(width, width)
        self.last = nn.Linear(width, 40, bias=False)
        self.spare = nn.Linear(3, 3)
        self.still = nn.Linear(3, 3).requires_grad_(False)

    def forward(self, ids):
        x = self.tokens(ids)
        v, q, k = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.mixed(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.last(x + self.back(y.transpose(1, 2).flatten(2)))


def swapped():
    return llama(Swapped)


def closed():
    return llama(Closed)


def unknown():
    return Unknown()


def lazy():
    return nn.Sequential(nn.LazyLinear(3))
"""

DIFF = """\
Names and dataflow differ about 4 of 21 parameters:

name                        by name           by dataflow       why
────────────────────────────────────────────────────────────────────────────────
model.layers.{0..1}
  self_attn.k_proj.weight   k all (2 heads)   v all (2 heads)   makes values of
                            (llama)                             attention {0..1}
  self_attn.v_proj.weight   v all (2 heads)   k all (2 heads)   makes keys of
                            (llama)                             attention {0..1}

Known by names alone: 0; by dataflow alone: 0.
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "why_models.py").write_text(MODELS)
    yield
    sys.modules.pop("why_models", None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(create_app(), ["blocks", *arguments])


def text(result: Result, code: int = 0) -> str:
    """What a run printed, without the blanks that Rich fills its tables with."""
    assert (result.exit_code, result.stderr) == (code, "")
    return "\n".join(line.rstrip() for line in result.stdout.splitlines()) + "\n"


def error(result: Result) -> str:
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def entries(printed: str) -> dict[str, dict[str, str]]:
    """The explanations: by parameter its labels and their text, folded lines joined."""
    found: dict[str, dict[str, str]] = {}
    label = ""
    for line in printed.splitlines():
        if not line.startswith(" "):
            name, _, about = line.partition("  ")
            found[name] = {"about": about}
        elif matched := re.fullmatch(r"  (\w[\w ]*): +(.*)", line):
            label = matched[1]
            found[name][label] = matched[2]
        else:
            found[name][label] += " " + line.strip()
    return found


@pytest.mark.parametrize(
    ("model", "attentions", "parameters"),
    [("gpt2-tiny", 2, 28), ("gpt2", 12, 148), ("llama-tiny", 2, 21), ("pythia-160m", 12, 148)],
)
def test_trace_says_in_one_line_that_names_and_dataflow_agree(model: str, attentions: int, parameters: int) -> None:
    plain, traced = text(run(model)), text(run(model, "--trace"))
    assert traced == plain + (
        f"Dataflow, seen in {attentions} attentions, agrees with the names about {parameters} of {parameters} "
        "parameters.\n"
    )
    assert text(run(model, "--no-trace")) == plain


def test_trace_leaves_json_alone() -> None:
    plain, traced = run("llama-tiny", "--json"), run("llama-tiny", "--json", "--trace")
    assert traced.stdout == plain.stdout
    assert traced.stderr == "Dataflow, seen in 2 attentions, agrees with the names about 21 of 21 parameters.\n"


def test_trace_of_a_model_that_no_family_knows() -> None:
    printed = text(run("why_models:unknown", "--trace"))
    assert re.search(r"^mixed\.weight +48 x 16 +v +0:16 +4\n +q +16:32 +4\n +k +32:48 +4\n", printed, re.M)
    assert printed.endswith(
        "Dataflow, seen in 1 attention, agrees with the names about 0 of 7 parameters; 5 known by dataflow alone; "
        "2 unused by the forward: spare.weight, spare.bias.\n"
    )
    assert "7 of 7 tensors have no known role" in text(run("why_models:unknown", "--no-trace"))


def test_trace_raises_where_names_and_dataflow_disagree_and_shows_both_sides() -> None:
    message = error(run("why_models:swapped", "--trace"))
    assert "names and dataflow disagree about 4 parameters" in message
    name = "model.layers.0.self_attn.k_proj.weight"
    assert f"{name}: by name (llama) k all (2 heads); by dataflow v all (2 heads)\n" in message
    assert "--override 'model.layers.0.self_attn.k_proj.weight=k'; or go by names alone: --no-trace" in message
    # The same without the option, as tracing a small model costs little; names alone are told nothing.
    assert error(run("why_models:swapped")) == message
    assert "self_attn.k_proj.weight          16 x 32  k " in text(run("why_models:swapped", "--no-trace"))
    # An override of all that differ settles it.
    settled = text(run("why_models:swapped", "--trace", "-o", "*.k_proj.weight=v", "-o", "*.v_proj.weight=k"))
    assert "17 of 21 parameters; 4 differ and are overridden: model.layers.{0..1}.self_attn.k_proj" in settled


def test_diff_of_models_that_agree() -> None:
    for model, count in (("gpt2-tiny", 28), ("llama-tiny", 21)):
        expected = f"Names and dataflow agree about all {count} parameters.\n"
        assert text(run(model, "--diff")) == expected + "Known by names alone: 0; by dataflow alone: 0.\n"


def test_diff_shows_what_differs_and_exits_with_1() -> None:
    assert text(run("why_models:swapped", "--diff"), 1) == DIFF
    assert "model.layers.{" not in text(run("why_models:swapped", "--diff", "--all"), 1)


@pytest.mark.parametrize("columns", ["80", "120"])
def test_diff_fits_the_screen(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    printed = text(run("why_models:swapped", "--diff"), 1)
    assert max(map(len, printed.splitlines())) <= int(columns)
    assert "  self_attn.k_proj.weight " in printed


def test_diff_as_json() -> None:
    result = run("why_models:swapped", "--diff", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    found = json.loads(result.stdout)
    first = found["differ"][0]
    assert {**first, "why": ""} == {
        "name": "model.layers.0.self_attn.k_proj.weight",
        "shape": [16, 32],
        "by_name": [{"role": "k", "layer": 0, "heads": 2, "source": "llama"}],
        "by_dataflow": [{"role": "v", "layer": 0, "heads": 2, "source": "trace"}],
        "why": "",
    }
    assert "attention 0" in first["why"]
    assert len(found["agree"]) == 17
    assert [found[key] for key in ("overridden", "names_alone", "dataflow_alone", "neither", "unused")] == [[]] * 5

    result = run("why_models:unknown", "--diff", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["dataflow_alone"] == ["tokens.weight", "mixed.weight", "back.weight", "back.bias", "last.weight"]
    assert found["unused"] == found["neither"] == ["spare.weight", "spare.bias"]


def test_diff_of_a_model_that_no_family_knows() -> None:
    assert text(run("why_models:unknown", "--diff")) == (
        "No parameter is known both by name and by dataflow.\n"
        "Known by names alone: 0; by dataflow alone: 5; by neither: 2; unused by the\n"
        "forward: spare.weight, spare.bias.\n"
    )


def test_diff_leaves_to_an_override_what_it_decides() -> None:
    printed = text(run("why_models:swapped", "--diff", "-o", "*.k_proj.weight=v"), 1)
    assert printed.startswith("Names and dataflow differ about 2 of 21 parameters:\n")
    assert "  self_attn.v_proj.weight " in printed
    assert "They differ about 2 that an override decides:" in printed
    printed = text(run("why_models:swapped", "--diff", "-o", "*.[kv]_proj.weight=v"))
    assert printed.startswith("Names and dataflow agree about the other 17 parameters.\nThey differ about 4 that an")


def test_explain_a_fused_matrix_and_a_tied_embedding() -> None:
    why = trace(load_model("gpt2-tiny", device="meta")).why
    found = entries(text(run("gpt2-tiny", "--explain", "*.1.attn.c_attn.weight", "--explain", "lm_head.weight")))
    assert found == {
        "transformer.wte.weight": {
            "about": "256 x 64, tied to lm_head.weight",
            "by name": "gpt2 says tok_emb all",
            "by dataflow": f"{why['transformer.wte.weight']}, tok_emb all",
            "holds": "tok_emb all, block type Emb",
        },
        "transformer.h.1.attn.c_attn.weight": {
            "about": "64 x 192, layer 1, rows along dimension 1",
            "by name": "gpt2 says q 0:64 (4 heads), k 64:128 (4 heads), v 128:192 (4 heads)",
            "by dataflow": f"{why['transformer.h.1.attn.c_attn.weight']}, "
            "q 0:64 (4 heads), k 64:128 (4 heads), v 128:192 (4 heads)",
            "holds": "q 0:64 (4 heads), block type QK k 64:128 (4 heads), block type QK "
            "v 128:192 (4 heads), block type VO",
        },
    }


def test_explain_what_only_dataflow_knows_and_what_nothing_does() -> None:
    found = entries(text(run("why_models:unknown", "-e", "mixed.weight", "-e", "spare.bias")))
    mixed, spare = found["mixed.weight"], found["spare.bias"]
    assert mixed["by name"] == spare["by name"] == "no family knows it"
    assert mixed["by dataflow"].endswith("attention 0, v 0:16 (4 heads), q 16:32 (4 heads), k 32:48 (4 heads)")
    assert mixed["holds"].startswith("v 0:16 (4 heads), block type VO q 16:32 (4 heads), block type QK")
    assert spare["about"] == "3, a bias"
    assert spare["by dataflow"] == "the forward does not use it"
    assert spare["holds"] == (
        "other all, block type Other; nothing explains it, say what it is with --override GLOB=ROLE"
    )


def test_explain_shows_a_difference_and_what_an_override_makes_of_it() -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    found = entries(text(run("why_models:swapped", "-e", name)))[name]
    assert found["by name"] == "llama says k all (2 heads)"
    assert found["by dataflow"].endswith("attention 1, v all (2 heads)")
    assert found["holds"] == "nothing: names and dataflow differ; say which is right with --override GLOB=ROLE"
    assert "override" not in found
    options = ("-o", "*.k_proj.weight=v", "-o", "*.1.*.k_proj.weight=up", "-o", "*.0.*=down")
    found = entries(text(run("why_models:swapped", "-e", name, *options)))[name]
    assert found["override"] == "'*.1.*.k_proj.weight' says up all"
    assert found["holds"] == "up all, block type FFN"


def test_explain_explains_20_and_counts_the_others() -> None:
    printed = text(run("gpt2-tiny", "-e", "*"))
    assert printed.count("  by name:") == 20
    assert printed.endswith("\nand 8 more; --all explains them too\n")
    assert text(run("gpt2-tiny", "-e", "*", "--all")).count("  by name:") == 28
    assert text(run("gpt2-tiny", "-e", "*.weight", "-e", "*.ln_1.weight")).count("  by name:") == 15


def test_explain_without_a_trace() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    printed = text(run("why_models:closed", "-e", name))
    told, _, rest = printed.partition("\n\n")
    assert told.startswith("Not traced: no example can be made up for Closed: its forward needs 'points'")
    assert "sharpwise.BlockMap.of(model, example=batch)" in " ".join(told.split())
    assert entries(rest)[name] == {
        "about": "48 x 32, layer 0",
        "by name": "llama says up all",
        "by dataflow": "the model was not traced",
        "holds": "up all, block type FFN",
    }
    assert text(run("why_models:closed", "-e", name, "--no-trace")) == rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["why_models:closed", "--trace"], r"trace: no example can be made up for Closed: .* sharpwise\.BlockMap\.of"),
        (["why_models:closed", "--diff"], r"trace: no example can be made up for Closed"),
        (["why_models:closed", "--trace", "-e", "*"], r"trace: no example can be made up for Closed"),
        (["why_models:lazy", "-e", "*"], r"0\.weight: a lazy parameter has no shape yet"),
        (["why_models:unknown", "-e", "mixt.weight"], r"--explain 'mixt\.weight': no such .* among 7; closest: mixed"),
        (["gpt2-tiny", "-e", "€"], r"--explain '€': no such parameter among 28; names are transformer\.wte\.weight, "),
        (["gpt2-tiny", "-e", "*.norm.*"], r"--explain '\*\.norm\.\*': no such parameter among 28; closest: "),
        (["why_models:unknown", "-e", "still.*"], r"--explain 'still\.\*': frozen, and frozen parameters have no"),
        (["gpt2-tiny", "-e", "*", "-o", "nothing=up"], r"override 'nothing' matches none of 28 parameters"),
        (["gpt2-tiny", "--diff", "-o", "nothing=up"], r"override 'nothing' matches none of 28 parameters"),
        (["gpt2-tiny", "--diff", "-e", "*"], r"--explain and --diff are two views; give one of them"),
        (["gpt2-tiny", "--diff", "--no-trace"], r"--diff compares names with dataflow; leave out --no-trace"),
        (["gpt2-tiny", "-e", "*", "--json"], r"--explain has no JSON"),
        (["gpt2-tiny", "-e", "*", "--strict"], r"--strict fails where the map does"),
        (["gpt2-tiny", "--diff", "--strict"], r"--strict fails where the map does"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_errors_are_one_message_on_stderr(arguments: list[str], message: str) -> None:
    printed = error(run(*arguments))
    assert re.match("error: " + message, printed)
    assert printed.count("\n") == 1


def test_the_page_of_blocks_shows_what_is_printed() -> None:
    shown = re.findall(r"^\$ sharpwise blocks (.+)\n((?:(?!\$ |```).*\n)*)", PAGE.read_text(), re.M)
    assert len(shown) >= 3
    for command, expected in shown:
        arguments, pipe, tail = command.partition(" | ")
        assert tail in ("", "tail -n 1")
        printed = text(run(*shlex.split(arguments)))
        assert (printed.splitlines()[-1] + "\n" if pipe else printed) == expected


def test_sources_and_the_map_of_them() -> None:
    model = load_model("llama-tiny", device="meta")
    sources = Sources.of(model, ask=True)
    assert BlockMap.of_sources(sources) == BlockMap.of(model)
    assert {key: len(names) for key, names in sources.standing().items()} == {
        "agree": 21,
        "differ": 0,
        "names": 0,
        "dataflow": 0,
        "neither": 0,
    }
    names = Sources.of(model, ask=False)
    assert names.traced is None
    assert len(names.standing()["names"]) == 21
    assert names.seen("lm_head.weight") is None
