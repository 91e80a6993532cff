"""Every causal language model that the installed transformers knows, shrunk until it is built in an instant.

A model is built from the default config of its type, so that what an architecture does by default (its kinds of layers,
fused matrices, gates, biases, norms, routers) stays as it is. Only sizes change, by the names of the config's fields,
and layers are dropped until the first of each kind is left. Nothing is downloaded.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 2  # where all layers are of one kind
VOCABULARY = 256
HEAD_DIM = 16

# The most that a field of this name may be: a default below it stays, so that one KV head or one expert remains one.
SIZES: dict[str, int] = {
    name: size
    for size, names in (
        # width
        (64, "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim hidden_size_global"),
        (64, "mamba_d_ssm pronunciation_embed_dim shape_embed_dim backbone_hidden_size"),
        (32, "input_embedding_size output_embedding_size hidden_size_per_layer_input ple_embed_dim router_hidden_size"),
        (32, "prompt_mid_dim"),
        # attention
        (4, "num_attention_heads n_head n_heads num_heads attention_heads num_attention_heads_per_layer"),
        (4, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
        (4, "swa_num_attention_heads"),
        (HEAD_DIM, "head_dim attention_head_size d_head dim_head d_kv swa_head_dim kv_channels index_head_dim"),
        (HEAD_DIM, "qk_nope_head_dim qk_rope_head_dim v_head_dim"),
        (24, "q_lora_rank kv_lora_rank o_lora_rank adapter_rank hc_lowrank"),
        (8, "rotary_dim gated_norm_rank laurel_rank d_rel"),
        (2, "index_n_heads o_groups"),
        # feed-forward
        (128, "intermediate_size n_inner d_inner dff dim_ff d_ff ffn_dim decoder_ffn_dim encoder_ffn_dim"),
        (128, "ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size mlp_dim"),
        (96, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size"),
        (96, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
        # experts
        (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k n_group num_expert_group"),
        (2, "zero_expert_num"),
        (1, "topk_group num_dense_layers first_k_dense_replace"),
        # state space and linear attention
        (4, "mamba_n_heads mamba_num_heads linear_num_value_heads linear_num_heads"),
        (2, "linear_num_key_heads n_groups n_mamba_heads"),
        (32, "mamba_head_dim mamba_d_head"),
        (16, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
        (8, "state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank"),
        # what has to lie within a few tokens to matter
        (4, "sliding_window sliding_window_size attention_window_size window_size local_attention chunk_size"),
        (4, "attention_chunk_size mamba_chunk_size block_size index_topk index_block_size rel_extent"),
        (4, "local_attn_chunk_length lsh_attn_chunk_length"),
        # tables
        (64, "n_positions n_ctx max_target_positions max_source_positions position_bias_num_buckets"),
        (64, "ngram_vocab_size_base make_ngram_vocab_size_divisible_by encoder_hash_byte_group_vocab"),
        (8, "split_ngram_parts prompt_length"),
        # towers for images and sound, which are built and then see no input
        (64, "image_size crop_size output_channels ext_pw_out_channel depthwise_separable_out_channel"),
        (64, "nemo_conv_channels adapter_in_dim adapter_out_dim adapter_input_size"),
        (32, "downsample_hidden_size"),
    )
    for name in names.split()
}
LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "depth"),
    *("num_decoder_layers", "num_encoder_layers", "num_blocks", "num_layers_per_stack"),
)
KV_HEADS = {"num_key_value_heads": "num_attention_heads", "swa_num_key_value_heads": "swa_num_attention_heads"}

_FULL_AND_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
_CONV_AND_FULL = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3 = {
    "head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_GEMMA4 = {"per_layer_config": {2: {"head_dim": 32}}}  # the full attention, whose heads are larger by default
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
# Fields of single types: where the default has a kind of layer less than what is published under the name, where it
# cannot be built at all, or where sizes are bound to each other. A config within a config is a dict within a dict.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_config": {"hidden_size_global": 128}, "decoder_config": {"hidden_size_global": 128}}
    | {"global_config": {"hidden_size": 128}},
    "cohere_compass_text": _FULL_AND_SLIDING
    | {"rope_parameters": dict.fromkeys(_FULL_AND_SLIDING["layer_types"], _ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _FULL_AND_SLIDING,
    "lfm2": _CONV_AND_FULL,
    "lfm2_moe": _CONV_AND_FULL,
    "mamba2": {"head_dim": 32},
    "mellum": _FULL_AND_SLIDING,
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "musicgen": {"decoder": {"num_codebooks": 1}},  # several would ask for as many rows of tokens
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 48], "max_position_embeddings": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "xmod": {"default_language": "en_XX"},
    # both share one attention among layers, which shows from two on
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 4},
}
# The model class takes this part of the config that the class is listed under.
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}

CANNOT: dict[str, str] = {
    "gemma3n": "its image tower is built by the package timm; gemma3n_text has the same decoder",
    "gemma4_assistant": "a draft head: its forward takes hidden states, keys and values of the model it drafts for",
    "gemma4_unified_assistant": "a draft head, as gemma4_assistant",
}


def causal_lm_types() -> list[str]:
    """Types of config that `AutoModelForCausalLM` has a class for, in the order of transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str) -> nn.Module:
    """A model of this type of about 100,000 parameters, on the CPU, float32, in eval mode, the same at every call.

    Raises:
        KeyError: there is no such type.
        ValueError: a model of this type is in CANNOT: it cannot be built, or not be run on token numbers alone.
    """
    if model_type in CANNOT:
        raise ValueError(CANNOT[model_type])
    config = CONFIG_MAPPING[model_type]()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config = shrunk(config, EXCEPTIONS.get(model_type, {}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if model_type in PARTS:
            model = model_class(getattr(config, PARTS[model_type]))
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def shrunk(default: Any, exceptions: Mapping[str, Any]) -> Any:
    """A config of the same type with smaller sizes; fields that are derived from others are derived anew."""
    default.allow_global_per_layer_attribute_access = True  # some sizes of gemma4 differ by layer
    kept, per_layer = kept_layers(default)
    declared = {field.name: field.default for field in dataclasses.fields(default)}
    changes: dict[str, Any] = {}
    for name, value in fields(default):
        if isinstance(value, PreTrainedConfig):
            changes[name] = shrunk(value, exceptions.get(name, {}))
        elif name in exceptions:
            changes[name] = exceptions[name]
        elif name in per_layer:
            changes[name] = [small(name, value[i], default) for i in kept]
        elif name in LAYER_COUNTS and value is not None:
            changes[name] = len(kept)
        elif name in ("is_decoder", "use_cache"):
            changes[name] = name == "is_decoder"
        elif name == "head_dim" and value is None:
            changes[name] = HEAD_DIM
        elif isinstance(value, list) and name.endswith("token_id"):
            changes[name] = [small(name, v, default) for v in value]
        elif type(declared[name]) is int or name.endswith("token_id"):
            changes[name] = small(name, value, default)
    return type(default)(**(dict(exceptions) | changes))


def fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of what the config can be made with."""
    for field in dataclasses.fields(config):
        if field.init and hasattr(config, field.name):
            yield field.name, getattr(config, field.name)


def kept_layers(config: Any) -> tuple[list[int], set[str]]:
    """Numbers of the first layer of each kind (two at least), and the fields that have a value per layer."""
    layers = next((count for name in LAYER_COUNTS if (count := getattr(config, name, None)) is not None), LAYERS)
    lists = {name: value for name, value in fields(config) if isinstance(value, list) and len(value) == layers}
    kinds = [value for value in lists.values() if all(isinstance(kind, str) for kind in value)]
    seen: set[tuple[int, str]] = set()
    kept = []
    for i in range(layers):
        kind = {(k, values[i]) for k, values in enumerate(kinds)}
        if i < LAYERS or kind - seen:
            kept.append(i)
        seen |= kind
    per_layer = {name for name, value in lists.items() if value in kinds or len(set(map(str, value))) < layers}
    return kept, per_layer


def small(name: str, value: Any, config: Any) -> Any:
    """The value of a field, where it is a size no more than it may be."""
    if type(value) is not int:
        return value
    if name in KV_HEADS:
        return 4 if value == getattr(config, KV_HEADS[name]) else min(value, 2)
    if name.endswith(("token_id", "token_index")):
        # Special tokens lie at both ends: an image token in the middle of a text would ask for an image.
        return value if value < 12 else VOCABULARY - 1 - value % 20
    if name.endswith("vocab_size") or name == "vocab_size_per_layer_input":
        return min(value, VOCABULARY)
    if name == "max_position_embeddings" and not hasattr(config, "rope_parameters"):
        return min(value, 64)  # a table
    return min(value, SIZES.get(name, value))
