"""From what a training script has (a model, names, groups) to named parameter groups and a block map."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.blocks import BlockMap, canonical_name
from sharpwise.engine.mesh import reduces_late

Groups = list[dict[str, Any]]
Blocks = BlockMap | Mapping[str, Any] | None


def bind(first: Any, model: nn.Module | None, blocks: Blocks, who: str) -> tuple[Groups, BlockMap, dict[int, str]]:
    """Groups whose `params` are (name, tensor) pairs, the block map of the whole model, and names by tensor identity.

    Raises:
        TypeError: for tensors without a model, or something that holds no parameters.
        ValueError: for a parameter given twice, or one that does not belong to the model.
    """
    if isinstance(first, nn.Module):
        if model is not None and model is not first:
            raise TypeError(f"{who}: a model was given twice; pass it first, or as model=, not both")
        model, first = first, [(n, p) for n, p in first.named_parameters() if p.requires_grad]
        if not first:
            raise ValueError(f"{who}: the model has no trainable parameters")
    groups = _groups(first, who)
    names = {} if model is None else {id(p): canonical_name(n) for n, p in model.named_parameters()}
    for group in groups:
        group["params"] = [_named(item, names, model, who) for item in group["params"]]
    named = [pair for group in groups for pair in group["params"]]
    _check_unique(named, who)
    return groups, _block_map(named, model, blocks, who), names


def _groups(first: Any, who: str) -> Groups:
    if isinstance(first, Tensor) or not isinstance(first, Iterable):
        raise TypeError(
            f"{who}: expected a model, (name, tensor) pairs or parameter groups, got {type(first).__name__}"
        )
    items = list(first)
    if not items:
        raise ValueError(f"{who}: got an empty list of parameters")
    if all(isinstance(item, Mapping) for item in items):
        groups = [dict(item) for item in items]
        for group in groups:
            if "params" not in group:
                raise ValueError(f"{who}: a parameter group has no 'params', its keys are {sorted(group)}")
            own = group["params"]
            group["params"] = [own] if isinstance(own, Tensor) or _is_pair(own) else list(own)
            given = group.pop("param_names", None)
            if given is not None and not any(_is_pair(item) for item in group["params"]):
                group["params"] = list(zip(given, group["params"], strict=True))
        return groups
    return [{"params": items}]


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)


def _named(item: Any, names: Mapping[int, str], model: nn.Module | None, who: str) -> tuple[str, Tensor]:
    name, tensor = item if _is_pair(item) else (None, item)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{who}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{who}: parameters must be real floating point, got {tensor.dtype} for {name or 'a tensor'}")
    if model is None:
        if name is None:
            raise TypeError(
                f"{who}: tensors have no names, and the blocks of a model are found by name. "
                f"Say which model they belong to: {who}(groups, model=model, lr=...)"
            )
        return canonical_name(name), tensor
    known = names.get(id(tensor))
    if known is None:
        shape = f"{name or 'a tensor'} of shape {tuple(tensor.shape)}"
        raise ValueError(f"{who}: {shape} does not belong to the model {type(model).__name__}")
    if name is not None and canonical_name(name) != known:
        raise ValueError(f"{who}: the tensor called {name!r} is {known!r} in the model {type(model).__name__}")
    return known, tensor


def _check_unique(named: Sequence[tuple[str, Tensor]], who: str) -> None:
    seen_names: set[str] = set()
    seen_tensors: dict[int, str] = {}
    for name, tensor in named:
        if id(tensor) in seen_tensors:
            raise ValueError(f"{who}: parameter {name!r} is given twice (also as {seen_tensors[id(tensor)]!r})")
        if name in seen_names:
            raise ValueError(f"{who}: two parameters are called {name!r}")
        seen_names.add(name)
        seen_tensors[id(tensor)] = name


def _block_map(named: Sequence[tuple[str, Tensor]], model: nn.Module | None, blocks: Blocks, who: str) -> BlockMap:
    if isinstance(blocks, BlockMap):
        missing = [name for name, _ in named if name not in blocks]
        if missing:
            raise ValueError(f"{who}: the block map given does not know {', '.join(missing[:5])}")
        for name, tensor in named:
            if tuple(blocks[name][0].shape) != tuple(tensor.shape):
                raise ValueError(
                    f"{who}: {name} has shape {tuple(tensor.shape)}, the block map says {blocks[name][0].shape}"
                )
        return blocks
    if model is None:
        if blocks:
            raise TypeError(f"{who}: overrides need the model; pass it first, or as model=model")
        return BlockMap.unknown(named)
    return BlockMap.of(model, overrides=blocks, include_frozen=True)


def check_gradient(name: str, param: Tensor) -> None:
    """Raise for a gradient no rule can use."""
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise TypeError(f"{name}: sparse gradients are not supported; build the embedding with sparse=False")
    if reduces_late(grad):
        raise ValueError(
            f"{name}: its gradient is a partial sum on a mesh; redistribute it to the parameter's placement"
        )
    if grad.is_complex():
        raise TypeError(f"{name}: complex gradients are not supported, got {grad.dtype}")
