"""Models by name: presets, Hugging Face config files and functions of the user, all with random weights."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

# Hugging Face configs of the published shapes (what is left out has the default of its model_type), and two tiny ones.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_embd": 768, "n_head": 12},
    "gpt2-medium": {"model_type": "gpt2", "n_layer": 24, "n_embd": 1024, "n_head": 16},
    "gpt2-large": {"model_type": "gpt2", "n_layer": 36, "n_embd": 1280, "n_head": 20},
    "gpt2-xl": {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25},
    "llama-2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "pythia-160m": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
    },
    "gpt2-tiny": {
        "model_type": "gpt2",
        "vocab_size": 256,
        "n_positions": 128,
        "n_layer": 2,
        "n_embd": 64,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama-tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


def load_model(spec: str | Path, *, device: Literal["cpu", "meta"] = "cpu") -> nn.Module:
    """A model with random weights from the torch generator.

    Args:
        spec: name of a preset, a folder with a Hugging Face `config.json` or such a file, or `module:function`, where
            the function takes no argument and returns a module. Modules are also looked for in the current directory.
        device: where the parameters are. On `meta` they take no memory, whatever the size of the model.

    Raises:
        ValueError: the spec names nothing that can be built; the message lists the presets.
        ImportError: a preset or config, and transformers is not installed.
    """
    text = os.fspath(spec)
    if text in PRESETS:
        return _from_config(PRESETS[text], f"model {text!r}", device)
    path = Path(text)
    if path.exists():
        return _from_config(_read_config(path), str(path), device)
    module, colon, function = text.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), *function.split("."))):
        with _current_directory_first():
            build = _find(module, function, text)
            return _from_function(build, text, device)
    raise ValueError(
        f"unknown model {text!r}; give one of the presets {', '.join(PRESETS)}, a folder or .json file with a "
        "Hugging Face config, or module:function"
    )


def _read_config(path: Path) -> dict[str, Any]:
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


def _from_config(config: dict[str, Any], what: str, device: str) -> nn.Module:
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{what} needs transformers, which is not installed: pip install 'sharpwise[hf]'") from None
    model_type = config["model_type"]
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if model_type not in known:
        raise ValueError(f"{what}: transformers {transformers.__version__} has no model_type {model_type!r}")
    if known[model_type] not in transformers.AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{what}: model_type {model_type!r} has no causal language model in transformers; "
            "write a function that builds it and give module:function"
        )
    try:
        built = known[model_type].from_dict({key: value for key, value in config.items() if key != "model_type"})
        with torch.device(device):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(built)
    except Exception as error:  # transformers has several kinds for values that do not fit
        reason = " ".join(str(error).split())
        raise ValueError(f"{what}: transformers cannot build this config: {reason}") from error
    return model


def _find(module: str, function: str, spec: str) -> Callable[[], object]:
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise ValueError(f"{spec}: importing {module} failed: {error}") from error
        raise ValueError(
            f"{spec}: no module {module!r} here or among the installed ones; give module:function, "
            f"or one of the presets {', '.join(PRESETS)}"
        ) from None
    except Exception as error:
        raise ValueError(f"{spec}: importing {module} failed: {type(error).__name__}: {error}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{spec}: module {module!r} has no {function!r}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise ValueError(f"{spec}: {function!r} is a {type(found).__name__}, expected a function that returns a module")
    return found


def _from_function(build: Callable[[], object], spec: str, device: str) -> nn.Module:
    try:
        with torch.device(device):
            model = build()
    except Exception as error:
        raise ValueError(f"{spec}: the function raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec}: the function returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


@contextmanager
def _current_directory_first() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
