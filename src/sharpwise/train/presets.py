"""Hugging Face configs: by name, of shapes that papers trained and published and of sizes for a CPU; and from files.

What a config leaves out has the default of its model_type. Counts are of all parameters, tied ones once, as the tests
check them. GPT-2 has no dropout here: the 0.1 of Hugging Face is for fine-tuning, pretraining is done without.
"""

import importlib.util
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpwise.hints import nearest
from sharpwise.installing import needs


def gpt2(layers: int, width: int, heads: int, **other: Any) -> dict[str, Any]:
    """GPT-2: learned positions, biases, the head tied to the embedding; 50257 tokens, 1024 positions."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {"model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": heads, **dropout, **other}


def llama(
    layers: int, width: int, heads: int, ffn: int, vocabulary: int, context: int, *, kv: int | None = None, **other: Any
) -> dict[str, Any]:
    """LLaMA: rotary positions, SwiGLU, RMSNorm, no biases, an untied head; `kv` key and value heads, by default all."""
    grouped = {} if kv is None else {"num_key_value_heads": kv}
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        **grouped,
        **other,
    }


def pythia(layers: int, width: int, heads: int) -> dict[str, Any]:
    """GPT-NeoX as Pythia has it: a quarter of each head rotates, an untied head."""
    return {
        "model_type": "gpt_neox",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
    }


_ZERO = {"bos_token_id": 0, "eos_token_id": 0}  # the end of a text, token 0 of the tokenizers that are trained here
_BPE = {"bos_token_id": 50256, "eos_token_id": 50256}  # GPT-2's tokenizer, its 50257 tokens padded to 50304
# No pad_token_id for T5's: transformers would not train that row of the embedding.
_T5 = {"bos_token_id": None, "eos_token_id": 1}
_LLAMA3 = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 128000, "eos_token_id": 128001}
# Sizes for a CPU. The tanh formula of GPT-2's GELU in one kernel: the same but for rounding, and quicker.
_SMALL = {"vocab_size": 4096, "n_positions": 256, "activation_function": "gelu_pytorch_tanh", **_ZERO}

PRESETS: dict[str, dict[str, Any]] = {
    # GPT-2, Radford et al. 2019: 124M, 355M, 774M, 1558M.
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    # Sharpness Disparity, arXiv 2502.19002, on GPT-2's tokens. The names are the paper's and count embedding and head.
    # Its "90M" is 96.1M; the others are what they are called.
    "llama-90m": llama(2, 768, 12, 3072, 50304, 1024, **_BPE),
    "llama-134m": llama(6, 768, 12, 3072, 50304, 1024, **_BPE),
    "llama-230m": llama(16, 768, 12, 3072, 50304, 1024, **_BPE),
    "llama-250m": llama(8, 1024, 16, 4096, 50304, 1024, **_BPE),
    "llama-500m": llama(15, 1280, 20, 5120, 50304, 1024, **_BPE),
    "llama-750m": llama(13, 1664, 26, 6656, 50304, 1024, **_BPE),
    "llama-900m": llama(18, 1600, 25, 6400, 50304, 1024, **_BPE),
    # TinyLlama's layers with GPT-2's tokens instead of 32000, hence 1175M and not 1100M.
    "tinyllama-1.1b": llama(22, 2048, 32, 5632, 50304, 2048, kv=4, rms_norm_eps=1e-5, **_BPE),
    # LLR, arXiv 2605.22297, on T5's tokens. Width, layers and ffn are the paper's. The heads are our choice, it gives
    # none: 64 wide, and in the 3B 80 as GaLore has it. Its "60M" is that without the embedding and 84.4M with it;
    # "135M" is that with it, "350M" 368.2M, "1B" 1339.6M and "3B" 2686.5M.
    "llr-60m": llama(6, 768, 12, 1512, 32128, 1024, **_T5),
    "llr-135m": llama(12, 768, 12, 2048, 32128, 1024, **_T5),
    "llr-350m": llama(24, 1024, 16, 2736, 32128, 1024, **_T5),
    "llr-1b": llama(24, 2048, 32, 5461, 32128, 1024, **_T5),
    "llr-3b": llama(32, 2560, 32, 6848, 32128, 1024, **_T5),
    # As published by Meta. Llama 3.2 without the scaling of its rotation for long texts, which is no part of the shape.
    "llama-2-7b": llama(32, 4096, 32, 11008, 32000, 4096, rms_norm_eps=1e-5),
    "llama-3-8b": llama(32, 4096, 32, 14336, 128256, 8192, kv=8, **_LLAMA3),
    "llama-3.2-3b": llama(28, 3072, 24, 8192, 128256, 8192, kv=8, tie_word_embeddings=True, **_LLAMA3),
    "pythia-160m": pythia(12, 768, 12),
    # For a CPU. The names count the layers alone, without embeddings and head.
    "gpt2-0.4m": gpt2(2, 128, 4, **_SMALL),
    "gpt2-1m": gpt2(4, 144, 4, **_SMALL),
    "gpt2-3m": gpt2(4, 256, 4, **_SMALL),
    "gpt2-10m": gpt2(6, 384, 6, **_SMALL),
    "gpt2-30m": gpt2(10, 512, 8, **_SMALL),
    "llama-0.4m": llama(2, 128, 4, 352, 4096, 256, **_ZERO),
    "llama-1m": llama(4, 144, 4, 384, 4096, 256, **_ZERO),
    "llama-3m": llama(4, 256, 4, 688, 4096, 256, **_ZERO),
    "llama-10m": llama(6, 384, 6, 1024, 4096, 256, **_ZERO),
    "llama-30m": llama(10, 512, 8, 1376, 4096, 256, **_ZERO),
    # For tests.
    "gpt2-tiny": gpt2(2, 64, 4, vocab_size=256, n_positions=128, **_ZERO),
    "llama-tiny": llama(2, 64, 4, 176, 256, 128, kv=2, **_ZERO),
}


# --- from a table or a file to an object of transformers -------------------------------------------------------------


def transformers_for(what: str) -> Any:
    with needs(what, "hf"):
        import transformers
    return transformers


def read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise ValueError(f"{path}: no config.json in this folder; expected that of a Hugging Face model")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); expected a Hugging Face config") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file}: no 'model_type'; expected a Hugging Face config")
    return config


def names_model_type(text: str) -> bool:
    """Whether transformers, where it is installed, has a config of this model_type."""
    if importlib.util.find_spec("transformers") is None:
        return False
    return text in transformers_for(text).models.auto.configuration_auto.CONFIG_MAPPING


def build_config(config: Mapping[str, Any], what: str, settings: Mapping[str, Any]) -> Any:
    """The object of transformers. Its dtype is that of the settings: weights in a file say nothing about training."""
    transformers = transformers_for(what)
    model_type = config["model_type"]
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in known:
        raise ValueError(f"{what}: transformers {transformers.__version__} has no model_type {model_type!r}")
    kind = known[model_type]
    if kind not in transformers.AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{what}: model_type {model_type!r} has no causal language model in transformers; "
            "write a function that builds it and give module:function"
        )
    named = _own_names(kind, config, settings, what)
    without = {"model_type", "dtype", "torch_dtype", *named}
    config = _without_code(config)
    fields = {key: value for key, value in config.items() if kind.attribute_map.get(key, key) not in without} | named
    vocabulary = settings.get("vocab_size")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # Tokens of the tokenizer that the config was made for mean nothing in a smaller vocabulary.
        token = fields.get(key, getattr(kind, key, None))
        if isinstance(vocabulary, int) and isinstance(token, int) and token >= vocabulary and key not in settings:
            fields[key] = None
    try:
        return kind.from_dict(fields)
    except Exception as error:  # transformers has several kinds for values that do not fit
        raise cannot_build(what, error) from error


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the fields that have transformers fetch and run code: kernels of the hub, modules beside it."""
    return {
        key: _without_code(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if "attn_implementation" not in key and key not in ("auto_map", "use_kernels", "kernel_config")
    }


def _own_names(kind: Any, config: Mapping[str, Any], settings: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The settings under the names that this config has for them. Raises ValueError for a name it does not have."""
    aliases = dict(kind.attribute_map)
    known = {*inspect.signature(kind).parameters, *config, *aliases, "attn_implementation", "dtype"}
    known -= {"model_type", "torch_dtype", "kwargs"}
    if "rope_parameters" in known and "rope_parameters" not in config:  # which transformers would prefer, silently
        known |= {"rope_theta", "rope_scaling"}
    positions = aliases.get("max_position_embeddings", "max_position_embeddings")
    positions = next((name for name in (positions, "max_seq_len") if name in known), None)
    if positions:
        known.add("context")
        aliases.setdefault("context", positions)
    for name in settings:
        if name == "context" and name not in known:
            raise ValueError(f"{what}: model_type {kind.model_type!r} has no maximum of positions; leave out 'context'")
        if name not in known or name.startswith("_"):
            raise ValueError(
                f"{what}: the config of model_type {kind.model_type!r} has no field {name!r}"
                f"{nearest(name, known, 0.6)}; fields are those of transformers.{kind.__name__}"
            )
        if name == "attn_implementation" and "/" in str(settings[name]):
            raise ValueError(f"{what}: {settings[name]!r} is code on the hub, which is not run; take eager or sdpa")
    named = {aliases.get(name, name): value for name, value in settings.items()}
    if len(named) < len(settings):
        raise ValueError(f"{what}: a field is set twice, under two of its names: {', '.join(settings)}; give one")
    return named


def cannot_build(what: str, error: Exception) -> ValueError:
    return ValueError(f"{what}: transformers cannot build this config: {' '.join(str(error).split())}")
