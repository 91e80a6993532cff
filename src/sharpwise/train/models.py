"""Models: from presets, Hugging Face configs, folders with weights and functions of the user."""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharpwise.hints import nearest
from sharpwise.installing import needs
from sharpwise.train.code import current_directory_first, find, names_function
from sharpwise.train.presets import (
    PRESETS,
    build_config,
    cannot_build,
    names_model_type,
    read_config,
    transformers_for,
)

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_model(
    spec: str | Path, *, device: str | torch.device = "cpu", settings: Mapping[str, Any] | None = None
) -> nn.Module:
    """A model with random weights from the torch generator, in torch's default dtype.

    Args:
        spec: name of a preset, a folder with a Hugging Face `config.json` or such a file, a `model_type` of
            transformers (the sizes are then the defaults of its config), or `module:function`, where the function
            returns a module. Modules are also looked for in the current directory.
        device: where the parameters are. On `meta` they take no memory, whatever the size of the model.
        settings: fields of the config to override, such as `vocab_size`, `attn_implementation` or `dtype`; `context` is
            the config's maximum of positions, whatever its name there. Arguments of a function.

    Raises:
        ValueError: the spec names nothing that can be built, the message lists the presets; or a setting that the
            config or the function does not have.
        ImportError: a preset or config, and transformers is not installed.
    """
    text = os.fspath(spec)
    settings = settings or {}
    if text in PRESETS:
        return _from_config(PRESETS[text], f"model {text!r}", device, settings)
    path = Path(text)
    if path.exists():
        return _from_config(read_config(path), str(path), device, settings)
    build = _function(text)
    if build is not None:
        return _from_function(build, text, device, settings)
    if names_model_type(text):
        return _from_config({"model_type": text}, f"model_type {text!r}", device, settings)
    if "/" in text:
        raise ValueError(
            f"unknown model {text!r}: there is no such file or folder, and nothing is fetched from a hub; give a "
            "Hugging Face config, or a folder with one"
        )
    raise ValueError(
        f"unknown model {text!r}{nearest(text.lower(), PRESETS, 0.8)}; give one of the presets {', '.join(PRESETS)}, "
        "a folder or .json file with a Hugging Face config, a model_type of transformers, or module:function"
    )


def usable_settings(spec: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that a function of the user takes; for a config all, and `load_model` checks them."""
    text = os.fspath(spec)
    build = _function(text) if names_function(text) else None
    allowed = settings if build is None else _takes(build, settings)
    return {name: value for name, value in settings.items() if name in allowed}


def load_pretrained(folder: str | Path, *, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """The causal language model that a folder holds, its parameters in float32 on the CPU, in training mode.

    Reads `config.json` and safetensors of this folder and nothing else; no code in it is run.

    Args:
        folder: what `save_pretrained` wrote, or the folder of a training run, whose `final` is then taken.
        settings: fields of the config to override, as in `load_model`; the weights have to fit them.

    Raises:
        ValueError: no such folder, no config or weights in it, a file that is cut off, or weights that are missing,
            left over or of another shape than the config says. The message names them.
        ImportError: transformers is not installed.
    """
    if settings and "dtype" in settings:
        raise ValueError(f"weights are loaded in float32, not {settings['dtype']!r}; call .to(dtype) on the model")
    path = _with_weights(Path(folder))
    built = build_config(read_config(path), str(path), settings or {})
    _check_weights(path)
    transformers = transformers_for(str(path))
    try:
        with _quiet(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                config=built,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported, and refused below
                output_loading_info=True,
            )
    except Exception as error:  # transformers has several kinds for weights that do not fit
        raise ValueError(f"{path}: transformers cannot load this: {' '.join(str(error).split())}") from error
    _check_report(report, path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if built.get_text_config().tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        raise ValueError(
            f"{path}: the config ties the head to the embedding, but the weights have another head; "
            "if it is meant, give the setting tie_word_embeddings=false"
        )
    loaded: nn.Module = model.train()
    return loaded


def tokenizer_of(folder: str | Path) -> Any:
    """The `tokenizers.Tokenizer` beside the weights that `load_pretrained` reads there; None without tokenizer.json."""
    file = _with_weights(Path(folder)) / "tokenizer.json"
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{file}: not a tokenizer ({error})") from error


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _from_config(
    config: Mapping[str, Any], what: str, device: str | torch.device, settings: Mapping[str, Any]
) -> nn.Module:
    built = build_config(config, what, settings)
    dtype = torch.get_default_dtype() if built.dtype is None else built.dtype
    try:
        with torch.device(device):
            model: nn.Module = transformers_for(what).AutoModelForCausalLM.from_config(
                built, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:
        raise cannot_build(what, error) from error
    return model


def _with_weights(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with config.json and {_WEIGHTS}, or that of a run")
    if (folder / "config.json").exists():
        return folder
    if (folder / "final").is_dir():
        return folder / "final"
    raise ValueError(
        f"{folder}: no config.json in this folder, and no final/ as in that of a finished run; "
        "give a folder that save_pretrained wrote"
    )


def _check_weights(folder: Path) -> None:
    """Raise ValueError for a weight file that is not there or not whole, by its name."""
    with needs(f"reading {folder}", "measure"):
        from safetensors import SafetensorError, safe_open
    files = [_WEIGHTS]
    if not (folder / _WEIGHTS).exists() and (folder / _INDEX).exists():
        try:
            files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX}: not an index of weights ({error})") from None
    for file in files:
        if not (folder / file).exists():
            there = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
            pickled = f" (pickled weights, {', '.join(there)}, are not read: save them with safetensors)"
            raise ValueError(f"{folder}: no {file} in this folder{pickled if there else ''}; expected the weights")
        try:
            with safe_open(folder / file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file}: damaged or cut off ({error}); copy it again") from error


def _check_report(report: Mapping[str, Any], folder: Path) -> None:
    mismatched = [
        f"{name} is {tuple(there)}, the config says {tuple(wanted)}"
        for name, there, wanted in sorted(report["mismatched_keys"])
    ]
    for problem, names in (
        ("weights of another shape", mismatched),
        ("missing weights", sorted(report["missing_keys"])),
        ("weights that the model does not have", sorted(report["unexpected_keys"])),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(
                f"{folder}: {problem}: {', '.join(names[:5])}{more}; config.json and settings have to "
                "describe the model that was saved"
            )


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the table of weights that do not fit and the progress bar: the caller gets an error instead."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()


# --- functions of the user -------------------------------------------------------------------------------------------


def _function(spec: str) -> Callable[..., object] | None:
    """What `module:function` names, None where the text has not this form."""
    found = find(spec, f"give module:function, or one of the presets {', '.join(PRESETS)}")
    if found is not None and (not callable(found) or isinstance(found, nn.Module)):
        raise ValueError(
            f"{spec}: {spec.partition(':')[2]!r} is a {type(found).__name__}, expected a function that returns a module"
        )
    return found


def _from_function(
    build: Callable[..., object], spec: str, device: str | torch.device, settings: Mapping[str, Any]
) -> nn.Module:
    allowed = _takes(build, settings)
    for name in settings:
        if name not in allowed:
            raise ValueError(
                f"{spec}: the function has no parameter {name!r}{nearest(name, allowed, 0.6)}, and it alone knows "
                "what it builds; give it one, or leave the setting out"
            )
    try:
        with current_directory_first(), torch.device(device):
            model = build(**settings)
    except Exception as error:
        where = " (it is called on the meta device, where tensors have shapes and no values)"
        hint = where if torch.device(device).type == "meta" else ""
        raise ValueError(f"{spec}: the function raised {type(error).__name__}: {error}{hint}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{spec}: the function returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _takes(build: Callable[..., object], names: Iterable[str]) -> list[str]:
    """Which of these a function takes by name."""
    try:
        parameters = inspect.signature(build).parameters.values()
    except ValueError:  # built in, without a signature
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(names)
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
