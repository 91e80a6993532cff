"""The tables of the families: what each parameter of a known architecture is.

A *site* is the path of a module below the backbone (its `weight` and `bias` share it), or the whole name of a parameter
that is called otherwise. A table gives, by pattern, the role of a site's output rows, or several: the rows of a fused
matrix in their order. Group 1 of a pattern is the layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sharpwise.blocks.roles import Role

Sites = dict[str, Role | tuple[Role, ...]]
Heads = Mapping[Role, tuple[int, int | None]]  # of q, k and v: how many, and rows of each (None: not known)


def even_heads(q: int, kv: int | None = None, size: int | None = None) -> Heads:
    """Heads of one size, `kv` of them (as many as for q, if not given) for each of k and v."""
    return {Role.Q: (q, size), Role.K: (kv or q, size), Role.V: (kv or q, size)}


def _config_heads(config: Any) -> Heads:
    q = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // q
    return even_heads(q, getattr(config, "num_key_value_heads", None), size)


def _falcon_heads(config: Any) -> Heads:
    """`num_kv_heads` counts in the new architecture only; before it, one for all queries or one for each."""
    q, kv = config.num_attention_heads, config.num_kv_heads
    if not config.new_decoder_architecture:
        kv = 1 if config.multi_query else q
    return even_heads(q, kv, config.head_dim)


def _latent_heads(config: Any) -> Heads:
    """Of multi-head latent attention: the part of k that rotates has no head, all heads share it."""
    n, size = config.num_attention_heads, config.qk_nope_head_dim
    return {Role.Q: (n, size + config.qk_rope_head_dim), Role.K: (n, size), Role.V: (n, config.v_head_dim)}


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture.

    Args:
        sites: the table.
        children: what its backbone holds at least.
        heads: reads the config.
        per_head: a fused q, k, v matrix holds for each key head in turn its queries, itself, and its values.
        latent: last names of sites whose rows are a latent that all heads share.
    """

    sites: Sites
    children: frozenset[str] = frozenset()
    heads: Callable[[Any], Heads] = _config_heads
    per_head: bool = False
    latent: frozenset[str] = frozenset()


def _layers(path: str, *tables: Sites) -> Sites:
    return {rf"{path}\.(\d+)\.(?:{site})": roles for table in tables for site, roles in table.items()}


def _attention(path: str, q: str, k: str, v: str, o: str) -> Sites:
    return {rf"{path}\.(?:{site})": role for site, role in ((q, Role.Q), (k, Role.K), (v, Role.V), (o, Role.O))}


_NANOGPT: Sites = {
    r"wte": Role.TOK_EMB,
    r"wpe": Role.POS_EMB,
    r"ln_f": Role.NORM,
    **_layers(
        "h",
        {
            r"ln_1|ln_2": Role.NORM,
            r"attn\.c_attn": (Role.Q, Role.K, Role.V),
            r"attn\.c_proj": Role.O,
            r"mlp\.c_fc": Role.UP,
            r"mlp\.c_proj": Role.DOWN,
        },
    ),
}
_TRANSFORMER_ENCODER: Sites = {
    r"norm": Role.NORM,
    **_layers(
        "layers",
        {
            # PEFT's adapters of the fused matrix lie at the attention itself.
            r"self_attn(?:\.in_proj_(?:weight|bias))?": (Role.Q, Role.K, Role.V),
            r"self_attn\.out_proj": Role.O,
            r"linear1": Role.UP,
            r"linear2": Role.DOWN,
            r"norm1|norm2": Role.NORM,
        },
    ),
}
_TIMM: Sites = {
    r"patch_embed\.proj": Role.PATCH_EMB,
    r"cls_token|reg_token|dist_token|pos_embed": Role.POS_EMB,
    r"patch_embed\.norm|norm_pre|norm|fc_norm": Role.NORM,
    r"head|head_dist": Role.HEAD,
    **_layers(
        "blocks",
        {
            r"norm1|norm2|attn\.norm|mlp\.norm": Role.NORM,
            r"attn\.qkv": (Role.Q, Role.K, Role.V),
            r"attn\.[qk]_norm": Role.QK_NORM,
            r"attn\.proj": Role.O,
            r"mlp\.fc1": Role.UP,
            r"mlp\.fc2": Role.DOWN,
            r"ls[12]\.gamma": Role.OTHER,
        },
    ),
}

# What the many descendants of llama are put together from.
_NORMS: Sites = {r"input_layernorm|post_attention_layernorm": Role.NORM}
_FEEDFORWARD_NORMS: Sites = {r"(?:pre|post)_feedforward_layernorm": Role.NORM}
_SEPARATE = _attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_FUSED: Sites = {r"self_attn\.qkv_proj": (Role.Q, Role.K, Role.V), r"self_attn\.o_proj": Role.O}
_QK_NORM: Sites = {r"self_attn\.[qk]_norm": Role.QK_NORM}
_GATED: Sites = {r"mlp\.gate_proj": Role.GATE, r"mlp\.up_proj": Role.UP, r"mlp\.down_proj": Role.DOWN}
_FUSED_GATED: Sites = {r"mlp\.gate_up_proj": (Role.GATE, Role.UP), r"mlp\.down_proj": Role.DOWN}
_PLAIN: Sites = {r"mlp\.c_fc": Role.UP, r"mlp\.c_proj": Role.DOWN}
_EXPERTS: Sites = {
    r"mlp\.gate": Role.ROUTER,
    r"mlp\.experts\.gate_up_proj": (Role.GATE, Role.UP),
    r"mlp\.experts\.down_proj": Role.DOWN,
}


def _shared_expert(name: str) -> Sites:
    """An expert that every token goes to, and the gate that weighs it."""
    inside = {site.replace("mlp", rf"mlp\.{name}", 1): role for site, role in _GATED.items()}
    return inside | {rf"mlp\.{name}_gate": Role.ROUTER}


def _llama(*inside: Sites, **options: Any) -> Family:
    sites: Sites = {r"embed_tokens": Role.TOK_EMB, r"norm": Role.NORM, **_layers("layers", *inside)}
    return Family(sites, frozenset({"embed_tokens", "layers", "norm"}), **options)


def _fused_per_head(
    layers: str, attention: str, outside: Sites, heads: Callable[[Any], Heads] = _config_heads
) -> Family:
    """GPT-NeoX, BLOOM and Falcon: names of one origin around one fused matrix."""
    inside: Sites = {
        r"input_layernorm|post_attention_layernorm|ln_attn|ln_mlp": Role.NORM,
        rf"{attention}\.query_key_value": (Role.Q, Role.K, Role.V),
        rf"{attention}\.dense": Role.O,
        r"mlp\.dense_h_to_4h": Role.UP,
        r"mlp\.dense_4h_to_h": Role.DOWN,
    }
    children = frozenset({layers, *outside})
    return Family({**outside, **_layers(layers, inside)}, children, heads, per_head=True)


_GPT2: Sites = {
    **_NANOGPT,
    **_layers(
        "h",
        {
            r"ln_cross_attn": Role.NORM,
            r"crossattention\.q_attn": Role.Q,
            r"crossattention\.c_attn": (Role.K, Role.V),
            r"crossattention\.c_proj": Role.O,
        },
    ),
}
_LATENT: Sites = {
    r"self_attn\.(?:q_proj|q_a_proj|q_b_proj)": Role.Q,
    r"self_attn\.kv_a_proj_with_mqa": Role.K,  # v too: of a matrix that feeds both, the first counts
    r"self_attn\.kv_b_proj": (Role.K, Role.V),
    r"self_attn\.(?:q_a|kv_a)_layernorm": Role.NORM,
    r"self_attn\.o_proj": Role.O,
}
_OPT: Sites = {
    r"decoder\.(?:embed_tokens|project_in)": Role.TOK_EMB,
    r"decoder\.embed_positions": Role.POS_EMB,
    r"decoder\.final_layer_norm": Role.NORM,
    r"decoder\.project_out": Role.HEAD,
    **_layers(
        r"decoder\.layers",
        _attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        {r"self_attn_layer_norm|final_layer_norm": Role.NORM, r"fc1": Role.UP, r"fc2": Role.DOWN},
    ),
}
_T5: Sites = {
    r"shared|(?:encoder|decoder)\.embed_tokens": Role.TOK_EMB,
    r"(?:encoder|decoder)\.final_layer_norm": Role.NORM,
    r"lm_head|qa_outputs": Role.HEAD,
    **_layers(
        r"(?:encoder|decoder)\.block",
        _attention(r"layer\.\d\.(?:SelfAttention|EncDecAttention)", "q", "k", "v", "o"),
        {
            r"layer\.0\.SelfAttention\.relative_attention_bias": Role.REL_POS,
            r"layer\.\d\.layer_norm": Role.NORM,
            r"layer\.\d\.DenseReluDense\.wi_0": Role.GATE,
            r"layer\.\d\.DenseReluDense\.(?:wi|wi_1)": Role.UP,
            r"layer\.\d\.DenseReluDense\.wo": Role.DOWN,
        },
    ),
}
_BERT: Sites = {
    r"embeddings\.word_embeddings": Role.TOK_EMB,
    r"embeddings\.(?:position|token_type)_embeddings": Role.POS_EMB,
    r"embeddings\.LayerNorm": Role.NORM,
    r"pooler\.dense": Role.HEAD,
    **_layers(
        r"encoder\.layer",
        _attention(r"(?:cross)?attention", r"self\.query", r"self\.key", r"self\.value", r"output\.dense"),
        {
            r"(?:(?:cross)?attention\.)?output\.LayerNorm": Role.NORM,
            r"intermediate\.dense": Role.UP,
            r"output\.dense": Role.DOWN,
        },
    ),
}
_VIT: Sites = {
    r"embeddings\.patch_embeddings\.projection": Role.PATCH_EMB,
    r"embeddings\.(?:cls_token|mask_token|position_embeddings)": Role.POS_EMB,
    r"layernorm": Role.NORM,
    r"pooler\.dense": Role.HEAD,
    **_layers(
        "layers",
        _attention("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
        {r"layernorm_before|layernorm_after": Role.NORM, r"mlp\.fc1": Role.UP, r"mlp\.fc2": Role.DOWN},
    ),
}

# Recognized by structure; how many heads there are, the attention module says.
STRUCTURES: dict[str, Family] = {
    "nanogpt": Family(_NANOGPT),
    "timm": Family(_TIMM),
    "transformer_encoder": Family(_TRANSFORMER_ENCODER),
}
# By `config.model_type` of transformers.
HF: dict[str, Family] = {
    "bert": Family(_BERT, frozenset({"embeddings", "encoder"})),
    "bloom": _fused_per_head(
        "h",
        "self_attention",
        {r"word_embeddings": Role.TOK_EMB, r"word_embeddings_layernorm": Role.NORM, r"ln_f": Role.NORM},
    ),
    "cohere": _llama(_SEPARATE, _QK_NORM, _GATED, _NORMS),
    "deepseek_v3": _llama(
        _LATENT,
        _GATED,
        _EXPERTS,
        _shared_expert("shared_experts"),
        _NORMS,
        heads=_latent_heads,
        per_head=True,
        latent=frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    ),
    "falcon": _fused_per_head(
        "h", "self_attention", {r"word_embeddings": Role.TOK_EMB, r"ln_f": Role.NORM}, _falcon_heads
    ),
    "gemma2": _llama(_SEPARATE, _GATED, _NORMS, _FEEDFORWARD_NORMS),
    "gemma3_text": _llama(_SEPARATE, _QK_NORM, _GATED, _NORMS, _FEEDFORWARD_NORMS),
    "glm4": _llama(_SEPARATE, _FUSED_GATED, _NORMS, {r"post_self_attn_layernorm|post_mlp_layernorm": Role.NORM}),
    "gpt2": Family(_GPT2, frozenset({"wte", "wpe", "h", "ln_f"})),
    "gpt_neox": _fused_per_head("layers", "attention", {r"embed_in": Role.TOK_EMB, r"final_layer_norm": Role.NORM}),
    "granite": _llama(_SEPARATE, _GATED, _NORMS),
    "llama": _llama(_SEPARATE, _GATED, _NORMS),
    "mistral": _llama(_SEPARATE, _GATED, _NORMS),
    "mixtral": _llama(_SEPARATE, _EXPERTS, _NORMS),
    "olmo2": _llama(_SEPARATE, _QK_NORM, _GATED, _NORMS, _FEEDFORWARD_NORMS),
    "opt": Family(_OPT, frozenset({"decoder"})),
    "phi3": _llama(_FUSED, _FUSED_GATED, _NORMS),
    "qwen2": _llama(_SEPARATE, _GATED, _NORMS),
    "qwen2_moe": _llama(_SEPARATE, _GATED, _EXPERTS, _shared_expert("shared_expert"), _NORMS),
    "qwen3": _llama(_SEPARATE, _QK_NORM, _GATED, _NORMS),
    "qwen3_moe": _llama(_SEPARATE, _QK_NORM, _GATED, _EXPERTS, _NORMS),
    "stablelm": _llama(_SEPARATE, {r"self_attn\.[qk]_layernorm\.norms\.\d+": Role.QK_NORM}, _GATED, _NORMS),
    "starcoder2": _llama(_SEPARATE, _PLAIN, _NORMS),
    "t5": Family(_T5, frozenset({"shared", "encoder"})),
    "vit": Family(_VIT, frozenset({"embeddings", "layers", "layernorm"})),
}

# What lies beside the backbone, by the end of the name of the transformers class that holds both.
_BERT_HEAD: Sites = {
    r"cls\.predictions(?:\.transform\.dense|\.decoder)?|cls\.seq_relationship": Role.HEAD,
    r"cls\.predictions\.transform\.LayerNorm": Role.NORM,
}
HF_BESIDE: dict[str, Sites] = {
    "LMHeadModel": {r"lm_head": Role.HEAD, **_BERT_HEAD},
    "ForCausalLM": {r"lm_head|embed_out": Role.HEAD},
    "DoubleHeadsModel": {r"lm_head|multiple_choice_head\.summary": Role.HEAD},
    "ForPreTraining": _BERT_HEAD,
    "ForMaskedLM": _BERT_HEAD,
    "ForNextSentencePrediction": _BERT_HEAD,
    "ForMultipleChoice": {r"classifier": Role.HEAD},
    "ForSequenceClassification": {r"score|classifier|classification_head\.(?:dense|out_proj)": Role.HEAD},
    "ForTokenClassification": {r"score|classifier": Role.HEAD},
    "ForQuestionAnswering": {r"qa_outputs": Role.HEAD},
    "ForImageClassification": {r"classifier": Role.HEAD},
    "ForMaskedImageModeling": {r"decoder\.0": Role.HEAD},
}
