"""Loading of state dicts: by name, checked as a whole before anything is copied."""

import copy
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sharpwise.block_lr import BlockLR
from sharpwise.blocks import canonical_name
from sharpwise.engine.foreign import ANEW, filled, of_another_rule, of_other_keys, of_other_shape
from sharpwise.engine.recoding import renamed
from sharpwise.engine.state import (
    FIXED,
    STORAGES,
    TORCH_ONLY,
    block_lr_keys,
    is_of_block_lr,
    keys_of,
    refuse_variants,
    zeros,
)
from sharpwise.engine.view import HELD, SNR, ParamView
from sharpwise.hints import kind_of
from sharpwise.shards import is_dtensor, local

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A state dict, read for one optimizer.

    Attributes:
        state: by parameter name; `groups`: new hyperparameters, in the order of the optimizer's groups.
        storages: names of those it was saved in, likewise.
        ours: whether this rule wrote it, by its own account; `anew`: whether its multipliers are of another block_lr.
    """

    state: dict[str, dict[str, Any]]
    groups: list[dict[str, Any]]
    storages: dict[str, dict[str, str]]
    ours: bool
    anew: bool


def hooked(optimizer: Any, state_dict: object, hooks: Iterable[Any], who: str) -> dict[str, Any]:
    """What is to be loaded, as the hooks before loading leave it.

    Raises:
        TypeError, ValueError: for what is no state dict.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{who}: load_state_dict takes what state_dict() gave, got {kind_of(state_dict)}")
    found = dict(state_dict)
    for hook in hooks:
        changed = hook(optimizer, found)
        found = found if changed is None else changed
    if not {"state", "param_groups"} <= set(found):
        raise ValueError(
            f"{who}: not an optimizer's state dict, which has 'state' and 'param_groups': it has "
            f"{sorted(map(str, found))[:5]}"
        )
    return found


def read(
    state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]], rule: str, block_lr: BlockLR | None, who: str
) -> Saved:
    """Match a state dict with the groups of an optimizer, by name.

    Raises:
        ValueError: for what is no state dict, for names that are missing, unknown or there twice, and for another rule.
    """
    _check_form(state_dict, who)
    state_dict = {
        **state_dict,
        "state": {i: renamed(own) for i, own in state_dict["state"].items()},
        "param_groups": [renamed(group) for group in state_dict["param_groups"]],
    }
    current = [(n, p) for group in groups for n, p in zip(group["param_names"], group["params"], strict=True)]
    ids = _saved_names(state_dict, current, [len(group["params"]) for group in groups], who)
    state = {name: _begun(state_dict["state"].get(ids[name], {})) for name, _ in current}
    new = [_group_of_saved(group, group["param_names"], state_dict, ids, who) for group in groups]
    ours = all(group.get("rule") == rule for group in state_dict["param_groups"])
    anew = _is_of_another(block_lr, [group.pop("block_lr", None) for group in new], who)
    if anew:
        state = {n: {k: v for k, v in own.items() if not is_of_block_lr(k)} for n, own in state.items()}
    theirs = {group.get("control") for group in state_dict["param_groups"]}
    if theirs - {group.get("control") for group in groups}:
        names = ", ".join(sorted(map(str, theirs)))
        logger.warning(
            "%s: the state was saved under control %s, and goes on under %s", who, names, groups[0].get("control")
        )
    home = {i: group for group in state_dict["param_groups"] for i in group["params"]}
    storages = {n: {k: home[ids[n]][k] for k in STORAGES if k in home[ids[n]]} for n, _ in current}
    return Saved(state, new, storages, ours, anew)


def _check_form(saved: Mapping[str, Any], who: str) -> None:
    """Raise ValueError unless state is by parameter, and groups hold parameters."""
    state, groups = saved["state"], saved["param_groups"]
    fits = isinstance(state, Mapping) and all(isinstance(own, Mapping) for own in state.values())
    fits = fits and isinstance(groups, Sequence) and all(isinstance(g, Mapping) and "params" in g for g in groups)
    if not fits:
        raise ValueError(f"{who}: the state dict is damaged: state goes by parameter, and groups hold 'params'")


def _is_of_another(block_lr: BlockLR | None, theirs: Collection[str | None], who: str) -> bool:
    """Whether the multipliers of a state dict, saved under `theirs`, are to be ignored; warns if they are.

    Those of a fixed block_lr may come without its name.
    """
    if block_lr is None or set(theirs) <= ({str(block_lr)} if block_lr.sources else {str(block_lr), None}):
        return False
    names = ", ".join(sorted({repr(name or "") for name in theirs}))
    logger.warning("%s: the state is of block_lr %s; %s begins anew", who, names, block_lr)
    return True


def begin_block_lr(state: Any, groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]) -> None:
    """Drop multipliers and measured values; the step of the block_lr becomes the largest step of a parameter."""
    taken = max((int(own["step"]) for own in state.values() if "step" in own), default=0)
    for own in state.values():
        for key in [key for key in own if is_of_block_lr(key)]:
            del own[key]
    for group in groups:
        for key in ("block_lr_step", "multiplier_ramp"):
            group.pop(key, None)
        if "block_lr_step" in defaults:
            group |= {"block_lr_step": taken, "multiplier_ramp": defaults["multiplier_ramp"]}


def _saved_names(
    saved: Mapping[str, Any], current: Sequence[tuple[str, Tensor]], sizes: Sequence[int], who: str
) -> dict[str, Any]:
    """Name -> id of a saved state dict; by position only where it carries no names (plain torch).

    Args:
        sizes: numbers of parameters in the groups here.

    Raises:
        ValueError: if names are missing or unknown, or there are no names and the groups differ in size.
    """
    groups = saved["param_groups"]
    ids = [i for group in groups for i in group["params"]]
    if ids and all(isinstance(i, str) for i in ids):
        # `get_optimizer_state_dict` saves by name, and `set_optimizer_state_dict` puts `params` into the order of the
        # optimizer while `param_names` stay in the order in which they were saved.
        names = ids
    else:
        names = [n for group in groups for n in group.get("param_names", ())]
    if not names:
        if len(ids) != len(current):
            raise ValueError(
                f"{who}: the state dict holds {len(ids)} parameters without names, this optimizer {len(current)}: "
                f"it is of another model, or other parameters were frozen when the optimizer was built"
            )
        theirs = [len(group["params"]) for group in groups]
        if theirs != list(sizes):
            raise ValueError(
                f"{who}: the state dict holds parameters without names, in groups of {', '.join(map(str, theirs))}; "
                f"here they are in groups of {', '.join(map(str, sizes))}, so that nothing says which is which. Build "
                f"this optimizer with the groups, in the order, that it was saved with"
            )
        names = [name for name, _ in current]
    for what, given in (("names", list(map(canonical_name, names))), ("numbers", ids)):
        twice = sorted({str(one) for one in given if given.count(one) > 1}) if len(set(given)) < len(given) else []
        if twice:
            raise ValueError(f"{who}: the state dict {what} a parameter twice: {_few(twice)}; it is damaged")
    lost = sorted(map(str, set(saved["state"]) - set(ids)))
    if lost:
        raise ValueError(f"{who}: the state dict is damaged: no group has the parameters {_few(lost)} of its state")
    by_name = dict(zip(map(canonical_name, names), ids, strict=True))
    mine = {name for name, _ in current}
    missing, unknown = sorted(mine - set(by_name)), sorted(set(by_name) - mine)
    if missing or unknown:
        raise ValueError(f"{who}: {_apart(missing, unknown, len(mine) - len(missing), who)}")
    return by_name


def _apart(missing: list[str], unknown: list[str], shared: int, who: str) -> str:
    """Message: how the names of a state dict differ from those here, and what may have caused it."""
    if not shared or (missing and unknown):
        return (
            f"the state dict is of another model: it lacks {_few(missing)} and has {_few(unknown)} that is not here. "
            "Parameters are matched by name"
        )
    which = f"lacks {_few(missing)}, which is here" if missing else f"has {_few(unknown)}, which is not here"
    when = "the optimizer that saved it" if missing else "this optimizer"
    return (
        f"the state dict {which}. It is of another model; or this was frozen when {when} was built: {who}(model) takes "
        f"what requires a gradient at that time, {who}(model.parameters(), model=model) takes all"
    )


def _begun(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Saved state of one parameter; torch's SGD counts no steps, and holds None where momentum has not begun."""
    held = filled(saved)
    return {"step": 1.0, **held} if set(held) == {"momentum_buffer"} else held


def _check_fits(view: ParamView, own: Mapping[str, Any], saved: Mapping[str, Any], ours: bool, who: str) -> None:
    """Raise unless the saved state of one parameter fits the allocated one.

    Args:
        storages: names of those it was saved in, likewise.
        ours: whether this rule wrote the file, by its own account: other keys in it were then put there by others.

    Raises:
        ValueError: for state of another rule, another shape, or shards of another mesh.
        RuntimeError: for shards without the process group that reaches the others.
    """
    variants = keys_of(view, variants=True)
    if not variants.keys() & saved:
        return  # never stepped
    # A norm that was not saved is held from the next step on, and gradient SNR is measured from there.
    name, needed = view.name, {key for key, (_, kept) in keys_of(view).items() if kept not in (HELD, SNR)}
    if needed - set(saved):
        raise ValueError(
            f"{who}: the saved state of {name} has {sorted(saved)}, this rule needs {sorted(needed)}: "
            f"{of_other_keys(saved, view.rule.name)}"
        )
    extra = set(saved) - set(variants) - block_lr_keys(view)
    if extra and not ours:
        raise ValueError(
            f"{who}: the saved state of {name} also has {sorted(extra)}, which this rule does not keep: "
            f"{of_other_keys(saved, view.rule.name)}"
        )
    for key in set(own) & set(saved) - extra:
        value = saved[key]
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if shape != tuple(own[key].shape):
            raise ValueError(
                f"{who}: the saved {key} of {name} has shape {shape}, here it is {tuple(own[key].shape)}: "
                f"{of_other_shape(key, saved, own)}"
            )
        if isinstance(value, Tensor):
            _check_values(f"{who}: the saved {key} of {name}", local(value), local(own[key]))
        if isinstance(value, Tensor) and is_dtensor(value):
            _check_shards(f"{who}: the saved {key} of {name}", value, own[key])


def _check_values(what: str, value: Tensor, own: Tensor) -> None:
    """Raise ValueError for a tensor that cannot be copied as a whole: copying comes after all checks."""
    if value.is_meta and not own.is_meta:
        raise ValueError(f"{what} is on the meta device and holds no numbers; load the file with map_location='cpu'")
    if value.layout != torch.strided or value.is_complex() or value.is_quantized:
        raise ValueError(f"{what} must be a dense tensor of real numbers, got {value.layout} of {value.dtype}")
    if value.dim() and value.dtype != own.dtype and not (value.is_floating_point() and own.is_floating_point()):
        raise ValueError(
            f"{what} is stored as {value.dtype}, here as {own.dtype}: build the optimizer with its storage"
        )


def _check_shards(what: str, value: Any, own: Any) -> None:
    do = (
        "Save with torch.distributed.checkpoint, or the whole: "
        "get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))"
    )
    if not torch.distributed.is_initialized():
        raise RuntimeError(f"{what} is a shard (a DTensor), and no process group is there to reach the others. {do}")
    if is_dtensor(own) and value.device_mesh != own.device_mesh:
        raise ValueError(f"{what} is a shard of {value.device_mesh}, here it lies on {own.device_mesh}. {do}")


def prepared(
    view: ParamView, own: dict[str, Any], saved: Mapping[str, Any], ours: bool, who: str
) -> list[tuple[Tensor, Tensor]]:
    """Pairs (allocated, new value) for the state of one parameter, local parts; what was not saved is zero. All of it,
    whichever of its views is given.

    Nothing is copied yet. Keys of others are replaced by those they saved, as torch does with all state.

    Raises:
        ValueError, RuntimeError: as `_check_fits`.
    """
    _check_fits(view, own, saved, ours, who)
    variants, of_block_lr = keys_of(view, variants=True), block_lr_keys(view)
    known = {*variants, *of_block_lr}
    for key in set(own) - known:
        del own[key]
    for key in set(saved) - set(own) - of_block_lr:
        device = local(view.param).device
        value = saved[key]
        other = value.detach().to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        own[key] = zeros(*variants[key]) if key in variants else other
    pairs = []
    for key in known & set(own):
        tensor = own[key]
        if key in saved:
            new: Any = saved[key]
            if not isinstance(new, Tensor):
                new = torch.tensor(new, dtype=tensor.dtype, device="cpu")
            if is_dtensor(tensor):
                new = _placed_like(new, tensor)
            elif is_dtensor(new):
                new = new.full_tensor()
            pairs.append((local(tensor), local(new)))
        elif key not in of_block_lr:
            of, name = variants[key]
            whole = of.kinds(variants=True).get(name) == "whole"
            pairs.append((local(tensor), zeros(of, name) if whole else torch.zeros_like(local(tensor))))
    return pairs


@contextmanager
def undone_on_error(optimizer: Any) -> Iterator[None]:
    """Restore groups and state of an optimizer if the body raises."""
    groups = [dict(group) for group in optimizer.param_groups]
    held = {param: dict(own) for param, own in optimizer.state.items()}
    try:
        yield
    except BaseException:
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        for param, own in list(optimizer.state.items()):
            own.clear()
            own.update(held.get(param, {}))
            if param not in held:
                del optimizer.state[param]
        optimizer._stepper = None
        raise


def _placed_like(value: Any, target: Any) -> Tensor:
    """A DTensor placed as `target`, from a DTensor with other placements or from the whole tensor."""
    from torch.distributed.tensor import distribute_tensor

    if is_dtensor(value):
        moved: Tensor = value.redistribute(target.device_mesh, target.placements)
        return moved
    mine = value.to(local(target).device)
    return distribute_tensor(mine, target.device_mesh, target.placements, src_data_rank=None)  # every process has all


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more if names else "nothing"


def _group_of_saved(
    group: Mapping[str, Any], names: Sequence[str], saved: Mapping[str, Any], ids: Mapping[str, Any], who: str
) -> dict[str, Any]:
    """Hyperparameters saved for the parameters of one group.

    Raises:
        ValueError: if the parameters of the group were in groups with different hyperparameters, or by another rule.
    """
    home = {i: index for index, g in enumerate(saved["param_groups"]) for i in g["params"]}
    indices = sorted({home[ids[name]] for name in names})
    left_out = TORCH_ONLY | {"params", "param_names"} | set(FIXED) - {"block_lr"}
    found = [{k: v for k, v in saved["param_groups"][i].items() if k not in left_out} for i in indices]
    for other in found[1:]:
        if any(not _same(other.get(k), v) for k, v in found[0].items()):
            raise ValueError(
                f"{who}: parameters that are one group here were saved in groups with different settings: "
                f"{found[0]} and {other}. Build the optimizer with the groups it was saved with"
            )
    for theirs in (saved["param_groups"][i] for i in indices):
        refuse_variants(theirs, f"{who}: the state dict was saved with")
        if (rule := theirs.get("rule", group["rule"])) != group["rule"]:
            raise ValueError(f"{who}: the state dict is of another rule: {of_another_rule(rule, group['rule'])}")
        for key, without in (("cut", group.get("cut")), ("rotation", None)):
            if (saved_with := theirs.get(key, without)) != group.get(key):
                raise ValueError(
                    f"{who}: the state dict was saved with {key} {saved_with!r}, here it is {group.get(key)!r}; build "
                    f"the optimizer as that one was, or {ANEW}"
                )
    new = copy.deepcopy(found[0]) if found else {}
    # Gathering makes lists of tuples.
    return {k: tuple(v) if isinstance(v, list) and isinstance(group.get(k), tuple) else v for k, v in new.items()}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return bool((a == b).all() if isinstance(a, Tensor) else (b == a).all())
    return (tuple(a) == tuple(b)) if isinstance(a, (list, tuple)) else bool(a == b)


def check_decay(saved: Mapping[str, Any], group: Mapping[str, Any], who: str) -> None:
    """Raise ValueError if a saved group has the other kind of weight decay than this optimizer."""
    ours = group["decoupled_weight_decay"]
    # torch's SGD, the only one with a dampening, has coupled decay and no key for it.
    theirs = saved.get("decoupled_weight_decay", ours if "rule" in saved or "dampening" not in saved else False)
    how = {
        (True, False): "decoupled (shrinks the parameter)",
        (True, True): "cautious (shrinks the parameter where the update does too)",
        (False, False): "coupled (added to the gradient)",
    }
    here = how[ours, group.get("cautious_decay", False)]
    there = how[bool(theirs), bool(saved.get("cautious_decay", False))]
    if there != here and saved.get("weight_decay"):
        raise ValueError(
            f"{who}: the state dict was saved with weight_decay={saved['weight_decay']} {there}, here it "
            f"is {here}. Build an optimizer that decays so, or set weight_decay to 0 in the saved groups"
        )
