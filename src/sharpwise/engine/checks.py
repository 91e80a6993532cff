"""What is checked at every step: groups, gradients, and whether parameters and state are as they were bound."""

import difflib
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sharpwise.engine import state as states
from sharpwise.engine.mesh import ReduceGroup
from sharpwise.engine.options import Storage
from sharpwise.engine.view import ParamView
from sharpwise.rules import Rule
from sharpwise.shards import is_dtensor, local, place_gradient

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is none of what torch promises
    TensorGuards = None  # type: ignore[assignment, misc]

_PLAIN = {Tensor, nn.Parameter}
_ROUNDING = 1e-12
"""By how much a schedule that ends at 0 may miss it: torch's LinearLR does, by 1e-16 of the learning rate."""


def check_settings(group: Mapping[str, Any], defaults: Mapping[str, Any], rule: Rule, who: str) -> None:
    """Raise TypeError or ValueError for a group with settings that no step can use; a schedule may write anything."""
    states.refuse_variants(group, f"{who}: a group asks for")
    states.check_group(group, defaults, who)
    for key in ("lr", "weight_decay"):
        value = group[key]
        if type(value) is float and 0.0 <= value < math.inf:
            continue  # asked at every step
        if not isinstance(value, (Real, Tensor)):
            raise TypeError(f"{who}: {key} must be a number or a 0-d tensor, got {value!r}")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{who}: {key} must be a number or a 0-d tensor, got {tuple(value.shape)}")
        if isinstance(value, Tensor) and value.device.type != "cpu":
            continue  # reading it would wait for the device
        if not (-_ROUNDING if key == "lr" else 0.0) <= float(value) < math.inf:
            raise ValueError(f"{who}: {key} must be a finite number >= 0, got {float(value)}")
    rule.validate(group)
    _check_places(group, rule, who)


def check_spelled(group: Mapping[str, Any], defaults: Mapping[str, Any], who: str) -> None:
    """Raise ValueError for a setting that is almost one of ours: what others keep in groups is left alone."""
    for key in map(str, set(group) - set(defaults)):
        near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.85)
        if near:
            raise ValueError(f"{who}: a group has {key!r}, which nothing reads; did you mean {near[0]!r}?")


def _check_places(group: Mapping[str, Any], rule: Rule, who: str) -> None:
    """Raise ValueError for a hyperparameter on a device where none of its parameters is."""
    for key in ("lr", "weight_decay", *rule.defaults):
        value = group.get(key)
        if type(value) is float:
            continue
        values = [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor)]
        for tensor in values:
            if tensor.device.type == "cpu":
                continue
            params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
            if not params or any(local(p).device == tensor.device for p in params):
                continue
            places = sorted({str(local(p).device) for p in params})
            raise ValueError(
                f"{who}: {key} is a tensor on {tensor.device}, and its parameters are on {', '.join(places)}; give a "
                f"number, a tensor on the CPU, or one on their device"
            )


def check_storage(storage: Storage, who: str) -> None:
    """Raise ValueError for a format whose zeros are no zeros: so state begins."""
    for format in filter(None, (storage.format, storage.aux)):
        codes = torch.zeros(1, dtype=format.dtype_for(torch.float32), device="cpu")
        if format.decode(codes, 1.0 if format.block else None).any():
            raise ValueError(f"{who}: storage {format.name!r} does not decode zeros to zeros, with which state begins")


def check_device(named: Sequence[tuple[str, Tensor]], who: str) -> None:
    """Raise ValueError for a parameter on the meta device, which holds no numbers that a step could move."""
    for name, param in named:
        if local(param).device.type == "meta":
            raise ValueError(
                f"{who}: {name} is on the meta device and holds no numbers to move; materialize the model "
                f"(model.to_empty(device=...), then its weights) before the optimizer is built"
            )


def were_exchanged(named: Sequence[tuple[str, Tensor]], state: Mapping[Tensor, Mapping[str, Any]], who: str) -> bool:
    """Whether parameters are no longer those that have state, which is allowed before the first step.

    Raises:
        RuntimeError: if a step was taken.
    """
    if not set(map(id, state)) - {id(p) for _, p in named}:
        return False
    if any(own.get("step", 0) != 0 for own in state.values()):
        name = next((n for n, p in named if p not in state), "one")
        raise RuntimeError(
            f"{who}: parameter {name!r} was exchanged after the first step; shard or move the model before it (and "
            f"before a checkpoint is loaded), or build the optimizer after that"
        )
    return True


def check_coupled(by_param: Iterable[Sequence[ParamView]], no_decay: Collection[str], who: str) -> None:
    """Raise ValueError for a parameter of which a part decays, where decay is added to the gradient."""
    for views in by_param:
        if len({decays for view in views for decays in view.decays}) > 1:
            raise ValueError(
                f"{who}: no_decay={sorted(no_decay)} takes a part of {views[0].name}; coupled decay is for whole "
                f"parameters only: name all of its roles or none, or decoupled_weight_decay=True"
            )


class Gradients:
    """Gradients of some parameters, checked against what they must be.

    Asked at every step, of every tensor: lists are compared, not tensors one by one.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], who: str) -> None:
        self._named, self._who = named, who
        self._kinds = [(p.shape, p.device, p.dtype, torch.strided) for _, p in named]
        self._placed = any(is_dtensor(p) for _, p in named)
        self._as_before: Callable[..., bool] = _never

    def local(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The local gradients, None where there is none.

        Raises:
            TypeError: for sparse or complex ones.
            ValueError: for one of another shape or on another device than its parameter.
        """
        found = list(grads)
        if self._as_before(*grads):
            return found
        for i, (g, kind) in enumerate(zip(grads, self._kinds, strict=True)):
            if g is None:
                continue
            if self._placed or type(g) is not Tensor or (g.shape, g.device, g.dtype, g.layout) != kind:
                check_gradient(*self._named[i], self._who)
                found[i] = local(self._named[i][1].grad)  # type: ignore[arg-type]
        given = [g for g in grads if g is not None]
        if len(given) == len(found) and not self._placed:
            self._as_before = _guard_of(given)
        return found


def check_gradient(name: str, param: Tensor, who: str) -> None:
    """Raise for a gradient no rule can use. One placed in another way, as a partial sum, is placed as the parameter."""
    grad = param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise TypeError(f"{who}: {name}: sparse gradients are not supported; build the embedding with sparse=False")
    if grad.is_complex():
        raise TypeError(f"{who}: {name}: complex gradients are not supported, got {grad.dtype}")
    if not grad.is_floating_point():
        raise TypeError(f"{who}: {name}: the gradient must be floating point, got {grad.dtype}")
    own, whole = grad, param
    if is_dtensor(param) or is_dtensor(grad):
        place_gradient(param)
        own, whole = local(param.grad), local(param)  # type: ignore[arg-type]
    if own.shape != whole.shape or own.device != whole.device:
        raise ValueError(
            f"{who}: {name}: the gradient has shape {tuple(own.shape)} on {own.device}, the parameter "
            f"{tuple(whole.shape)} on {whole.device}; call zero_grad() after a parameter is moved or exchanged"
        )


def is_empty_step(
    groups: Sequence[Mapping[str, Any]], grads: Sequence[Tensor | None], reduce_group: ReduceGroup, fresh: bool
) -> bool:
    """Whether every lr and gradient is 0: what checkpointing does before the first step to have state allocated.

    fresh: whether devices may be read.
    """
    for group in groups:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu" and not fresh:
            return False  # reading it would wait for the device
        if float(lr) != 0.0:
            return False
    here = [g for g in grads if g is not None]
    some = any(bool(g.any()) for g in here)
    flag = torch.tensor(float(some), dtype=torch.float32, device=here[0].device)
    return not reduce_group.reduce(flag, "max")  # another process may have some


class Marks:
    """What must be as it was when the stepper was built: kinds and places of parameters, objects and places of state.

    Asked at every step, of every tensor: lists are compared, not tensors one by one.
    """

    def __init__(self, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self._params, self._kinds, self._as_before = list(params), _kinds_of(params), _guard_of(params)
        self._held = [state[p] for p in params]
        self._keys, self._states = list(state), list(state.values())
        self._values = [value for own in self._held for value in own.values()]
        self._askers = [local(t).data_ptr for t in self._values if isinstance(t, Tensor) and has_address(t)]
        # Of a parameter its data may be exchanged, and of a DTensor the local tensor: back ends keep what they move.
        self._askers += [_asker(p) for p in params if has_address(p)]
        self._places = list(map(operator.call, self._askers))

    def hold(self, params: Sequence[Tensor], state: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """False once a parameter was exchanged, recast or given other data, or somebody moved the state."""
        if not _same(params, self._params):
            return False
        if not self._as_before(*params) and _kinds_of(params) != self._kinds:
            return False
        if not _same(list(state), self._keys) or not _same(list(state.values()), self._states):
            return False
        values = [value for own in self._held for value in own.values()]
        return _same(values, self._values) and list(map(operator.call, self._askers)) == self._places


def _asker(param: Tensor) -> Callable[[], int]:
    held: Any = param
    return (lambda: held._local_tensor.data_ptr()) if is_dtensor(param) else param.data_ptr


def has_address(tensor: Tensor) -> bool:
    """Whether a tensor lies in memory: those on the meta device do not, nor fake ones."""
    return local(tensor).untyped_storage().device.type != "meta"


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _kinds_of(params: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(p.dtype, p.device, p.is_contiguous(), p.shape) for p in params]


def _guard_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that says in one call whether tensors have the types, devices, shapes and strides of these.

    It may say no for other reasons too, such as autocast. torch's guards end the process where tensors are sparse,
    nested or of a subclass: of these the function always says no.
    """
    plain = all(type(t) in _PLAIN and t.layout is torch.strided and not t.is_nested for t in tensors)
    if TensorGuards is None or not tensors or not plain:
        return _never
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=[], dynamic_dims_strides=[]).check
    return check


def _never(*tensors: Tensor | None) -> bool:
    return False
