"""State of another rule or another optimizer: how the two differ, and what to do."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sharpwise.engine.state import is_of_block_lr
from sharpwise.rules import Rule

_KEEPS = {
    "adam-mini": "one moment per element and one per block",
    "adapm": "the momentum of few matrices and a second moment",
    "adamw": "element-wise Adam state, two moments per element",
    "blockwise-adam": "one moment per element and one per block",
    "lion": "one momentum per element",
    "muon": "one momentum per element of a matrix and AdamW's two of all else",
    "sgd": "a running sum of gradients per element",
}
_CONVERT = {
    ("adamw", "adam-mini"): "exp_avg as it is, of exp_avg_sq the mean over each block",
    ("adam-mini", "adamw"): "exp_avg as it is, in exp_avg_sq for every element the value of its block",
}
ANEW = "start anew, without load_state_dict (in a Trainer, without resume_from_checkpoint)"


def of_another_rule(saved: str, own: str) -> str:
    """Message: what the two rules keep, and what to do."""
    theirs, ours = (f"{rule!r} keeps {_KEEPS.get(rule, 'state of its own')}" for rule in (saved, own))
    convert = f", or convert: {_CONVERT[saved, own]}" if (saved, own) in _CONVERT else ""
    return f"{theirs}, {ours}; {ANEW}{convert}"


def check_settings(state_dict: Mapping[str, Any], new: Iterable[Mapping[str, Any]], rule: Rule, who: str) -> None:
    """Raise TypeError or ValueError where groups that another optimizer saved have settings that no step can use.

    Only torch's optimizers, and those of others, name no rule in their groups; without state, their settings are all
    that tells one from another.
    """
    if any("rule" in group for group in state_dict["param_groups"]):
        return
    lacks = sorted({key for group in state_dict["param_groups"] for key in set(rule.defaults) - set(group)})
    if lacks and not any(filled(own) for own in state_dict["state"].values()):
        raise ValueError(
            f"{who}: the state dict has no state, and its groups lack {', '.join(lacks)}: it is of another optimizer; "
            f"{ANEW}"
        )
    for group in new:
        try:
            rule.validate(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{who}: the state dict may be of another optimizer: {error}; {ANEW}") from None


def filled(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a parameter without what has not begun."""
    return {key: value for key, value in saved.items() if value is not None}


def of_other_keys(saved: Mapping[str, Any], own: str) -> str:
    """The same for the state of one parameter, whose rule is recognized by its keys; `own` is the one here."""
    theirs = _rule_of(saved)
    if theirs is None or own not in _KEEPS or theirs == own:
        return f"it was saved by another rule, or is not whole; {ANEW}"
    return f"it was saved by another rule: {of_another_rule(theirs, own)}"


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
