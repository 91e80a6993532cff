"""Messages for state of another rule: how the two differ, and what to do."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sharpwise.engine.state import is_of_block_lr

_KEEPS = {
    "adam-mini": "one moment per element and one per block",
    "adamw": "element-wise Adam state, two moments per element",
    "lion": "one momentum per element",
    "sgd": "a running sum of gradients per element",
}
_CONVERT = {
    ("adamw", "adam-mini"): "exp_avg as it is, of exp_avg_sq the mean over each block",
    ("adam-mini", "adamw"): "exp_avg as it is, in exp_avg_sq for every element the value of its block",
}
ANEW = "start anew, without load_state_dict"


def of_another_rule(saved: str, own: str) -> str:
    """Message: what the two rules keep, and what to do."""
    theirs, ours = (f"{rule!r} keeps {_KEEPS.get(rule, 'something else')}" for rule in (saved, own))
    convert = f", or convert: {_CONVERT[saved, own]}" if (saved, own) in _CONVERT else ""
    return f"{theirs}, {ours}; {ANEW}{convert}"


def of_other_keys(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The same for the state of one parameter, whose rule is recognized by its keys."""
    theirs, ours = _rule_of(saved), _rule_of(own)
    if theirs is None or ours is None or theirs == ours:
        return f"it was saved by another rule, or is not whole; {ANEW}"
    return f"it was saved by another rule: {of_another_rule(theirs, ours)}"


def of_other_shape(key: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Message: why the saved state `key` of a parameter may have another shape."""
    theirs, ours = _rule_of(saved), _rule_of(own)
    if key == "exp_avg_sq" and _shape(saved["exp_avg"]) == _shape(own["exp_avg"]):
        if theirs != ours:
            return of_another_rule(str(theirs), str(ours))
        return f"its blocks were cut differently; give cut=, v_by= and blocks= as they were, or {ANEW}"
    return (
        f"it is of another model, or of this one before it was resized (resize_token_embeddings); {ANEW}, or load it "
        f"before the model is resized"
    )


def _rule_of(state: Mapping[str, Any]) -> str | None:
    """The rule that keeps such state; None if no rule here does."""
    kept = {key for key in state if key != "step" and not is_of_block_lr(key)}
    if kept == {"exp_avg", "exp_avg_sq"}:
        return "adamw" if _shape(state["exp_avg"]) == _shape(state["exp_avg_sq"]) else "adam-mini"
    return {(): "sgd", ("momentum_buffer",): "sgd", ("exp_avg",): "lion"}.get(tuple(sorted(kept)))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
