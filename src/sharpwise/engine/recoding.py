"""State that was saved in one format and is loaded into another: decoded, and encoded anew.

So a run may change its storage in the middle, and state of other libraries in 8 bits is read; of versions before the
first release too, under other names.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.engine.state import keys_of
from sharpwise.engine.stored import ABSMAX, Stored
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import MatrixRule
from sharpwise.shards import is_dtensor, local
from sharpwise.storage import Dense, Format, Int8

logger = logging.getLogger(__name__)

OLD_NAMES = (
    {"lr_before": "multiplier_from", "lr_after": "multiplier_to", "lr_measured": "block_lr_measured"},
    {"lr_step": "block_lr_step", "lr_switch": "multiplier_ramp"},
)
"""Keys of a block_lr in state dicts of versions before the first release: in the state of a parameter, in a group."""
SETTLED = "block_lr_settled"
"""State of a block_lr that versions before the first release lack too."""
_NESTED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes puts what FSDP is not to cut."""


Changed = Counter[tuple[str, str]]
"""How many tensors went from one format to another."""


def recoded(
    view: ParamView, saved: Mapping[str, Any], theirs: Mapping[str, str], changed: Changed, who: str
) -> dict[str, Any]:
    """The saved state of one parameter with its element state in the formats of the parameter's views.

    Whole tensors are decoded and encoded where formats differ, on every process of a mesh.

    Args:
        theirs: names of the storages that it was saved with, as in `Storage.settings`.
        changed: counted here.

    Raises:
        ValueError: for codes that nobody here can read.
    """
    found = _of_others(view, dict(saved), who)
    wanted = keys_of(view, variants=True)
    for name in {name for own in view.siblings or (view,) for name in _regroup(own, found)} - wanted.keys():
        found.pop(name, None)
    for own in view.siblings or (view,):
        for name, format in own.formats.items():
            key, absmax = own.state_key(name), own.state_key(name + ABSMAX)
            if not isinstance(found.get(key), Tensor):
                continue
            before = _format_saved(own, name, found[key], absmax in found, theirs, who)
            dense = not (before.block or format.block)
            if dense and found[key].dtype != format.dtype_for(own.dtype):
                changed[before.name, format.name] += 1  # as it is copied
            same = before == format or dense
            if same and (not format.block or found[absmax].shape[-1] == own.line(name).blocks(format.block)):
                continue
            changed[before.name, format.name] += 1
            x = _decoded(own, name, Stored(before, _whole(found[key]), _whole(found.pop(absmax, None))))
            found[key] = x
            if format.block:
                coded = _lines(own, name, format, x)
                found |= {key: coded.codes.view(x.shape), absmax: coded.absmax}
    return found


def _regroup(view: ParamView, saved: dict[str, Any]) -> list[str]:
    """Element state of a part of a parameter, from what was saved as large as the parameter, or the other way round:
    where a mesh cuts its rows it is kept so; see `ParamView.rows_cut`. Returns the names it may be taken from."""
    if not view.part:
        return []
    first, rows = view.segments[0], torch.cat([segment.row_index("cpu") for segment in view.segments]).sort()[0]
    names = [name for name, kind in view.rule.all_state.items() if kind == "element"]
    names += [name + ABSMAX for name in names if view.by_row]
    for name in names:
        key, apart = view.state_key(name), f"{name}.{view.part}"
        if key == apart and apart not in saved and name in saved:
            whole = _whole(saved[name])
            taken = first.as_rows(whole).index_select(first.first_dim, rows.to(whole.device))
            saved[apart] = taken.reshape(*view.own_shape[:-1], taken.shape[-1])
        elif key == name and apart in saved:
            own = _whole(saved.pop(apart))
            shape = (*view.param.shape[:-1], own.shape[-1] if view.by_row else view.param.shape[-1])
            whole = _whole(saved[name]) if name in saved else own.new_zeros(shape)
            every, at = first.as_rows(whole), rows.to(whole.device)
            taken = every.index_select(first.first_dim, at)
            saved[name] = every.index_copy(first.first_dim, at, own.view(taken.shape)).view(whole.shape)
    return names


def announce(changed: Changed, who: str) -> None:
    """Say what was recoded."""
    for (before, after), n in changed.items():
        logger.warning("%s: the state of %d tensors was saved as %s, and goes on as %s", who, n, before, after)


def _format_saved(
    view: ParamView, name: str, codes: Tensor, blocked: bool, theirs: Mapping[str, str], who: str
) -> Format:
    if not blocked:
        return Dense.of(codes.dtype)
    word = theirs.get("storage" if isinstance(view.rule, MatrixRule) else "aux_storage") or theirs.get("storage")
    format = Int8.named(str(word))
    if format is None:
        raise ValueError(
            f"{who}: the state of {view.name} is in codes of storage {word!r}; those that can be read are int8-linear "
            f"and int8-dynamic, with the number of elements behind it that share a scale, if not 256"
        )
    return format.for_squares() if name == view.rule.second_moment else format


def _shape(view: ParamView, name: str) -> tuple[int, ...]:
    """Of a whole tensor as lines."""
    line = view.line(name)
    lead = view.own_shape if view.state_key(name) != name else tuple(view.param.shape)
    return *lead[: line.lead], line.length


def _lines(view: ParamView, name: str, format: Format, x: Tensor) -> Stored:
    """A whole tensor in a format with blocks."""
    lines = x.view(_shape(view, name)).float()
    absmax = lines.new_zeros(*lines.shape[:-1], view.line(name).blocks(format.block))
    return Stored(format, torch.empty_like(lines, dtype=format.dtype_for(torch.float32)), absmax).encode(lines)


def _decoded(view: ParamView, name: str, stored: Stored) -> Tensor:
    """The numbers of a whole tensor, in its own shape.

    Raises:
        ValueError: for tensors of other shapes than those of the parameter.
    """
    codes, shape = stored.codes, _shape(view, name)
    fits = codes.numel() == torch.Size(shape).numel()
    if stored.absmax is not None:
        blocks = -(-shape[-1] // stored.format.block)
        fits = fits and tuple(stored.absmax.shape) == (*shape[:-1], blocks)
    if not fits:
        return codes  # refused by its shape, with the message that others get
    return stored._replace(codes=codes.reshape(shape)).decode(torch.float32).view(codes.shape)


def _whole(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local(whole)


# -- others -----------------------------------------------------------------------------------------------------------


def _of_others(view: ParamView, saved: dict[str, Any], who: str) -> dict[str, Any]:
    """State of bitsandbytes (flat blocks, a table of values beside the codes) and torchao (a tensor that decodes
    itself) as numbers; anything else as it is."""
    saved |= saved.pop(_NESTED, {})
    for key, value in saved.items():
        if isinstance(value, Tensor) and type(value).__module__.startswith("torchao."):
            saved[key] = value.dequantize()
    if "state1" not in saved:
        return saved
    names = [view.state_key(name) for name, kind in view.rule.state.items() if kind == "element"]
    found = {"step": saved.get("step", 1)}
    for number, name in enumerate(names, start=1):
        if f"state{number}" in saved:
            parts = [saved.get(f"{what}{number}") for what in ("state", "qmap", "absmax")]
            found[name] = _of_flat_blocks(parts, view, who)
    return found


def _of_flat_blocks(parts: Sequence[Any], view: ParamView, who: str) -> Tensor:
    codes, values, absmax = parts
    if values is None:
        return codes  # a small tensor, in fp32
    n = codes.numel()
    size = next((size for size in (256, 2048) if -(-n // size) == absmax.numel()), 0)
    if not size or n != view.param.numel():
        raise ValueError(
            f"{who}: the saved state of {view.name} has {n} codes in {absmax.numel()} blocks, and the parameter "
            f"{view.param.numel()} elements: 8-bit state of bitsandbytes in blocks of 256 or 2048 can be read"
        )
    scales = absmax.float().repeat_interleave(size)[:n]
    return (values.float()[codes.reshape(-1).long()] * scales).view(codes.shape)


def renamed(held: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of a parameter, or a group, with the keys of a block_lr under their present names.

    Present names beside old ones are of the optimizer that loads: `set_optimizer_state_dict` merges both.
    """
    for names in OLD_NAMES:
        if names.keys() <= held.keys():
            held = {k: v for k, v in held.items() if k not in names.values() and k != SETTLED}
            held = {names.get(k, k): v for k, v in held.items()}
    for key, value in list(held.items()):
        own = key.replace("block_lr_measured", SETTLED)
        if own != key and own not in held and isinstance(value, Tensor):
            held = {**held, own: torch.ones_like(value)}  # multipliers followed the first measurement
    return held


def rename(held: Iterable[dict[str, Any]]) -> None:
    """The same in place, of what a pickle holds."""
    for own in held:
        new = renamed(own)
        if new is not own:
            own.clear()
            own.update(new)
