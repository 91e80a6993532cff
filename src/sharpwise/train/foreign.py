"""An optimizer of another library, `module:class`, in the training loop, with what that asks of one of sharpwise's."""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sharpwise.blocks import BlockMap
from sharpwise.engine.binding import check_roles_named
from sharpwise.groups import grouped, param_groups, trained
from sharpwise.hints import kind_of, nearest
from sharpwise.train.code import current_directory_first, find
from sharpwise.train.config import OptimizerConfig

_SAVED = (Tensor, nn.Parameter, bool, int, float, str, type(None), torch.dtype)
"""What torch.load gives back, beside what a library has registered there for its own kinds of tensors."""


class Foreign:
    """Takes steps with another library's optimizer: clips the norm as torch does, and leaves out steps whose gradients
    are not finite. Its state is saved and loaded as the class does it; of what is in it nothing is known.

    Args:
        inner: the optimizer.
        blocks: the map of the model, for what a run notes by role.
        max_grad_norm: clip to this; None does not.
    """

    def __init__(self, inner: Optimizer, blocks: BlockMap, max_grad_norm: float | None = None) -> None:
        self.inner, self.blocks, self.max_grad_norm = inner, blocks, max_grad_norm
        self.grad_norm: Tensor | None = None
        self._has_stepped = False
        # For probes, which would take its `exp_avg` for what it is in sharpwise's optimizers.
        self.state: Mapping[Tensor, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner ones."""
        return self.inner.param_groups

    def step(self) -> None:
        """Clip and take one step, unless a gradient is not finite."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if not math.isfinite(self.grad_norm):
            return
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(params, self.max_grad_norm, self.grad_norm)
        self.inner.step()
        self._has_stepped = True

    def zero_grad(self) -> None:
        """As the inner one."""
        self.inner.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """As the inner one. Raises ValueError for what a checkpoint cannot hold."""
        found = self.inner.state_dict()
        kinds = {*_SAVED, *torch.serialization.get_safe_globals()}
        for where, value in _leaves(found, ""):
            if type(value) not in kinds:
                raise ValueError(
                    f"the state of {type(self.inner).__name__} holds a {type(value).__name__} ({where}); a checkpoint "
                    "holds tensors and plain values, and a run could not go on from it"
                )
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the inner one."""
        self.inner.load_state_dict(state_dict)

    def lr_multipliers(self) -> list[dict[str, Any]]:
        """Per segment: none has any."""
        return [{"name": s.name, "rows": s.describe_rows(), "multiplier": 1.0} for s in self.blocks.segments]

    def state_bytes(self) -> int | None:
        """Bytes of the tensors in its state; None before its first step, which is when most allocate it."""
        if not self._has_stepped and not self.inner.state:
            return None
        # Some share a table among all parameters.
        found = {(t.data_ptr(), t.nbytes) for _, value in _leaves(self.inner.state, "") for t in _plain_tensors(value)}
        return sum(size for _, size in found)


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """What nested dictionaries and lists hold, and where."""
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{where}.{key}" if where and isinstance(key, (str, int)) else f"{key}")
    else:
        yield where, value


def _plain_tensors(value: Any) -> list[Tensor]:
    """The tensors that a state consists of: of a quantized one its codes and scales."""
    if not isinstance(value, Tensor):
        return []
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in _plain_tensors(getattr(value, name))]


# --- from a configuration --------------------------------------------------------------------------------------------


def build_foreign(own: OptimizerConfig, model: nn.Module, blocks: BlockMap) -> Foreign:
    """The optimizer that `module:class` names, with groups of parameters as PyTorch has them.

    What trains is one group; what `no_decay` or `settings_of` says of roles or types are further ones.

    Raises:
        ValueError: what is named is not there, is no optimizer that this loop can drive, or takes other arguments.
    """
    options = own.arguments
    no_decay = check_roles_named(options.pop("no_decay", ()), own.name, "no_decay", ("bias",))
    kind: Any = _class_of(own.name)
    allowed = _check_arguments(kind, own.name, {"lr": own.lr, **options})
    spared = [(role, {"weight_decay": 0.0}) for role in sorted(no_decay)]
    if own.groups:
        param_groups(model, own.groups, blocks=blocks)  # raises for keys that cannot be meant
    groups = grouped(trained(model), blocks, [*own.groups.items(), *spared], own.name)
    if no_decay and "weight_decay" not in allowed:
        raise ValueError(f"optimizer.no_decay: {own.name} takes no weight_decay; leave it out")
    for group in groups:
        group["params"] = [tensor for _, tensor in group["params"]]  # not every library takes names
    try:
        with current_directory_first():
            inner = kind(groups, lr=own.lr, **options)
    except Exception as error:
        raise ValueError(f"{own.name}: its constructor raised {type(error).__name__}: {error}") from error
    if any("lr" not in group for group in inner.param_groups):
        raise ValueError(f"{own.name}: its groups have no lr, which the schedule sets; it cannot be driven here")
    own.check_groups(sorted({*inner.defaults} - {"lr"}))
    found = Foreign(inner, blocks, own.max_grad_norm or None)
    found.state_dict()  # what its groups hold can be saved
    return found


def _class_of(spec: str) -> type[Optimizer]:
    found = find(spec, "install the package that has it")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"{spec} is {kind_of(found)}, expected a class derived from torch.optim.Optimizer")
    closure = list(inspect.signature(found.step).parameters.values())[1:2]
    if closure and closure[0].default is inspect.Parameter.empty and closure[0].kind in _BY_NAME:
        raise ValueError(f"{spec}: its step needs {closure[0].name}, and this loop calls step() alone; take another")
    if callable(getattr(found, "train", None)) and callable(getattr(found, "eval", None)):
        raise ValueError(
            f"{spec} has train() and eval(), which this loop does not call; take another, or your own loop"
        )
    return found


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _check_arguments(kind: type[Optimizer], spec: str, given: Mapping[str, Any]) -> set[str]:
    """The arguments that a constructor takes. Raises ValueError where others are given, or one that it needs is not."""
    parameters = list(inspect.signature(kind).parameters.values())[1:]  # but the parameters to train
    allowed = {p.name for p in parameters if p.kind in _BY_NAME}
    if missing := [p.name for p in parameters if p.name in allowed - {*given} and p.default is p.empty]:
        raise ValueError(f"{spec} needs {', '.join(missing)}; say optimizer.{missing[0]}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return allowed | {"weight_decay", *given}
    for key in given:
        if key not in allowed:
            there = ", ".join(sorted(allowed)) or "none"
            raise ValueError(f"optimizer.{key}: {spec} takes no such argument{nearest(key, allowed)}; it takes {there}")
    return allowed


def foreign_code(own: OptimizerConfig) -> str:
    """The optimizer as a user would write it."""
    options = {key: value for key, value in own.arguments.items() if key != "no_decay"}
    said = ", ".join(f"{key}={value!r}" for key, value in {"lr": own.lr, **options}.items())
    notes = [f"no decay of {', '.join(own.options['no_decay'])}"] if own.options.get("no_decay") else []
    notes += [f"gradients clipped to {own.max_grad_norm:g}"] if own.max_grad_norm else []
    more = f"  # {'; '.join(notes)}" if notes else ""
    first = f"sharpwise.param_groups(model, {own.groups!r})" if own.groups else "model.parameters()"
    return f"{own.name.replace(':', '.')}({first}, {said}){more}"
