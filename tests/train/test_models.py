"""Presets against the sizes that were published, and settings on top of presets, configs and functions."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sharpwise.model_facts import count_parameters, max_context, vocabulary_of
from sharpwise.train import presets
from sharpwise.train.models import PRESETS, load_model, usable_settings

# All parameters, embedding and head included, tied ones once: so count all of these sources.
PUBLISHED = {
    "gpt2": "124.4M",
    "gpt2-medium": "354.8M",
    "gpt2-large": "774.0M",
    "gpt2-xl": "1557.6M",
    "llama-134m": "133.9M",
    "llama-230m": "228.3M",
    "llama-250m": "237.3M",
    "llama-500m": "522.0M",
    "llama-750m": "743.4M",
    "tinyllama-1.1b": "1175.0M",
    "llama-2-7b": "6738.4M",
    "llama-3-8b": "8030.3M",
    "llama-3.2-3b": "3212.7M",
    "pythia-160m": "162.3M",
}
# For these the papers give a name and a shape, and the facts no count. What the shapes hold: all, and all without
# embeddings (the head, untied, stays). "90m" is further from its name than rounding explains; "60m" is 59.7M of the
# second kind, "135m" 134.3M of the first; "350m", "1b" and "3b" are neither.
NAMED = {
    "llama-90m": ("96.1M", "57.5M"),
    "llama-900m": ("898.3M", "817.8M"),
    "llr-60m": ("84.4M", "59.7M"),
    "llr-135m": ("134.3M", "109.6M"),
    "llr-350m": ("368.2M", "335.3M"),
    "llr-1b": ("1339.6M", "1273.8M"),
    "llr-3b": ("2686.5M", "2604.2M"),
}
# The names count the layers. Of the second number, LLaMA's also has the head.
SMALL = {
    "gpt2-0.4m": (953_856, 396_800),
    "gpt2-1m": (1_629_792, 1_003_104),
    "gpt2-3m": (4_273_664, 3_159_552),
    "gpt2-10m": (12_318_720, 10_647_552),
    "gpt2-30m": (33_753_088, 31_524_864),
    "llama-0.4m": (1_450_624, 926_336),
    "llama-1m": (2_176_272, 1_586_448),
    "llama-3m": (5_261_568, 4_212_992),
    "llama-10m": (13_767_552, 12_194_688),
    "llama-30m": (35_826_176, 33_729_024),
    "gpt2-tiny": (124_672, 100_096),
    "llama-tiny": (125_248, 108_864),
}


def millions(count: int) -> str:
    return f"{count / 1e6:.1f}M"


def test_every_preset_is_in_a_list() -> None:
    assert set(PRESETS) == {*PUBLISHED, *NAMED, *SMALL}
    assert presets.PRESETS is PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name: str) -> None:
    model = load_model(name, device="meta")
    total, without_embeddings = count_parameters(model)
    if name in PUBLISHED:
        assert millions(total) == PUBLISHED[name]
    elif name in NAMED:
        assert (millions(total), millions(without_embeddings)) == NAMED[name]
    else:
        assert (total, without_embeddings) == SMALL[name]


@pytest.mark.parametrize("name", PRESETS)
def test_what_presets_have_in_common(name: str) -> None:
    model = load_model(name, device="meta")
    config = model.config
    assert not any(getattr(config, f"{where}_pdrop", 0.0) for where in ("resid", "embd", "attn"))
    assert not any(type(module).__name__ == "Dropout" and module.p for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert bool(biases) == (config.model_type != "llama")
    assert config.tie_word_embeddings == (config.model_type == "gpt2" or name == "llama-3.2-3b")
    if name in SMALL and not name.endswith("tiny"):
        assert (vocabulary_of(model), max_context(model)) == (4096, 256)
    if name.startswith("llr-"):
        assert vocabulary_of(model) == 32128
        assert config.hidden_size // config.num_attention_heads == (80 if name == "llr-3b" else 64)


def test_a_llama_of_3_billion_by_hand() -> None:
    width, layers, head, heads, kv, ffn, vocabulary = 3072, 28, 128, 24, 8, 8192, 128256
    layer = 2 * width * head * heads + 2 * width * head * kv + 3 * width * ffn + 2 * width
    model = load_model("llama-3.2-3b", device="meta")
    assert count_parameters(model)[0] == layers * layer + width + vocabulary * width
    assert model.config.rope_parameters["rope_theta"] == 500000.0


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
@pytest.mark.parametrize("context", ["context", "max_position_embeddings"])
def test_settings_override_a_preset(name: str, context: str) -> None:
    model = load_model(name, settings={"vocab_size": 100, context: 32, "attn_implementation": "eager"})
    assert (vocabulary_of(model), max_context(model)) == (100, 32)
    assert model.config._attn_implementation == "eager"
    assert model(torch.arange(64).view(2, 32)).logits.shape == (2, 32, 100)
    assert load_model(name).config.vocab_size == 256  # the table is as it was


def test_settings_override_a_config(tmp_path: Path) -> None:
    load_model("gpt2-tiny", device="meta").config.save_pretrained(tmp_path)
    model = load_model(tmp_path, settings={"n_positions": 16})
    assert model.transformer.wpe.weight.shape == (16, 64)
    # The file may use another of the names; the setting still counts.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    assert max_context(load_model(tmp_path, settings={"n_positions": 16})) == 16


def test_the_dtype_is_that_of_training_and_not_of_the_file(tmp_path: Path) -> None:
    config = load_model("llama-tiny", device="meta", settings={"dtype": "bfloat16"}).config
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    model = load_model(tmp_path, settings={"dtype": "bfloat16"})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_special_tokens_outside_a_smaller_vocabulary_go(caplog: pytest.LogCaptureFixture) -> None:
    config = load_model("gpt2", device="meta", settings={"vocab_size": 256}).config
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    config = load_model("llama-3-8b", device="meta", settings={"vocab_size": 256, "eos_token_id": 3}).config
    assert (config.bos_token_id, config.eos_token_id) == (None, 3)
    assert not caplog.records


def test_rotations_are_set_by_either_name(tmp_path: Path) -> None:
    assert load_model("llama-tiny", settings={"rope_theta": 7.0}).config.rope_parameters["rope_theta"] == 7.0
    load_model("llama-tiny", settings={"rope_theta": 7.0}).config.save_pretrained(tmp_path)
    # This file has rope_parameters, over which rope_theta would be lost.
    with pytest.raises(ValueError, match=r"no field 'rope_theta'"):
        load_model(tmp_path, settings={"rope_theta": 8.0})
    wanted = {"rope_type": "default", "rope_theta": 8.0}
    assert load_model(tmp_path, settings={"rope_parameters": wanted}).config.rope_parameters == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab": 3}, r"model 'gpt2-tiny': the config of model_type 'gpt2' has no field 'vocab'"),
        ({"vocab_sise": 3}, r"'vocab_sise' \(did you mean 'vocab_size'\?\); fields are those of .*GPT2Config"),
        ({"torch_dtype": "float32"}, r"no field 'torch_dtype' \(did you mean 'dtype'\?\)"),
        ({"rope_theta": 1.0}, r"no field 'rope_theta'"),
        ({"model_type": "llama"}, r"no field 'model_type'"),
        ({"context": 8, "n_positions": 9}, r"set twice, under two of its names: context, n_positions; give one"),
        ({"vocab_size": "many"}, r"transformers cannot build this config: .*'vocab_size' expected int, got str"),
        ({"attn_implementation": "fast"}, r"transformers cannot build this config: .*sdpa"),
    ],
)
def test_settings_that_a_config_refuses(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model("gpt2-tiny", settings=settings)


def test_a_config_without_positions_has_no_context(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type":"bloom","hidden_size":8,"n_head":2,"n_layer":1}')
    with pytest.raises(ValueError, match=r"'bloom' has no maximum of positions; leave out 'context'"):
        load_model(tmp_path, device="meta", settings={"context": 8})
    assert max_context(load_model(tmp_path, device="meta")) is None


CUSTOM = """
from torch import nn

def build(vocab_size, context=8, *, width=4):
    return nn.Sequential(nn.Embedding(vocab_size, width), nn.Linear(width, context))

def anything(**fields):
    return nn.Linear(1, len(fields))

def nothing():
    return nn.Linear(1, 1)
"""


@pytest.fixture
def in_a_folder_with_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "functions_of_a_user.py").write_text(CUSTOM)
    yield
    sys.modules.pop("functions_of_a_user", None)


@pytest.mark.usefixtures("in_a_folder_with_functions")
def test_settings_are_arguments_of_a_function() -> None:
    model = load_model("functions_of_a_user:build", settings={"vocab_size": 10, "width": 6})
    assert [tuple(p.shape) for p in model.parameters()] == [(10, 6), (8, 6), (8,)]
    assert load_model("functions_of_a_user:anything", settings={"a": 1, "b": 2}).out_features == 2
    assert (vocabulary_of(model), max_context(model)) == (None, None)


@pytest.mark.usefixtures("in_a_folder_with_functions")
def test_usable_settings() -> None:
    settings = {"vocab_size": 3, "attn_implementation": "eager"}
    assert usable_settings("functions_of_a_user:build", settings) == {"vocab_size": 3}
    assert usable_settings("functions_of_a_user:nothing", settings) == {}
    assert usable_settings("functions_of_a_user:anything", settings) == settings
    assert usable_settings("gpt2-tiny", settings) == settings
    assert usable_settings("no_such_model", settings) == settings  # load_model says so


@pytest.mark.usefixtures("in_a_folder_with_functions")
@pytest.mark.parametrize(
    ("function", "settings", "message"),
    [
        ("nothing", {"vocab_size": 3}, r"nothing: the function has no parameter 'vocab_size', and it alone knows"),
        ("build", {"vocab_size": 3, "contxt": 3}, r"no parameter 'contxt' \(did you mean 'context'\?\)"),
        ("build", {}, r"build: the function raised TypeError: build\(\) missing 1 required positional"),
    ],
)
def test_settings_that_a_function_refuses(function: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(f"functions_of_a_user:{function}", settings=settings)


@pytest.mark.parametrize(
    ("spec", "near"), [("gpt2-medum", "gpt2-medium"), ("LLaMA-2-7B", "llama-2-7b"), ("llama-7b", "llama-2-7b")]
)
def test_a_misspelt_preset(spec: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"^unknown model '{spec}' \(did you mean '{near}'\?\); give one of the pre"):
        load_model(spec)
