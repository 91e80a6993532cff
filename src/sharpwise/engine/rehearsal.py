"""A rule, or a control, is run on a number before the first step: what fails in it fails before anything is written."""

from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from sharpwise.controls.base import OVERS, Control, Sums
from sharpwise.rules.base import MatrixRule, Rule

OWN_SCALARS = {"step", "decay", "clip", "ok", "weight_decay"}
"""Names of scalars that the engine adds to those of a rule."""


def rehearse(rule: Rule, group: Mapping[str, Any]) -> set[str]:
    """Run a rule on a number, so that what fails in it fails before a step has written anything.

    Returns:
        The hyperparameters that its arithmetic reads off the rule, not off its scalars: at another value of one of
        these it is another rule.

    Raises:
        ValueError: for arithmetic that raises, or does not return what the rule says it keeps; for scalars that are
            called as the engine's own.
    """
    if rule.reductions or any(on_a_device(group[k]) for k in rule.defaults):
        return set()  # its elements take a step with what the reductions find; reading a device would wait for it
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    state = {kind: {n: one for n, k in rule.state.items() if k == kind} for kind in ("element", "block")}
    twin, read = _watched(rule)
    try:
        s = twin.scalars(1, {k: live(group[k]) for k in rule.defaults})
        if isinstance(twin, MatrixRule):
            new, m = twin.input(one, state["element"], s)
            found = dict(new) | twin.owner(m[None], {n: one for n, k in rule.state.items() if k == "whole"}, s)[1]
        else:
            found = dict(twin.direction(one, state["element"], s)[0])
        if rule.has_blocks:
            found |= twin.block_phase(state["block"], one, s)[0]
    except Exception as error:
        raise ValueError(f"rule {rule.name!r} fails on a single number: {type(error).__name__}: {error}") from error
    if set(found) != set(rule.state):
        raise ValueError(f"rule {rule.name!r} keeps {sorted(rule.state)}, and its arithmetic returns {sorted(found)}")
    if taken := sorted(OWN_SCALARS & set(s)):
        raise ValueError(f"rule {rule.name!r} calls scalars {taken}: these names are the engine's; take others")
    return read & set(rule.defaults)


def rehearse_control(control: Control, decoupled: bool, who: str) -> None:
    """Run a control on two rows, one of them all zeros, for the same reason.

    Raises:
        ValueError: for one that raises, or whose factors are not two finite numbers per unit; for coupled decay, which
            a control cannot tell from the gradient.
    """
    if control.over not in OVERS:
        raise ValueError(f"{who}: control {control.name!r} is over {control.over!r}; it may be over {', '.join(OVERS)}")
    if not decoupled:
        raise ValueError(f"{who}: a control is for decoupled weight decay: decoupled=True")
    some = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
    try:
        units = dict.fromkeys(("lr", "decay", "multiplier", "weight_decay", "snr_factor"), some + 1)
        numbers = {"over": control.over, "peak": 1.0, "t": 1, "momentum": 0.9, "mean_square": 0.1, "turn": 1.0}
        for held in (some, 0 * some):
            found = control.factors(Sums(some, some, some, some + 1), {**units, **numbers, "held": held})
            fits = [x.shape == some.shape and bool(x.isfinite().all()) for x in found] == [True, True]
            if not fits:
                break
    except Exception as error:
        raise ValueError(f"{who}: control {control.name!r} fails on a row: {type(error).__name__}: {error}") from error
    if not fits:
        raise ValueError(
            f"{who}: control {control.name!r} must return two finite numbers per row or matrix, of zeros too; of two, "
            f"of which one is all zeros, it returns {found}"
        )


def on_a_device(value: Any) -> bool:
    """Whether a hyperparameter is a tensor on another device than the CPU, or holds one."""
    if isinstance(value, (tuple, list)):
        return any(map(on_a_device, value))
    return isinstance(value, Tensor) and value.device.type != "cpu"


def live(value: Any) -> Any:
    """A hyperparameter as it is now: tensors on the CPU as floats, on a device left there."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" else value.detach().double()
    if isinstance(value, (tuple, list)):
        return tuple(map(live, value))
    return float(value) if isinstance(value, Real) and not isinstance(value, Integral) else value  # NumPy's too


def _watched(rule: Rule) -> tuple[Rule, set[str]]:
    """A copy of a rule, and the names of what is read of it from now on."""
    read: set[str] = set()

    class Watched(type(rule)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    twin: Rule = Watched(**{f.name: getattr(rule, f.name) for f in fields(rule) if f.init})  # type: ignore[arg-type]
    read.clear()
    return twin, read
