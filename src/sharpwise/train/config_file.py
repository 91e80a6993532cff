"""Configurations as text: reading TOML and `a.b=c`, writing `config.toml`, and what may change when a run goes on."""

import inspect
import math
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sharpwise.combinations import COMMON
from sharpwise.hints import nearest
from sharpwise.installing import needs
from sharpwise.optim import CONSTRUCTORS, split_arm
from sharpwise.train.code import names_class, parse_optimizer
from sharpwise.train.config import Config, OptimizerConfig, check, spelled_block_lr

Given = Mapping[str, Any]
"""A configuration as TOML gives it: nested dictionaries, with only what was said."""

MAY_CHANGE = ("checkpoint.", "log.tensorboard", "log.wandb", "optimizer.on_nonfinite", "mesh.", "compute.threads")
"""What may differ when a run goes on: it does not change what the run computes, up to the order of sums."""


# --- reading ---------------------------------------------------------------------------------------------------------


def read_given(path: Path, what: str = "configuration") -> dict[str, Any]:
    """What a TOML file says; `what` it should be is for the message. Raises ValueError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a TOML file: {error}") from error


def set_keys(given: Given, assignments: Iterable[str]) -> dict[str, Any]:
    """`given` with `a.b=value` on top; values as in TOML, and what is no TOML is text.

    >>> set_keys({"seed": 1}, ["optimizer.name=lion", "optimizer.betas=[0.9, 0.99]"])
    {'seed': 1, 'optimizer': {'name': 'lion', 'betas': [0.9, 0.99]}}
    """
    result = _copied(given)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = [part.strip() for part in key.split(".")]
        if not equals or not all(parts):
            raise ValueError(f"--set {assignment!r}: expected a.b=value, for instance optimizer.lr=1e-3")
        table = result
        for part in parts[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ValueError(f"--set {assignment!r}: {part!r} is a value, not a table")
        table[parts[-1]] = _value(text.strip())
    return result


def sets(assignments: Iterable[str], key: str) -> bool:
    """Whether one of the assignments, as for `set_keys`, gives a value to the key `a.b`."""
    value: Any = set_keys({}, assignments)
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _copied(given: Given) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in given.items()}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def amount(text: str) -> float:
    """A number that may end in k, M or B: thousands, millions, billions. Raises ValueError for anything else.

    >>> amount("8M"), amount("1_500"), amount("2.5k")
    (8000000.0, 1500.0, 2500.0)
    """
    unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 0)
    number = float((text[:-1] if unit else text).replace("_", "")) * (unit or 1)
    if not math.isfinite(number):
        raise ValueError(f"expected a number, got {text!r}")
    return number


def make_config(given: Given) -> Config:
    """The configuration that is meant, checked as far as it can be without the model and the data.

    Raises:
        ValueError: an unknown key (the nearest is named), a value of the wrong kind or out of its range.
    """
    given = dict(given)
    given["optimizer"] = _gather_options(given.get("optimizer", {}))
    config: Config = _make(Config, given, "")
    check(config)
    return config


def _gather_options(table: Any) -> Any:
    """Constructor arguments stand in the table beside its own keys."""
    if not isinstance(table, Mapping):
        return table  # refused later, with a message
    own = {f.name for f in fields(OptimizerConfig)} - {"options"}
    table = _apart({"name": OptimizerConfig.name, **table})
    name = table["name"]
    if names_class(name):  # what its constructor takes is known when it may be imported
        return {
            **{key: value for key, value in table.items() if key in own},
            "options": {key: _as_toml(value) for key, value in table.items() if key not in own},
        }
    parameters = inspect.signature(CONSTRUCTORS[name]).parameters
    allowed = set(parameters) - {"params", *_OF_A_RUN, *own}
    for key in table.keys() - own:
        if key not in allowed:
            raise ValueError(
                f"optimizer.{key}: {name} has no such setting{nearest(key, {*allowed, *own})}; "
                f"there are {', '.join(sorted({*allowed, *own}))}"
            )
    # Defaults of its own are written down too: those of another version may differ.
    defaults = {key: _as_toml(parameters[key].default) for key in parameters if key not in ("params", *COMMON)}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    options = {**defaults, **{key: _as_toml(value) for key, value in table.items()}}
    return {
        "lr": options["lr"],
        **{key: value for key, value in table.items() if key in own},
        "options": {key: value for key, value in options.items() if key in allowed},
    }


def _apart(table: Given) -> dict[str, Any]:
    """Optimizer and block_lr, which may stand in the name both, each in its one spelling: so that runs compare."""
    block_lr = table.get("block_lr", "")
    if isinstance(block_lr, (str, Mapping)):
        table = {**table, "block_lr": spelled_block_lr(block_lr)}
    try:
        name = parse_optimizer(table["name"])["name"]
        if not names_class(name):
            return split_arm(table)
    except ValueError as error:
        raise ValueError(f"optimizer.name: {error}") from None
    if block_lr:
        raise ValueError(f"optimizer.block_lr: {name} is of another library, and moves all blocks alike; leave it out")
    if "lr" not in table:
        raise ValueError(f"optimizer.lr: say one; {name} is of another library, and has no default here")
    return {**table}


def _as_toml(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _make(kind: Any, given: Any, where: str) -> Any:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a table [{where}], got {given!r}")
    hints = get_type_hints(kind)
    values = {}
    for key, value in given.items():
        full = f"{where}.{key}" if where else key
        if key not in hints:
            kinds = ", ".join(hints)
            study = "; a file with arms is a study, for sharpwise compare" if full == "arms" else ""
            raise ValueError(f"no setting is called {full!r}{nearest(key, hints)}; there are {kinds}{study}")
        values[key] = _make(hints[key], value, full) if is_dataclass(hints[key]) else _fit(value, hints[key], full)
    return kind(**values)


_OF_A_RUN = {"model", "blocks", "total_steps", "probe_batches"}
"""What a run gives to the optimizer by itself."""
_SAID = {
    "str": "text", "dict": "a table", "list": "a list", "bool": "true or false", "int": "a whole number",
    "float": "a number",
}  # fmt: skip


def _fit(value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    for option in options:
        if get_origin(option) is Literal:
            if value in get_args(option):
                return value
            known = get_args(option)
            raise ValueError(f"{where}: got {value!r}{nearest(str(value), known)}, allowed: {', '.join(known)}")
        plain = get_origin(option) or option
        if plain is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if plain is not NoneType and isinstance(value, plain) and not (isinstance(value, bool) and plain is not bool):
            return dict(value) if plain is dict else value
    if int in options and isinstance(value, str) and not value[-1:].isdigit():
        with suppress(ValueError):
            if (number := amount(value)).is_integer():
                return int(number)
    names = [_SAID.get((get_origin(option) or option).__name__) for option in options if option is not NoneType]
    raise ValueError(f"{where}: expected {' or '.join(map(str, names))}, got {value!r}")


# --- writing and comparing -------------------------------------------------------------------------------------------


def as_given(config: Any) -> dict[str, Any]:
    """Nested plain values, as in TOML: `make_config(as_given(c)) == c`. Fields that are None are left out."""
    result: dict[str, Any] = {}
    for f in fields(config):
        own = getattr(config, f.name)
        if is_dataclass(own):
            result[f.name] = as_given(own)
        elif f.name == "options":
            result.update(own)
        elif own is not None:
            result[f.name] = own
    return result


def to_toml(config: Config) -> str:
    """The text of a `config.toml`."""
    with needs("writing a configuration", "compare"):
        import tomli_w
    return tomli_w.dumps(as_given(config))


def differences(stored: Config, wanted: Config) -> list[str]:
    """What `wanted` says that a stored run cannot go on with, a line each; what it leaves open is no difference."""
    before, now = as_flat(stored), as_flat(wanted)
    left_open = {
        f"{table.name}.{f.name}"
        for table in fields(Config)
        if is_dataclass(own := getattr(wanted, table.name))
        for f in fields(own)
        if getattr(own, f.name) is None
    }
    return [
        f"{key}: the run has {_said(before, key)}, now it is {_said(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in left_open and not key.startswith(MAY_CHANGE)
    ]


def as_flat(config: Config) -> dict[str, Any]:
    """The values of a configuration, by their whole names."""
    return flat(as_given(config))


def _said(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "nothing"


def flat(given: Given, prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by their whole names, such as `optimizer.lr`."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, Mapping):
            values.update(flat(value, f"{prefix}{key}."))
        else:
            values[prefix + key] = value
    return values


def taking_over(stored: Config, wanted: Config) -> Config:
    """The stored configuration with what may change taken from `wanted`, where that says something."""
    given = as_given(stored)
    for key, value in as_flat(wanted).items():
        table, _, name = key.partition(".")
        if key.startswith(MAY_CHANGE):
            given[table][name] = value
    return make_config(given)
