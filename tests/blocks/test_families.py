"""Each family against a literal expectation: roles, rows, heads, layers."""

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2DoubleHeadsModel,
    GPTBigCodeConfig,
    OlmoConfig,
)

from blocks.models import NanoGPT, causal, gpt2_config, headless, llama_config, neox_config, roles, rows
from sharpwise.blocks import BlockMap, Role

by_name = partial(BlockMap.of, trace=False)

GPT2_LAYER = {
    "ln_1.weight": "norm",
    "ln_1.bias": "norm",
    "attn.c_attn.weight": "q k v",
    "attn.c_attn.bias": "q k v",
    "attn.c_proj.weight": "o",
    "attn.c_proj.bias": "o",
    "ln_2.weight": "norm",
    "ln_2.bias": "norm",
    "mlp.c_fc.weight": "up",
    "mlp.c_fc.bias": "up",
    "mlp.c_proj.weight": "down",
    "mlp.c_proj.bias": "down",
}
GPT2 = {
    "wte.weight": "tok_emb",
    "wpe.weight": "pos_emb",
    **{f"h.{i}.{name}": role for i in range(2) for name, role in GPT2_LAYER.items()},
    "ln_f.weight": "norm",
    "ln_f.bias": "norm",
}
LLAMA_LAYER = {
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
    "input_layernorm.weight": "norm",
    "post_attention_layernorm.weight": "norm",
}
LLAMA = {
    "embed_tokens.weight": "tok_emb",
    **{f"layers.{i}.{name}": role for i in range(2) for name, role in LLAMA_LAYER.items()},
    "norm.weight": "norm",
}
NEOX_LAYER = {
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "attention.query_key_value": "q k v",
    "attention.dense": "o",
    "mlp.dense_h_to_4h": "up",
    "mlp.dense_4h_to_h": "down",
}
NEOX = {
    "embed_in.weight": "tok_emb",
    **{
        f"layers.{i}.{site}.{leaf}": role
        for i in range(2)
        for site, role in NEOX_LAYER.items()
        for leaf in ("weight", "bias")
    },
    "final_layer_norm.weight": "norm",
    "final_layer_norm.bias": "norm",
}


def below(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {prefix + name: role for name, role in names.items()}


@pytest.mark.parametrize(
    ("model", "expected", "source"),
    [
        pytest.param(lambda: causal(gpt2_config()), below("transformer.", GPT2), "gpt2", id="gpt2"),
        pytest.param(lambda: headless(gpt2_config()), GPT2, "gpt2", id="gpt2 headless"),
        pytest.param(lambda: NanoGPT(), below("transformer.", GPT2), "nanogpt", id="nanogpt"),
        pytest.param(
            lambda: causal(llama_config()), below("model.", LLAMA) | {"lm_head.weight": "head"}, "llama", id="llama"
        ),
        pytest.param(lambda: headless(llama_config()), LLAMA, "llama", id="llama headless"),
        pytest.param(
            lambda: causal(neox_config()), below("gpt_neox.", NEOX) | {"lm_head.weight": "head"}, "gpt_neox", id="neox"
        ),
        pytest.param(lambda: headless(neox_config()), NEOX, "gpt_neox", id="neox headless"),
    ],
)
def test_roles_of_every_parameter(model: Any, expected: dict[str, str], source: str) -> None:
    block_map = by_name(model(), strict=True)
    # transformers 5 calls GPT-NeoX's output projection lm_head, older ones embed_out.
    assert {name.replace("embed_out", "lm_head"): role for name, role in roles(block_map).items()} == expected
    assert {s.source for s in block_map} == {source}
    for segment in block_map:
        layer = re.search(r"(?:^|\.)(?:h|layers)\.(\d)\.", segment.name)
        assert segment.layer == (int(layer[1]) if layer else None)
        assert segment.bias == segment.name.endswith(".bias")


def test_gpt2_conv1d_is_cut_by_columns() -> None:
    block_map = by_name(causal(gpt2_config()))
    fused = [("q", "0:8", 2), ("k", "8:16", 2), ("v", "16:24", 2)]
    assert rows(block_map, "transformer.h.0.attn.c_attn.weight") == fused
    assert rows(block_map, "transformer.h.1.attn.c_attn.bias") == fused
    dims = {name: block_map[name][0].dim for name in block_map.names() if name.startswith("transformer.h.0.")}
    assert {name for name, dim in dims.items() if dim == 1} == {
        f"transformer.h.0.{site}.weight" for site in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_conv1d_is_known_by_its_type_and_not_by_its_shape() -> None:
    # Square in both layouts: only the type of the module can tell.
    assert by_name(causal(gpt2_config()))["transformer.h.0.attn.c_proj.weight"][0].dim == 1
    assert by_name(NanoGPT())["transformer.h.0.attn.c_proj.weight"][0].dim == 0


def test_tied_head_is_the_embedding_once() -> None:
    for model in (causal(gpt2_config()), NanoGPT()):
        block_map = by_name(model)
        (embedding,) = block_map["transformer.wte.weight"]
        assert embedding.role is Role.TOK_EMB
        assert embedding.tied == ("lm_head.weight",)
        assert "lm_head.weight" not in block_map
    untied = by_name(causal(gpt2_config(tie_word_embeddings=False)), strict=True)
    assert untied["lm_head.weight"][0].role is Role.HEAD
    assert untied["transformer.wte.weight"][0].tied == ()


def test_tied_embedding_counts_as_such_where_the_head_is_named_first() -> None:
    model = NanoGPT()
    model._modules["transformer"] = model._modules.pop("transformer")  # now lm_head comes first
    (embedding,) = by_name(model)["lm_head.weight"]
    assert (embedding.role, embedding.tied) == (Role.TOK_EMB, ("transformer.wte.weight",))


def test_gpt2_cross_attention() -> None:
    block_map = by_name(causal(gpt2_config(add_cross_attention=True)), strict=True)
    layer = "transformer.h.0.crossattention."
    assert rows(block_map, layer + "q_attn.weight") == [("q", "all", 2)]
    assert rows(block_map, layer + "c_attn.weight") == [("k", "0:8", 2), ("v", "8:16", 2)]
    assert rows(block_map, layer + "c_proj.weight") == [("o", "all", None)]


def test_llama_heads_under_grouped_queries_and_true_head_size() -> None:
    block_map = by_name(causal(llama_config(attention_bias=True, mlp_bias=True)), strict=True)
    layer = "model.layers.1.self_attn."
    for leaf, last in (("weight", (8,)), ("bias", ())):
        assert block_map[f"{layer}q_proj.{leaf}"][0].shape == (24, *last)  # 4 heads of 6
        assert rows(block_map, f"{layer}q_proj.{leaf}") == [("q", "all", 4)]
        assert rows(block_map, f"{layer}k_proj.{leaf}") == [("k", "all", 2)]
        assert rows(block_map, f"{layer}v_proj.{leaf}") == [("v", "all", 2)]
        assert rows(block_map, f"{layer}o_proj.{leaf}") == [("o", "all", None)]


def test_neox_interleaves_per_head() -> None:
    block_map = by_name(causal(neox_config()))
    for leaf in ("weight", "bias"):
        name = f"gpt_neox.layers.0.attention.query_key_value.{leaf}"
        assert rows(block_map, name) == [
            ("q", "3 x 4 from 0 every 12", 3),
            ("k", "3 x 4 from 4 every 12", 3),
            ("v", "3 x 4 from 8 every 12", 3),
        ]
        assert block_map[name][1].row_index().tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]


def test_fused_rows_are_those_that_the_model_splits_off() -> None:
    """Not what we believe about the layouts, but what transformers does: q, k and v that reach the attention."""
    from transformers import AutoModelForCausalLM

    for config in (gpt2_config(attn_implementation="sdpa"), neox_config(attn_implementation="sdpa")):
        model = AutoModelForCausalLM.from_config(config).eval()
        site = model.transformer.h[0].attn.c_attn if config.model_type == "gpt2" else None
        site = site or model.gpt_neox.layers[0].attention.query_key_value
        seen: list[torch.Tensor] = []
        site.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.detach()))
        caught: list[tuple[torch.Tensor, ...]] = []

        def attention(q: Any, k: Any, v: Any, *args: Any, caught: Any = caught, **kwargs: Any) -> Any:
            caught.append((q.detach(), k.detach(), v.detach()))
            return v

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
            model(torch.tensor([[3]]))  # position 0: rotary embeddings do nothing
        block_map = by_name(model)
        name = next(n for n in block_map.names() if "0.att" in n and len(block_map[n]) == 3)
        for segment, got in zip(block_map[name], caught[0], strict=True):
            torch.testing.assert_close(seen[0][0, 0, segment.row_index()], got[0, :, 0].reshape(-1))


@pytest.mark.parametrize(
    ("auto", "config", "head"),
    [
        (AutoModelForSequenceClassification, gpt2_config, {"score.weight"}),
        (AutoModelForSequenceClassification, llama_config, {"score.weight"}),
        (AutoModelForSequenceClassification, neox_config, {"score.weight"}),
        (AutoModelForTokenClassification, gpt2_config, {"classifier.weight", "classifier.bias"}),
        (AutoModelForTokenClassification, llama_config, {"score.weight", "score.bias"}),
        (AutoModelForQuestionAnswering, llama_config, {"qa_outputs.weight", "qa_outputs.bias"}),
    ],
)
def test_heads_of_the_known_classes(auto: Any, config: Any, head: set[str]) -> None:
    with torch.device("meta"):
        model = auto.from_config(config(num_labels=3, pad_token_id=0))
    block_map = by_name(model, strict=True)
    assert {s.name for s in block_map if s.role is Role.HEAD} == head


def test_double_heads() -> None:
    with torch.device("meta"):
        model = GPT2DoubleHeadsModel(gpt2_config(num_labels=1))
    assert roles(by_name(model, strict=True))["multiple_choice_head.summary.weight"] == "head"


def test_a_head_of_an_unknown_class_is_not_guessed() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = headless(llama_config())
            self.score = nn.Linear(8, 3)

    block_map = by_name(Mine())
    assert roles(block_map)["backbone.layers.1.mlp.up_proj.weight"] == "up"
    assert block_map.unexplained == ("score.weight", "score.bias")


@pytest.mark.parametrize(
    "config",
    [
        # Names as in llama, and as in gpt2 with interleaved q, k, v in the very same shapes.
        OlmoConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=11),
        GPTBigCodeConfig(
            n_layer=1,
            n_embd=8,
            n_head=2,
            n_positions=5,
            vocab_size=11,
            multi_query=False,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ],
    ids=["olmo", "gpt_bigcode"],
)
def test_another_architecture_with_the_names_of_a_known_one_is_not_guessed(config: Any) -> None:
    block_map = by_name(causal(config))
    assert set(block_map.unexplained) == set(block_map.names())
    assert {s.role for s in block_map} == {Role.OTHER}


def test_nanogpt_heads_come_from_the_attention_or_the_config_or_stay_unknown() -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    model = NanoGPT(heads=4)
    assert [s.heads for s in by_name(model)[name]] == [4, 4, 4]
    for block in model.transformer["h"]:
        del block.attn.n_head
    model.config = SimpleNamespace(n_head=2)
    assert [s.heads for s in by_name(model)[name]] == [2, 2, 2]
    del model.config
    unknown = by_name(model)
    assert rows(unknown, name) == [("q", "0:8", None), ("k", "8:16", None), ("v", "16:24", None)]
    with pytest.raises(TypeError, match=r"cutting q by head needs the number of heads"):
        unknown[name][0].blocks("head")


def test_nanogpt_needs_the_whole_structure() -> None:
    grouped = NanoGPT()
    grouped.transformer["h"][1].attn.c_attn = nn.Linear(8, 16)  # fewer heads for k and v: where they lie is not known
    assert set(by_name(grouped).unexplained) == set(by_name(grouped).names())
    no_positions = NanoGPT(bias=False)
    del no_positions.transformer["wpe"]
    no_positions.transformer["memory"] = nn.Linear(8, 8, bias=False)
    assert by_name(no_positions).unexplained == ("transformer.memory.weight",)
    other_head = NanoGPT()
    other_head.lm_head = nn.Linear(8, 3)
    assert by_name(other_head).unexplained == ("lm_head.weight", "lm_head.bias")


def test_heads_that_do_not_fit_the_rows_stay_unknown() -> None:
    model = causal(llama_config())
    model.model.layers[0].self_attn.q_proj = nn.Linear(8, 18, bias=False)  # one head pruned, the config not told
    assert rows(by_name(model), "model.layers.0.self_attn.q_proj.weight") == [("q", "all", None)]
    fused = causal(neox_config())
    fused.gpt_neox.layers[0].attention.query_key_value = nn.Linear(12, 24)
    site = "gpt_neox.layers.0.attention.query_key_value."
    assert by_name(fused).unexplained == (site + "weight", site + "bias")


def test_two_models_in_one() -> None:
    pair = nn.ModuleDict({"teacher": causal(gpt2_config()), "student": NanoGPT(), "probe": nn.Linear(8, 2)})
    block_map = by_name(pair)
    assert block_map["teacher.transformer.h.0.attn.c_attn.weight"][0].source == "gpt2"
    assert block_map["student.transformer.h.0.attn.c_attn.weight"][0].source == "nanogpt"
    assert block_map.unexplained == ("probe.weight", "probe.bias")
