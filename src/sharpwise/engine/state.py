"""State of an optimizer: allocated together, under torch's names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.block_lr import BlockLR
from sharpwise.engine.plan import Entry
from sharpwise.shards import like, local
from sharpwise.storage import Dense

OF_BLOCK_LR = {"lr_multiplier", "multiplier_from", "multiplier_to", "block_lr_measured"}
"""State of a block_lr: a state dict may have it or not."""
FIXED = ("rule", "decoupled_weight_decay", "block_lr")
"""Keys of groups that hold for the whole optimizer: fixed when it is built."""
TORCH_ONLY = {"amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused"}
"""Keys of torch's groups that are no hyperparameters here."""


def complete(
    entry: Entry, own: dict[str, Any], storage: Dense, block_lr: BlockLR | None, factors: Sequence[Sequence[float]]
) -> None:
    """Allocate missing state of one parameter: `step`, the rule's tensors, and those of a block_lr.

    `factors` are its multipliers, by factor and segment. Present state is kept, also that of others. A rule that needs
    a tensor only now (momentum raised from 0) counts its steps from there.
    """
    inner = local(entry.param)
    # All on one device: `set_optimizer_state_dict` refuses a full state dict whose local state is on several.
    device = torch.device("cpu") if inner.device.type == "meta" else inner.device
    missing = [name for name in entry.rule.state if name not in own]
    for name in set(entry.rule.all_state) - set(entry.rule.state) if "step" in own and own["step"] == 0 else ():
        own.pop(name, None)  # allocated under other hyperparameters, and never used
    if missing or "step" not in own:
        own["step"] = torch.zeros((), dtype=torch.float32, device=device)
    own |= {name: zeros(entry, name, storage) for name in missing}
    if block_lr is not None and "lr_multiplier" not in own:
        own |= of_block_lr(entry, block_lr, factors, device)


def zeros(entry: Entry, name: str, storage: Dense) -> Tensor:
    """One of the rule's tensors before the first step."""
    inner, kind = local(entry.param), entry.rule.all_state[name]
    if kind == "block":
        return torch.zeros(entry.n_blocks, dtype=entry.dtype, device=inner.device)
    if kind == "whole":
        shape = entry.rule.shape_of(name, tuple(entry.param.shape))
        return torch.zeros(shape, dtype=entry.dtype, device=inner.device)
    dtype = storage.dtype_for(entry.dtype)
    return like(entry.param, torch.zeros(inner.shape, dtype=dtype, device=inner.device))


def check_held(entry: Entry, own: Mapping[str, Any], who: str) -> None:
    """Raise ValueError unless the state that a step uses has the shape and the device of its parameter."""
    shape, device = tuple(entry.param.shape), local(entry.param).device
    for name in ("step", *entry.rule.state):
        tensor = own[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{who}: state {name!r} of {entry.name} must be a floating point tensor, got {what}")
    for name, kind in entry.rule.state.items():
        tensor = own[name]
        fit = shape if kind == "element" else (entry.n_blocks,) if kind == "block" else None
        fit = entry.rule.shape_of(name, shape) if fit is None else fit
        if tuple(tensor.shape) != tuple(fit):
            raise ValueError(f"{who}: state {name!r} of {entry.name} must have shape {fit}, got {tuple(tensor.shape)}")
        if local(tensor).device != device:
            raise ValueError(
                f"{who}: state {name!r} of {entry.name} is on {local(tensor).device}, the parameter on {device}; move "
                f"state back before the step"
            )


def of_block_lr(
    entry: Entry, block_lr: BlockLR, factors: Sequence[Sequence[float]], device: torch.device
) -> dict[str, Tensor]:
    """State of a block_lr for one parameter before the first measurement; see `engine.multipliers`."""
    state = {"lr_multiplier": torch.tensor(entry.multipliers, dtype=torch.float64, device=device)}
    if block_lr.sources:
        state["multiplier_to"] = torch.tensor(factors, dtype=torch.float64, device=device).T.contiguous()
        state["multiplier_from"] = state["multiplier_to"].clone()
        shape = len(entry.segments), len(block_lr.sources)
        state["block_lr_measured"] = torch.zeros(shape, dtype=torch.float64, device=device)
    return state


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any], who: str) -> None:
    """Raise unless a group has all settings, and those that hold for the whole optimizer as they were given."""
    missing = sorted(set(defaults) - set(group) - TORCH_ONLY)
    if missing:
        raise ValueError(f"{who}: a parameter group has lost {', '.join(missing)}; set them again")
    for key in FIXED:
        if key in defaults and group[key] != defaults[key]:
            raise ValueError(
                f"{who}: {key} is fixed when the optimizer is built, here as {defaults[key]!r}; a group has "
                f"{group[key]!r}. Build another optimizer, and load the state of this one if it fits"
            )
    if "seed" in defaults and type(group["seed"]) is not int:
        raise TypeError(f"{who}: seed must be a whole number, got {group['seed']!r}")


def refuse_variants(settings: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError for a variant of torch's that no rule here has."""
    for key in ("amsgrad", "maximize"):
        if settings.get(key):
            raise ValueError(f"{prefix} {key}=True, which this optimizer does not do")
