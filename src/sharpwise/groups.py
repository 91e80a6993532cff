"""Parameter groups, PyTorch's own way to give some parameters other settings, by what the blocks of a model are."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sharpwise.blocks import BlockMap, Segment, canonical_name
from sharpwise.blocks.map import Blocks, blocks_for
from sharpwise.blocks.naming import by_role, check_named, matches
from sharpwise.engine.binding import unexplained
from sharpwise.hints import kind_of

WHO = "param_groups"
BIAS = "bias"
Settings = Mapping[str, Mapping[str, Any]]
"""By block type, role, glob or "bias" the settings of a group."""


def param_groups(model: nn.Module, settings: Settings, *, blocks: Blocks = None) -> list[dict[str, Any]]:
    """Parameter groups with settings by block type, for our optimizers and for those of `torch.optim`.

    Args:
        model: whose trainable parameters they hold, each in one group.
        settings: by block type ("FFN"), role ("q"), glob on names of parameters ("*.mlp.*") or "bias", the settings of
            these parameters under the names that the optimizer has for them in its groups. Of several that match a
            parameter, and say the same setting, the last one holds. A learning rate per block is `block_lr=`: a
            scheduler that sets the `lr` of all groups alike would undo one that stands here.
        blocks: a block map, or roles by name or glob, where they are not found.

    Returns:
        Groups with (name, tensor) pairs under `params`; what no key matches is the first one, without settings. Our
        optimizers also need `model=`. A class of another library that takes no names: `[p for _, p in params]`.

    Raises:
        TypeError: for anything but a model and a table of tables.
        ValueError: for a key that matches no block; a parameter of which a part alone has a setting, such as the keys
            in a joint matrix of queries, keys and values; parameters whose roles nothing explains.

    Example:
        >>> import sharpwise, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> groups = sharpwise.param_groups(model, {"*.weight": {"betas": (0.9, 0.98)}, "bias": {"weight_decay": 0.0}})
        >>> [[name for name, _ in group["params"]] for group in groups]
        [['0.weight', '1.weight'], ['0.bias', '1.bias']]
        >>> optimizer = sharpwise.AdamW(groups, model=model, lr=1e-3)
    """
    check_settings(settings, WHO)
    known = blocks_for(model, blocks, WHO, include_frozen=True)
    named = trained(model)
    check_named(WHO, [key for key in settings if key != BIAS], known.segments)
    if BIAS in settings and not any(segment.bias for segment in known.segments):
        raise ValueError(f"{WHO}: 'bias' matches nothing, this model has no biases; leave it out")
    own = known.subset([name for name, _ in named])
    if by_role(settings) and own.unexplained:
        key = next(key for key in settings if by_role([key]))
        raise unexplained(WHO, f"{key!r} distinguishes", own, known, model, isinstance(blocks, BlockMap))
    return grouped(named, known, settings.items(), WHO)


def trained(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The trainable parameters of a model with their names, without those of wrappers."""
    return [(canonical_name(name), p) for name, p in model.named_parameters() if p.requires_grad]


def check_settings(settings: Any, who: str) -> None:
    """Raise TypeError for anything but a table of tables, ValueError for a setting that a group cannot have."""
    like = "{'Emb': {'weight_decay': 0.0}}"
    if not isinstance(settings, Mapping) or not settings:
        got = "nothing" if settings == {} else kind_of(settings)
        raise TypeError(f"{who}: expected settings by block type, such as {like}, got {got}")
    for key, own in settings.items():
        if not isinstance(key, str) or not isinstance(own, Mapping):
            raise TypeError(f"{who}: expected settings by block type, such as {like}, got {{{key!r}: {own!r}}}")
        if wrong := [name for name in own if not isinstance(name, str) or name in ("params", "param_names")]:
            raise ValueError(f"{who}: {key!r} has {wrong[0]!r}, which is no setting of a group")


def grouped(
    named: Sequence[tuple[str, Tensor]],
    blocks: BlockMap,
    settings: Iterable[tuple[str, Mapping[str, Any]]],
    who: str,
) -> list[dict[str, Any]]:
    """Groups of (name, tensor) pairs by settings, those without any first.

    Args:
        named: the parameters.
        blocks: a map that has them.
        settings: by key, a later one over an earlier one.

    Raises:
        ValueError: for a parameter of which a part alone has a setting.
    """
    settings = list(settings)
    found: dict[str, dict[str, Any]] = {repr({}): {"params": []}}
    for name, tensor in named:
        parts = [settings_of(segment, settings) for segment in blocks[name]]
        if any(part != parts[0] for part in parts):
            raise ValueError(_partly(who, blocks[name], parts, [key for key, _ in settings]))
        own = dict(sorted(parts[0].items()))
        found.setdefault(repr(own), {"params": [], **own})["params"].append((name, tensor))
    return [group for group in found.values() if group["params"]]


def settings_of(segment: Segment, settings: Collection[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The settings of a segment; of several that match, a later one over an earlier one."""
    found: dict[str, Any] = {}
    for key, own in settings:
        if matches(segment, key) or (key == BIAS and segment.bias):
            found |= own
    return found


def _partly(who: str, segments: Sequence[Segment], parts: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """The message about a parameter of which a part alone has a setting."""
    name, roles = segments[0].name, list(dict.fromkeys(str(s.role) for s in segments))
    some = [key for key in keys if len({matches(s, key) or (key == BIAS and s.bias) for s in segments}) > 1]
    types = " and ".join(dict.fromkeys(str(s.block_type) for s in segments))
    alike = f"give {types} the same settings" if len({s.block_type for s in segments}) > 1 else "name all its roles"
    return (
        f"{who}: {', '.join(map(repr, some))} takes a part of {name}, which holds {', '.join(roles[:-1])} and "
        f"{roles[-1]}, and a parameter is in one group; {alike}, or name the parameter by a glob, as last key: "
        f"{name!r}"
    )
