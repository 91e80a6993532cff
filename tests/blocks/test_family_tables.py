"""Each family of `TINY` against a literal expectation: every site of layer 1 and outside the layers, rows, heads.

`q 0:64 /4` are rows 0 to 64, of role q and 4 heads. Weight and bias of a site are said at once.
"""

import re
from typing import Any

import pytest
import torch
import transformers

from blocks.models import TINY
from sharpwise.blocks import BlockMap, Role

NORMS = {"input_layernorm": "norm all", "post_attention_layernorm": "norm all"}
FEEDFORWARD_NORMS = {"pre_feedforward_layernorm": "norm all", "post_feedforward_layernorm": "norm all"}
QK_NORM = {"self_attn.q_norm": "qk_norm all", "self_attn.k_norm": "qk_norm all"}
GROUPED = {
    "self_attn.q_proj": "q all /4",
    "self_attn.k_proj": "k all /2",
    "self_attn.v_proj": "v all /2",
    "self_attn.o_proj": "o all",
}
GATED = {"mlp.gate_proj": "gate all", "mlp.up_proj": "up all", "mlp.down_proj": "down all"}
PLAIN = {"mlp.c_fc": "up all", "mlp.c_proj": "down all"}
LLAMA = GROUPED | GATED | NORMS
EXPERTS = {
    "mlp.gate": "router all",
    "mlp.experts.gate_up_proj": "gate 0:24, up 24:48",
    "mlp.experts.down_proj": "down all",
}
MODEL = {"model.embed_tokens": "tok_emb all", "model.norm": "norm all"}
UNTIED = MODEL | {"lm_head": "head all"}

FALCON = {
    "self_attention.dense": "o all",
    "mlp.dense_h_to_4h": "up all",
    "mlp.dense_4h_to_h": "down all",
    "input_layernorm": "norm all",
}
FALCON_NEW = {"self_attention.query_key_value": "q 2 x 16 from 0 every 32 /4, k 2 x 8 from 16 every 32 /2, "}
FALCON_NEW["self_attention.query_key_value"] += "v 2 x 8 from 24 every 32 /2"
PER_HEAD = "q 4 x 8 from 0 every 24 /4, k 4 x 8 from 8 every 24 /4, v 4 x 8 from 16 every 24 /4"
THIRDS = "q 0:32 /4, k 32:64 /4, v 64:96 /4"
FALCON_OUTSIDE = {"transformer.word_embeddings": "tok_emb all", "transformer.ln_f": "norm all"}
GPT2 = {
    "ln_1": "norm all",
    "attn.c_attn": THIRDS,
    "attn.c_proj": "o all",
    "ln_2": "norm all",
    **PLAIN,
}
GPT2_OUTSIDE = {"transformer.wte": "tok_emb all", "transformer.wpe": "pos_emb all", "transformer.ln_f": "norm all"}
OPT = {
    "self_attn.q_proj": "q all /4",
    "self_attn.k_proj": "k all /4",
    "self_attn.v_proj": "v all /4",
    "self_attn.out_proj": "o all",
    "self_attn_layer_norm": "norm all",
    "fc1": "up all",
    "fc2": "down all",
    "final_layer_norm": "norm all",
}
OPT_OUTSIDE = {
    "model.decoder.embed_tokens": "tok_emb all",
    "model.decoder.embed_positions": "pos_emb all",
    "model.decoder.final_layer_norm": "norm all",
}
LATENT = {
    "self_attn.kv_a_proj_with_mqa": "k all",
    "self_attn.kv_a_layernorm": "norm all",
    "self_attn.kv_b_proj": "k 4 x 8 from 0 every 20 /4, v 4 x 12 from 8 every 20 /4",
    "self_attn.o_proj": "o all",
    **NORMS,
    **EXPERTS,
    **{site.replace("mlp", "mlp.shared_experts"): role for site, role in GATED.items()},
}
LATENT_Q = {
    "self_attn.q_a_proj": "q all",
    "self_attn.q_a_layernorm": "norm all",
    "self_attn.q_b_proj": "q all /4",
}
SHARED = {site.replace("mlp", "mlp.shared_expert"): role for site, role in GATED.items()}
SHARED["mlp.shared_expert_gate"] = "router all"


def t5(stack: str, mlp: dict[str, str]) -> dict[str, str]:
    """Layer 1 of the encoder and of the decoder, which have one more part: the cross attention."""
    found = {}
    kinds = ["SelfAttention", "DenseReluDense"] if stack == "encoder" else ["SelfAttention", "EncDecAttention", "Dense"]
    for i, kind in enumerate(kinds):
        inside = {"q": "q all /4", "k": "k all /4", "v": "v all /4", "o": "o all"} if "Attention" in kind else mlp
        path = f"{stack}.block.1.layer.{i}."
        found |= {f"{path}{'DenseReluDense' if inside is mlp else kind}.{site}": role for site, role in inside.items()}
        found[path + "layer_norm"] = "norm all"
    return found


T5_OUTSIDE = {
    "shared": "tok_emb all",
    "encoder.final_layer_norm": "norm all",
    "decoder.final_layer_norm": "norm all",
}
BERT = {
    "attention.self.query": "q all /4",
    "attention.self.key": "k all /4",
    "attention.self.value": "v all /4",
    "attention.output.dense": "o all",
    "attention.output.LayerNorm": "norm all",
    "intermediate.dense": "up all",
    "output.dense": "down all",
    "output.LayerNorm": "norm all",
}
BERT_OUTSIDE = {
    "embeddings.word_embeddings": "tok_emb all",
    "embeddings.position_embeddings": "pos_emb all",
    "embeddings.token_type_embeddings": "pos_emb all",
    "embeddings.LayerNorm": "norm all",
}
BERT_HEAD = {
    "cls.predictions": "head all",
    "cls.predictions.transform.dense": "head all",
    "cls.predictions.transform.LayerNorm": "norm all",
}
VIT = {
    "attention.q_proj": "q all /4",
    "attention.k_proj": "k all /4",
    "attention.v_proj": "v all /4",
    "attention.o_proj": "o all",
    "layernorm_before": "norm all",
    "layernorm_after": "norm all",
    "mlp.fc1": "up all",
    "mlp.fc2": "down all",
}
VIT_OUTSIDE = {
    "vit.embeddings.cls_token": "pos_emb all",
    "vit.embeddings.position_embeddings": "pos_emb all",
    "vit.embeddings.patch_embeddings.projection": "patch_emb all",
    "vit.layernorm": "norm all",
}
TIMM = {
    "norm1": "norm all",
    "attn.qkv": THIRDS,
    "attn.q_norm": "qk_norm all",
    "attn.k_norm": "qk_norm all",
    "attn.proj": "o all",
    "ls1.gamma": "other all",
    "norm2": "norm all",
    "mlp.fc1": "up all",
    "mlp.fc2": "down all",
    "ls2.gamma": "other all",
}
TIMM_OUTSIDE = {
    "cls_token": "pos_emb all",
    "pos_embed": "pos_emb all",
    "patch_embed.proj": "patch_emb all",
    "norm": "norm all",
    "fc_norm": "norm all",
    "head": "head all",
}
TORCH = {
    "self_attn.in_proj_weight": THIRDS,
    "self_attn.in_proj_bias": THIRDS,
    "self_attn.out_proj": "o all",
    "linear1": "up all",
    "linear2": "down all",
    "norm1": "norm all",
    "norm2": "norm all",
}


def below(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {prefix + name: said for name, said in names.items()}


L1, H1 = "model.layers.1.", "transformer.h.1."
EXPECTED: dict[str, dict[str, str]] = {
    "gpt2": below(H1, GPT2) | GPT2_OUTSIDE,
    "llama": below(L1, LLAMA) | UNTIED,
    "gpt_neox": {
        **below("gpt_neox.layers.1.", {k.replace("self_attention", "attention"): v for k, v in FALCON.items()}),
        "gpt_neox.layers.1.attention.query_key_value": PER_HEAD,
        "gpt_neox.layers.1.post_attention_layernorm": "norm all",
        "gpt_neox.embed_in": "tok_emb all",
        "gpt_neox.final_layer_norm": "norm all",
        "lm_head": "head all",
    },
    "nanogpt": below(H1, GPT2) | GPT2_OUTSIDE,
    "mistral": below(L1, LLAMA) | UNTIED,
    "qwen2": below(L1, LLAMA) | UNTIED,
    "qwen3": below(L1, LLAMA | QK_NORM) | UNTIED,
    "falcon-new": {
        **below(H1, {site: role for site, role in (FALCON | FALCON_NEW).items() if site != "input_layernorm"}),
        **below(H1, {"ln_attn": "norm all", "ln_mlp": "norm all"}),
        **FALCON_OUTSIDE,
    },
    "falcon-new-one-norm": below(H1, FALCON | FALCON_NEW) | FALCON_OUTSIDE,
    "falcon-multi-query": {
        **below(H1, FALCON | {"self_attention.query_key_value": "q 0:32 /4, k 32:40 /1, v 40:48 /1"}),
        **FALCON_OUTSIDE,
    },
    "falcon-interleaved": {
        **below(H1, FALCON | {"self_attention.query_key_value": PER_HEAD, "post_attention_layernorm": "norm all"}),
        **FALCON_OUTSIDE,
    },
    "phi3": {
        **below(L1, NORMS),
        L1 + "self_attn.qkv_proj": "q 0:64 /4, k 64:96 /2, v 96:128 /2",
        L1 + "self_attn.o_proj": "o all",
        L1 + "mlp.gate_up_proj": "gate 0:48, up 48:96",
        L1 + "mlp.down_proj": "down all",
        **UNTIED,
    },
    "gemma2": below(L1, LLAMA | FEEDFORWARD_NORMS) | MODEL,
    "gemma3": below(L1, LLAMA | FEEDFORWARD_NORMS | QK_NORM) | MODEL,
    "opt": below("model.decoder.layers.1.", OPT) | OPT_OUTSIDE,
    "opt-projected": {
        **below("model.decoder.layers.1.", OPT),
        **OPT_OUTSIDE,
        "model.decoder.project_in": "tok_emb all",
        "model.decoder.project_out": "head all",
    },
    "bloom": {
        **below(H1, FALCON | {"self_attention.query_key_value": PER_HEAD, "post_attention_layernorm": "norm all"}),
        **FALCON_OUTSIDE,
        "transformer.word_embeddings_layernorm": "norm all",
    },
    "olmo2": {
        **below(L1, GROUPED | GATED | QK_NORM),
        L1 + "post_attention_layernorm": "norm all",
        L1 + "post_feedforward_layernorm": "norm all",
        **UNTIED,
    },
    "mixtral": {
        **below(L1, GROUPED | EXPERTS | NORMS | {"mlp.experts.gate_up_proj": "gate 0:48, up 48:96"}),
        **UNTIED,
    },
    "qwen2_moe": below(L1, GROUPED | EXPERTS | SHARED | NORMS) | UNTIED,
    "qwen3_moe": below(L1, GROUPED | EXPERTS | QK_NORM | NORMS) | UNTIED,
    "deepseek_v3": below(L1, LATENT | LATENT_Q) | UNTIED,
    "deepseek_v3-no-q-lora": below(L1, LATENT | {"self_attn.q_proj": "q all /4"}) | UNTIED,
    "starcoder2": below(L1, GROUPED | PLAIN | NORMS) | MODEL,
    "granite": below(L1, LLAMA) | UNTIED,
    "cohere": {**below(L1, GROUPED | GATED | QK_NORM), L1 + "input_layernorm": "norm all", **MODEL},
    "stablelm": below(L1, LLAMA) | UNTIED,
    "stablelm-qk-norm": {
        **below(L1, LLAMA),
        **{f"{L1}self_attn.q_layernorm.norms.{i}": "qk_norm all" for i in range(4)},
        **{f"{L1}self_attn.k_layernorm.norms.{i}": "qk_norm all" for i in range(2)},
        **UNTIED,
    },
    "glm4": {
        **below(L1, GROUPED | NORMS),
        L1 + "post_self_attn_layernorm": "norm all",
        L1 + "post_mlp_layernorm": "norm all",
        L1 + "mlp.gate_up_proj": "gate 0:48, up 48:96",
        L1 + "mlp.down_proj": "down all",
        **UNTIED,
    },
    "t5": {
        **t5("encoder", {"wi": "up all", "wo": "down all"}),
        **t5("decoder", {"wi": "up all", "wo": "down all"}),
        **T5_OUTSIDE,
    },
    "t5-gated": {
        **t5("encoder", {"wi_0": "gate all", "wi_1": "up all", "wo": "down all"}),
        **t5("decoder", {"wi_0": "gate all", "wi_1": "up all", "wo": "down all"}),
        **T5_OUTSIDE,
    },
    "bert": below("encoder.layer.1.", BERT) | BERT_OUTSIDE | {"pooler.dense": "head all"},
    "bert-mlm": below("bert.encoder.layer.1.", BERT) | below("bert.", BERT_OUTSIDE) | BERT_HEAD,
    "bert-pretraining": {
        **below("bert.encoder.layer.1.", BERT),
        **below("bert.", BERT_OUTSIDE | {"pooler.dense": "head all"}),
        **BERT_HEAD,
        "cls.seq_relationship": "head all",
    },
    "vit": below("vit.layers.1.", VIT) | VIT_OUTSIDE | {"classifier": "head all"},
    "vit-masked": {
        **below("vit.layers.1.", VIT),
        **VIT_OUTSIDE,
        "vit.embeddings.mask_token": "pos_emb all",
        "decoder.0": "head all",
    },
    "timm": below("blocks.1.", TIMM) | TIMM_OUTSIDE,
    "transformer_encoder": below("layers.1.", TORCH) | {"norm": "norm all"},
}
_LAYER = re.compile(r"(?:layers|layer|h|block|blocks)\.(\d+)\.")


def said(block_map: BlockMap, name: str) -> str:
    parts = (f"{s.role} {s.describe_rows()}" + (f" /{s.heads}" if s.heads else "") for s in block_map[name])
    return ", ".join(parts)


@pytest.mark.parametrize("family", TINY)
def test_every_parameter(family: str) -> None:
    block_map = BlockMap.of(TINY[family](), strict=True)
    found: dict[str, set[str]] = {}
    for name in block_map.names():
        layer = _LAYER.search(name)
        assert {s.layer for s in block_map[name]} == {int(layer[1]) if layer else None}
        assert {s.bias for s in block_map[name]} == {name.endswith("bias")}
        if layer is None or layer[1] == "1":
            found.setdefault(re.sub(r"\.(weight|bias)$", "", name), set()).add(said(block_map, name))
    assert found == {site: {text} for site, text in EXPECTED[family].items()}
    assert {s.source for s in block_map} == {{"gemma3": "gemma3_text"}.get(family, re.split("[-]", family)[0])}


def test_what_layer_0_has_alone() -> None:
    t5_map, latent = BlockMap.of(TINY["t5"]()), BlockMap.of(TINY["deepseek_v3"]())
    for stack in ("encoder", "decoder"):
        name = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        assert (said(t5_map, name), t5_map[name][0].bias) == ("rel_pos all", False)
    assert said(latent, "model.layers.0.mlp.gate_proj.weight") == "gate all"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_experts_are_stacked(family: str) -> None:
    block_map = BlockMap.of(TINY[family]())
    stacked = {s.name for s in block_map if s.stacked}
    assert stacked == {name for name in block_map.names() if ".experts." in name}
    for segment in (s for s in block_map if s.stacked):
        assert (segment.dim, segment.copies, len(segment.shape)) == (1, 4, 3)
        assert segment.blocks("tensor") == 4


AUTO = ["", "ForCausalLM", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification"]
AUTO += ["ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction", "ForSeq2SeqLM"]
AUTO += ["ForImageClassification", "ForMaskedImageModeling"]


@pytest.mark.parametrize("family", sorted(TINY.keys() - {"nanogpt", "timm", "transformer_encoder"}))
def test_every_class_of_transformers(family: str) -> None:
    config: Any = TINY[family]().config
    built = set()
    for end in AUTO:
        auto = getattr(transformers, f"AutoModel{end}")
        if type(config) in auto._model_mapping:
            config.num_labels, config.is_decoder = 3, end == "ForCausalLM"
            with torch.device("meta"):
                model = auto.from_config(config)
            block_map = BlockMap.of(model, strict=True)
            built.add(type(model).__name__)
            heads = {s.name for s in block_map if s.role is Role.HEAD}
            assert heads or not end or "lm_head.weight" in {name for s in block_map for name in s.tied}
    assert len(built) > 1
