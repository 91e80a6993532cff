"""A tiny batch made up from a model's config, and a model that notices nothing of a trace."""

import contextlib
import inspect
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""A batch for the model: a tensor, arguments by place, or by name."""
TOKENS = 8
_CONTAINERS = (list, dict, set, OrderedDict)  # hooks lie in ordered ones


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: the device of its first parameter that is not on the meta device, else the CPU."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module below torch.compile and DDP: its forward is the same."""
    while True:
        wraps = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        inner = model.module if wraps else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def make_example(model: nn.Module, tokens: int = TOKENS) -> dict[str, Any]:
    """Keyword arguments for `model`, made up from its config and the arguments that its forward must have.

    Raises:
        ValueError: an argument cannot be guessed.
    """
    # Below wrappers, PEFT's or one's own, lies the model that tells what it takes.
    known = (m for m in model.modules() if hasattr(m, "main_input_name") and hasattr(m, "config") and _named(m))
    inner = next(known, model)
    config = getattr(inner, "config", None)
    device = device_of(model)
    parameters = _named(model) or _named(inner)
    made: dict[str, Any] = {}
    ids = ids_like(model, config, tokens).to(device)
    for name, p in parameters.items():
        value = _guess(inner, name, config, ids, device)
        if value is not None:
            made[name] = value
        elif p.default is p.empty:
            if not made and _alone(parameters) and (alone := _only_input(model, ids)) is not None:
                made[name] = alone
                continue
            raise ValueError(f"its forward needs {name!r}, which cannot be guessed; it takes {asked_for(parameters)}")
    if "use_cache" in parameters:
        made["use_cache"] = False
    if {"input_ids", "inputs_embeds"} <= made.keys():
        del made["inputs_embeds"]
    return made


def asked_for(parameters: Mapping[str, inspect.Parameter]) -> str:
    """What an example of these arguments looks like: `example=x`, or `example=(x, t)`; those without a default.

    >>> asked_for(inspect.signature(lambda x, t, mask=None: None).parameters)
    'example=(x, t)'
    """
    needed = [name for name, p in parameters.items() if p.default is p.empty]
    positional = all(parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY for name in needed)
    if not positional:
        return "example={" + ", ".join(f"{name!r}: {name}" for name in needed) + "}"
    return f"example={needed[0]}" if len(needed) == 1 else f"example=({', '.join(needed)})"


def _named(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of a forward that have names."""
    signature = inspect.signature(module.forward).parameters
    return {name: p for name, p in signature.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _alone(parameters: Mapping[str, Any]) -> bool:
    """Whether a forward must be given one argument only."""
    return sum(p.default is p.empty for p in parameters.values()) == 1


def _only_input(model: nn.Module, ids: Tensor) -> Tensor | None:
    """What the only argument may be: token numbers, or where nothing is looked up but attended to, vectors."""
    attention = next((m for m in model.modules() if isinstance(m, nn.MultiheadAttention)), None)
    if _lookups(model):
        return ids
    return None if attention is None else torch.rand(1, ids.shape[1], attention.embed_dim, device=ids.device)


def _lookups(model: nn.Module) -> list[nn.Embedding]:
    return [m for m in model.modules() if isinstance(m, nn.Embedding)]


def ids_like(model: nn.Module, config: Any, tokens: int) -> Tensor:
    """Token numbers [1, tokens], not consecutive, none of them special."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        size = max((m.num_embeddings for m in _lookups(model)), default=64)
    special = {
        value
        for c in (config, text)
        for key, value in (vars(c) if hasattr(c, "__dict__") else {}).items()
        if key.endswith(("_token_id", "_token_index", "_idx")) and isinstance(value, int)
    }
    allowed = [i for i in range(min(size, 4096)) if i not in special] or [0]
    # Steps of 1, 2, 3, ...: never consecutive, as positions are.
    return torch.tensor([[allowed[i * (i + 1) // 2 % len(allowed)] for i in range(1, tokens + 1)]], device="cpu")


def _guess(model: nn.Module, name: str, config: Any, ids: Tensor, device: torch.device) -> Any:
    if name in ("input_ids", "decoder_input_ids") and config is not None:
        if name == "decoder_input_ids" and not getattr(config, "is_encoder_decoder", False):
            return None
        return ids
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
        if isinstance(size, int) and getattr(model, "main_input_name", name) == name:
            return torch.rand(1, channels, size, size, device=device)
    if name == "input_features" and getattr(config, "num_mel_bins", None):
        frames = 2 * getattr(config, "max_source_positions", 50)
        return torch.rand(1, config.num_mel_bins, frames, device=device)
    return None


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[list[Tensor]]:
    """In evaluation mode inside; as it was before once left, however that happens.

    Restored are the training flags, attributes (lists, dicts and sets with what they hold), hooks and buffers of all
    modules, and the random numbers of torch, Python and numpy. Inside, buffers and tensors in attributes are copies,
    which are handed out. Hooks run, since some compute weights.
    """
    modules = list(model.modules())
    attributes = [dict(vars(m)) for m in modules]
    kinds: list[Any] = [kind for m in modules for kind in (m._buffers, m._parameters, m._modules)]
    members = [dict(kind) for kind in kinds]
    containers = [
        (held, held.copy() if held else ())  # most are empty: hooks that no module has
        for before in attributes
        for held in before.values()
        if type(held) in _CONTAINERS
    ]
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    on_devices = [(device, torch.cuda.get_rng_state(device)) for device in cuda]
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        copies: dict[int, Tensor] = {}
        held_by_model: list[Tensor] = []
        for module in modules:
            module.training = False  # not eval(): a train() of one's own may merge weights
            for held in (vars(module), module._buffers):
                for name, value in [(n, v) for n, v in held.items() if isinstance(v, Tensor)]:
                    copy = value
                    if value.device.type != "meta":
                        copy = held[name] = copies.setdefault(id(value), value.detach().clone())
                    held_by_model.append(copy)
        yield held_by_model
    finally:
        for module, before in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(before)
        for kind, held in zip(kinds, members, strict=True):
            kind.clear()
            kind.update(held)
        for held, content in containers:
            if type(held) is list:
                held[:] = content
            elif held or content:
                held.clear()
                held.update(content)
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        np.random.set_state(numbers[2])
        for device, state in on_devices:
            torch.cuda.set_rng_state(state, device)
