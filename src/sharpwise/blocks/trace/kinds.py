"""A model with one layer of each kind: what its names say of all layers can be checked on these."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sharpwise.blocks.trace.example import unwrapped

_SWITCHES = (bool, int, str, type(None))


def one_of_each_kind(model: nn.Module) -> nn.Module | None:
    """The model, but of its lists of layers only the first member of each kind; None where that is all of them.

    Layers of one kind have the same classes, parameters of the same names and shapes, and the same switches: booleans,
    strings and whole numbers among the attributes of their modules, but for the number of the layer. The lists, and
    what holds them, are copies; parameters and all other modules are those of the model.
    """
    model = unwrapped(model)
    shorter = _shorter(model, {})
    return None if shorter is model else shorter


def _shorter(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = module
    inside = module._modules
    members = [member for member in inside.values() if member is not None]
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and all(any(m.children()) for m in members):
        held: Mapping[str, nn.Module | None] = {str(i): m for i, m in enumerate(_first_of_each_kind(members))}
        changed = len(held) < len(members)
    else:
        held = {name: None if child is None else _shorter(child, known) for name, child in inside.items()}
        changed = any(held[name] is not child for name, child in inside.items())
    if changed:
        copy = known[id(module)] = object.__new__(type(module))
        vars(copy).update(vars(module), _modules=dict(held))
    return known[id(module)]


def _first_of_each_kind(layers: Sequence[nn.Module]) -> list[nn.Module]:
    switches = [_switches(layer) for layer in layers]
    numbers = {
        key
        for key, first in (switches[0] if switches else {}).items()
        if type(first) is int and all(values.get(key) == first + i for i, values in enumerate(switches))
    }
    firsts: dict[Any, nn.Module] = {}
    for layer, values in zip(layers, switches, strict=True):
        parameters = tuple((name, p.shape) for name, p in layer.named_parameters(remove_duplicate=False))
        classes = tuple((path, type(module)) for path, module in layer.named_modules(remove_duplicate=False))
        kind = (classes, parameters, frozenset(item for item in values.items() if item[0] not in numbers))
        firsts.setdefault(kind, layer)
    return list(firsts.values())


def _switches(layer: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (path, name): value
        for path, module in layer.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if type(value) in _SWITCHES
    }
