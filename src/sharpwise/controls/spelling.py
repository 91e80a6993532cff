"""One spelling of a control, as of a per-block learning rate: a name, or name(argument=value, ...)."""

import ast
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sharpwise.controls.angular import Angular
from sharpwise.controls.base import Control
from sharpwise.controls.hyperball import Hyperball
from sharpwise.controls.l2 import L2
from sharpwise.hints import kind_of, nearest, word

CONTROLS: dict[str, type[Control]] = {"angular": Angular, "hyperball": Hyperball, "l2": L2}
"""Every control by name."""


def make_control(spec: Any) -> Control | None:
    """The control that is meant.

    Args:
        spec: a spelling ("angular(angle=sqrt)"), a table with `name` and arguments, an instance, or None.

    Raises:
        ValueError: for what cannot be read, an unknown name or argument. TypeError: for anything else than the above.

    >>> print(make_control("angular(angle=lr)"))
    angular(angle=lr)
    """
    if spec is None or isinstance(spec, Control):
        return spec
    if isinstance(spec, str):
        spec = _read(spec.strip())
    if not isinstance(spec, Mapping):
        raise TypeError(f"control must be a name, a table, a Control or None, got {kind_of(spec)}")
    given = dict(spec)
    name = given.pop("name", None)
    if name not in CONTROLS:
        raise ValueError(f"no control is called {name!r}{nearest(str(name), CONTROLS)}; there are {_NAMES}")
    allowed = [f.name for f in fields(CONTROLS[name])]  # type: ignore[arg-type]
    for key in given:
        if key not in allowed:
            there = f"there are {', '.join(allowed)}" if allowed else "it has none"
            others = [n for n, kind in CONTROLS.items() if any(f.name == key for f in fields(kind))]  # type: ignore[arg-type]
            there += f"; {' and '.join(others)} has it" if others else ""
            raise ValueError(f"{name} has no argument {key!r}{nearest(str(key), allowed)}; {there}")
    try:
        return CONTROLS[name](**given)
    except TypeError as error:
        raise ValueError(str(error)) from None


_NAMES = ", ".join(CONTROLS)


def _read(text: str) -> dict[str, Any]:
    """A spelling as a table."""
    wrong = f"{text!r} is no control{nearest(text.partition('(')[0].strip(), CONTROLS)}; there are {_NAMES}. "
    wrong += "Arguments are given by name, as in angular(angle=sqrt)"
    try:
        node = ast.parse(text, mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name) or call.args or any(k.arg in (None, "name") for k in call.keywords):
            raise SyntaxError
        own = {
            str(k.arg): word(k.value.id) if isinstance(k.value, ast.Name) else ast.literal_eval(k.value)
            for k in call.keywords
        }
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(wrong) from None
    return {"name": call.func.id, **own}
