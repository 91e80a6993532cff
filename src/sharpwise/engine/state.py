"""State of an optimizer: allocated together, under torch's names."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharpwise.block_lr import BlockLR
from sharpwise.blocks import Segment
from sharpwise.controls import Control
from sharpwise.engine.counter import values_of
from sharpwise.engine.options import Storage
from sharpwise.engine.stored import ABSMAX
from sharpwise.engine.view import ParamView
from sharpwise.rules.base import MatrixRule, Rule, ThinRule
from sharpwise.shards import like, local
from sharpwise.storage import BF16, FP32, Dense, Format

OF_BLOCK_LR = {"lr_multiplier", "multiplier_from", "multiplier_to", "block_lr_measured", "block_lr_settled"}
"""State of a block_lr: a state dict may have it or not."""
SHORTEST_LINE = 64
"""Of formats with blocks: what is in shorter ones stays in fp32."""
TIED = {"tok_emb", "head"}
"""The roles of a tensor that is both."""
STORAGES = ("storage", "aux_storage")
"""Keys of groups that name formats with blocks."""
FIXED = {
    "rule": None,
    "decoupled_weight_decay": True,
    "cautious_decay": False,
    "block_lr": None,
    "control": None,
    "cut": None,
    "rotation": None,
    **dict.fromkeys(STORAGES),
}
"""Keys of groups that hold for the whole optimizer, fixed when it is built; with what holds where there is no key."""
TORCH_ONLY = {"amsgrad", "foreach", "maximize", "capturable", "differentiable", "fused"}
"""Keys of torch's groups that are no hyperparameters here."""


def formats_of(view: ParamView, storage: Storage) -> dict[str, Format]:
    """The formats of the element state of a view.

    Blocks are for matrices with lines of `SHORTEST_LINE` or more, whose roles are not kept in fp32; whole lines are of
    one view. All of that is of the whole parameter: the mesh does not change it.
    """
    names = [name for name, kind in view.rule.all_state.items() if kind == "element"]
    format = storage.format if storage.aux is None or isinstance(view.rule, MatrixRule) else storage.aux
    roles = {str(s.role) for s in view.segments}
    roles |= TIED if roles & TIED and any(s.tied for s in view.segments) else set()
    found: dict[str, Format] = {}
    for name in names:
        fits = view.param.ndim > 1 and view.dtype == torch.float32 and view.line(name).length >= SHORTEST_LINE
        alone = len(view.siblings) < 2 or view.state_key(name) != name
        fits &= not roles & set(storage.keep_fp32) and (alone or view.by_row)
        own = format.for_squares() if name == view.rule.second_moment else format
        found[name] = FP32 if own.block and not fits else own
    if isinstance(view.rule, ThinRule) and storage.format != FP32:  # factors are many numbers at a time: no blocks
        found |= {name: BF16 for name, kind in view.rule.all_state.items() if kind == "whole"}
    return found


def set_units(view: ParamView, control: Control, who: str) -> None:
    """Set what a control bounds of a view, whether it holds norms of that, and whether it reads their gradient SNR.

    Raises:
        ValueError: for fp16, for rows along a dimension in the middle, and for a rule without the momentum that the
            SNR is read from.
    """
    view.unit = control.unit(view.segments)
    if view.unit == "row" and view.rowless:
        raise ValueError(
            f"{who}: control {control} bounds every row of {view.name}, whose output dimension lies in the middle of "
            f"shape {tuple(view.param.shape)}; say blocks={{{view.name!r}: {{'role': '{view.segments[0].role}', "
            f"'dim': 0}}}} to bound what lies along its first dimension, or take another control"
        )
    view.holds = control.holds and view.unit == control.over
    if view.unit and view.param.dtype == torch.float16:
        raise ValueError(
            f"{who}: {view.name} is in fp16, whose rounding is coarser than what control {control} sets; keep the "
            f"weights in fp32 or bf16 (autocast may compute in fp16)"
        )
    view.has_snr = control.snr_samples > 0 and view.unit == "row"
    check_momentum(control, view.rule, view.segments, who)


def check_momentum(control: Control, rule: Rule, segments: Sequence[Segment], who: str) -> None:
    """Raise ValueError where a control reads the gradient SNR of a segment for which the rule keeps no momentum."""
    for segment in segments if control.snr_samples else ():
        own = rule.assign(segment)[0]
        if control.unit((segment,)) == "row" and own.momentum_state is None:
            raise ValueError(
                f"{who}: control {control} reads the gradient SNR from the momentum, and {segment.name} has none by "
                f"element under {own.name!r}; take a rule with a momentum (lion, adamw, adam-mini, muon, adapm with "
                f"momentum='full', sgd with momentum > 0), or leave out snr"
            )


def complete(
    view: ParamView, own: dict[str, Any], block_lr: BlockLR | None, factors: Sequence[Sequence[float]]
) -> None:
    """Allocate missing state of a view, in that of its parameter: `step`, the rule's tensors, and those of a block_lr.

    `factors` are its multipliers, by factor and segment. Present state is kept, also that of others. A rule that needs
    a tensor only now (momentum raised from 0) counts its steps from there, unless another view of the parameter has
    state: the count is that of all.
    """
    inner = local(view.param)
    # All on one device: `set_optimizer_state_dict` refuses a full state dict whose local state is on several.
    device = torch.device("cpu") if inner.device.type == "meta" else inner.device
    missing = [name for name in view.kinds() if view.state_key(name) not in own]
    keys = keys_of(view)
    for key in {view.state_key(name) for name in view.kinds(variants=True)} - set(keys):
        if "step" in own and own["step"] == 0:
            own.pop(key, None)  # allocated under other hyperparameters, and never used
    others = {key for key, (other, name) in keys.items() if other is not view and name != "step"}
    if "step" not in own or (missing and not others & set(own)):
        own["step"] = torch.zeros((), dtype=torch.float32, device=device)
    own |= {view.state_key(name): zeros(view, name) for name in missing}
    if block_lr is not None and view.state_key("lr_multiplier") not in own:
        own |= {view.state_key(name): t for name, t in of_block_lr(view, block_lr, factors, device).items()}


def zeros(view: ParamView, name: str) -> Tensor:
    """One of the tensors of its state before the first step."""
    inner, kind = local(view.param), view.kinds(variants=True)[name]
    if kind == "block":
        return torch.zeros(view.n_blocks, dtype=view.dtype, device=inner.device)
    if kind == "unit":
        return torch.zeros(sum(map(view.units_of, view.segments)), dtype=view.dtype, device=inner.device)
    if kind == "matrix":
        return torch.zeros(view.n_matrices, 3, dtype=torch.float64, device=inner.device)
    if kind == "whole":
        start = view.rule.initial(name, view.segments, inner.device)
        dtype = view.formats.get(name, FP32).dtype_for(view.dtype)
        return torch.empty(start.shape, dtype=dtype, device=inner.device).copy_(start)
    alone, of = view.state_key(name) != name, name.removesuffix(ABSMAX)
    format, line = view.formats[of], view.line(of)
    held = tuple(view.shape if alone else inner.shape)
    if kind == "absmax":
        plain = torch.zeros(*held[: line.lead], line.blocks(format.block), dtype=torch.float32, device=inner.device)
        return like(view.param, plain, line.lead)
    plain = torch.zeros(held, dtype=format.dtype_for(view.dtype), device=inner.device)
    return like(view.param, plain, line.lead if alone else None)


def keys_of(view: ParamView, variants: bool = False) -> dict[str, tuple[ParamView, str]]:
    """Keys of the state of a parameter, with the view and the name that each is of; all views of it are asked.

    Args:
        variants: also of state that the rule keeps under other hyperparameters.
    """
    views = view.siblings or (view,)
    return {own.state_key(name): (own, name) for own in views for name in ("step", *own.kinds(variants))}


def is_of_block_lr(key: str) -> bool:
    """Whether state of a parameter is that of a block_lr, by its key; parts of a parameter have their own."""
    return key.partition(".")[0] in OF_BLOCK_LR


def block_lr_keys(view: ParamView) -> set[str]:
    """Keys of the state of a block_lr of a parameter."""
    return {own.state_key(name) for own in view.siblings or (view,) for name in OF_BLOCK_LR}


def check_held(view: ParamView, own: Mapping[str, Any], who: str) -> None:
    """Raise ValueError unless the state that a step uses has the shape and the device of its parameter."""
    shape, device = tuple(view.param.shape), local(view.param).device
    for name, kind in view.kinds().items():
        key = view.state_key(name)
        tensor = own[key]
        if kind != "element" or isinstance(view.formats[name], Dense):
            _check_type(tensor, name, view, who)
        if kind == "element":
            fit = shape if key == name else view.own_shape
        elif kind == "absmax":
            of = name.removesuffix(ABSMAX)
            line = view.line(of)
            fit = *(shape if key == name else view.own_shape)[: line.lead], line.blocks(view.formats[of].block)
        elif kind == "unit":
            fit = (sum(map(view.units_of, view.segments)),)
        elif kind == "matrix":
            fit = (view.n_matrices, 3)
        else:
            fit = (view.n_blocks,) if kind == "block" else tuple(view.rule.shape_of(name, view.segments))
        if tuple(tensor.shape) != fit:
            raise ValueError(f"{who}: state {key!r} of {view.name} must have shape {fit}, got {tuple(tensor.shape)}")
        if local(tensor).device != device:
            raise ValueError(
                f"{who}: state {key!r} of {view.name} is on {local(tensor).device}, the parameter on {device}: state "
                f"or model was moved after the first step. Move it back; to go on elsewhere, take "
                f"optimizer.state_dict() before the model is moved, build an optimizer after that, and load it there"
            )


def check_step(view: ParamView, own: Mapping[str, Any], who: str) -> None:
    """Raise ValueError unless the count of steps, where there is one, is a number of floating point."""
    if "step" not in own:
        return
    _check_type(own["step"], "step", view, who)
    if own["step"].dim():
        raise ValueError(f"{who}: state 'step' of {view.name} must be 0-d, got shape {tuple(own['step'].shape)}")


def _check_type(tensor: Any, name: str, view: ParamView, who: str) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        what = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{who}: state {name!r} of {view.name} must be a floating point tensor, got {what}")


def left_behind(views: Sequence[ParamView], state: Mapping[Any, Mapping[str, Any]]) -> bool:
    """Whether the model was moved before the first step: state lies where it was, and there is nothing in it yet."""
    moved = False
    for view in views:
        held = (state.get(view.param, {}).get(view.state_key(name)) for name in view.kinds())
        moved = moved or any(isinstance(t, Tensor) and local(t).device != view.device for t in held)
    steps = [own["step"] for own in state.values() if "step" in own]
    counts = all(isinstance(step, Tensor) and not step.dim() for step in steps)
    return moved and counts and not any(values_of([local(step) for step in steps]))


def of_block_lr(
    view: ParamView, block_lr: BlockLR, factors: Sequence[Sequence[float]], device: torch.device
) -> dict[str, Tensor]:
    """State of a block_lr for one parameter before the first measurement; see `engine.multipliers`."""
    state = {"lr_multiplier": torch.tensor(view.multipliers, dtype=torch.float64, device=device)}
    if block_lr.sources:
        state["multiplier_to"] = torch.tensor(factors, dtype=torch.float64, device=device).T.contiguous()
        state["multiplier_from"] = state["multiplier_to"].clone()
        shape = len(view.segments), len(block_lr.sources)
        state["block_lr_measured"] = torch.zeros(shape, dtype=torch.float64, device=device)
        state["block_lr_settled"] = state["block_lr_measured"].clone()
    return state


def check_group(group: Mapping[str, Any], defaults: Mapping[str, Any], who: str) -> None:
    """Raise unless a group has all settings, and those that hold for the whole optimizer as they were given."""
    missing = sorted(set(defaults) - set(group) - TORCH_ONLY)
    if missing:
        raise ValueError(f"{who}: a parameter group has lost {', '.join(missing)}; set them again")
    for key, without in FIXED.items():
        ours = defaults.get(key, without)
        if group.get(key, without) != ours:
            raise ValueError(
                f"{who}: {key} is fixed when the optimizer is built, here as {ours!r}; a group has "
                f"{group[key]!r}. Build another optimizer, and load the state of this one if it fits"
            )
    if "seed" in defaults and type(group["seed"]) is not int:
        raise TypeError(f"{who}: seed must be a whole number, got {group['seed']!r}")


def refuse_variants(settings: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError for a variant of torch's that no rule here has."""
    for key in ("amsgrad", "maximize"):
        if settings.get(key):
            raise ValueError(f"{prefix} {key}=True, which this optimizer does not do")
