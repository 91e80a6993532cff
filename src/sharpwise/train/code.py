"""Code that a configuration names, `module:name`: what it is, finding it, and asking before it runs.

The function that builds a model, and the class of an optimizer of another library.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from sharpwise.optim import parse_arm
from sharpwise.train.config import Config
from sharpwise.train.presets import PRESETS


def names_function(spec: str | Path) -> bool:
    """Whether `load_model` would import a module and call a function of it. Nothing is imported."""
    text = os.fspath(spec)
    return text not in PRESETS and not Path(text).exists() and _parts(text) is not None


def names_class(name: str) -> bool:
    """Whether an optimizer is `module:class`, one of another library. Nothing is imported."""
    return _parts(name) is not None


def parse_optimizer(text: str) -> dict[str, str]:
    """What the name of an optimizer says: as `parse_arm` reads it, or the `name` of a class, `module:class`.

    Raises:
        ValueError: it is neither.

    >>> parse_optimizer("torch.optim:RAdam")
    {'name': 'torch.optim:RAdam'}
    """
    if not isinstance(text, str) or ":" not in text.partition("+")[0]:
        return parse_arm(text)
    if not names_class(text):
        more = "; a block_lr is for the optimizers of sharpwise" if "+" in text else ""
        raise ValueError(f"got {text!r}, expected module:class, such as torch.optim:RAdam{more}")
    return {"name": text}


# --- asking ----------------------------------------------------------------------------------------------------------


def runs_code(configs: Iterable[Config]) -> bool:
    """Whether something that a user has to know about would be imported for one of these."""
    return any(_calls(config, ()) for config in configs)


def confirm_code(configs: Iterable[Config], source: str | Path, trust_code: bool, typed: Collection[str] = ()) -> None:
    """Stop where a file says to run code and nobody has confirmed that. Nothing is imported.

    Args:
        configs: what the file says, of a study a configuration for each arm.
        source: the file, for the message.
        trust_code: whether it was confirmed.
        typed: of "model.name" and "optimizer.name" those that are not the file's but were typed.

    Raises:
        ValueError: it was not; the message says what would run.
    """
    calls = {call: what for config in configs for call, what in _calls(config, typed).items()}
    if trust_code or not calls:
        return
    raise ValueError(
        f"{source} has {', and '.join(dict.fromkeys(calls.values()))}: it would {', and '.join(calls)}, which may do "
        "anything that you may. Look at that code; if you trust it, say so with --trust-code (in Python "
        "trust_code=True)"
    )


def _calls(config: Config, typed: Collection[str]) -> dict[str, str]:
    """What would be called, and what that is for."""
    model, own = config.model, config.optimizer
    found = {}
    if "model.name" not in typed and not model.init_from and names_function(model.name):
        found[_call(model.name, model.settings)] = "its model built by a function"
    if "optimizer.name" not in typed and names_class(own.name):
        arguments = {key: value for key, value in own.options.items() if key != "no_decay"}
        found[_call(own.name, {"lr": own.lr, **arguments})] = "a class for its optimizer"
    return found


def _call(spec: str, settings: Mapping[str, Any]) -> str:
    module, name = _parts(spec) or ("", "")
    arguments = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    return f"import {module} ({_file_of(module)}) and call {name}({arguments})"


def _file_of(module: str) -> str:
    """Where a module would be imported from. Nothing is imported, not even the packages around it."""
    name, found = "", None
    places: Sequence[str] | None = None
    with current_directory_first():
        for part in module.split("."):
            if name and places is None:  # in what is no package
                return "not found"
            name = f"{name}.{part}" if name else part
            try:
                found = PathFinder.find_spec(name, places) if places else importlib.util.find_spec(name)
            except (ImportError, ValueError):  # of a module that runs and came from no file
                return "of no file"
            except KeyError:  # of a folder without __init__.py in another, Python wants that one imported
                inside = [Path(place, part) for place in places or ()]
                found, places = None, [*dict.fromkeys(str(folder) for folder in inside if folder.is_dir())]
                if not places:
                    return "not found"
                continue
            if found is None:
                return "not found"
            places = found.submodule_search_locations
    return str(found.origin if found and found.origin else ", ".join(places or ["of no file"]))


# --- finding ---------------------------------------------------------------------------------------------------------


def find(spec: str, otherwise: str) -> Any:
    """What `module:name` names, None where the text has not this form. Modules are also looked for where we are.

    Args:
        spec: the text.
        otherwise: what else to do where there is no such module.

    Raises:
        ValueError: it cannot be imported, or has no such name.
    """
    if (parts := _parts(spec)) is None:
        return None
    module, name = parts
    try:
        with current_directory_first():
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise ValueError(f"{spec}: importing {module} failed: {error}") from error
        raise ValueError(f"{spec}: no module {module!r} here or among the installed ones; {otherwise}") from None
    except Exception as error:
        raise ValueError(f"{spec}: importing {module} failed: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{spec}: module {module!r} has no {name!r}")
        found = getattr(found, part)
    return found


def _parts(spec: str) -> tuple[str, str] | None:
    """Module and name of `module:name`, None where the text has not this form."""
    module, colon, name = spec.partition(":")
    parts = (*module.split("."), *name.split("."))
    return (module, name) if colon and all(part.isidentifier() for part in parts) else None


@contextmanager
def current_directory_first() -> Iterator[None]:
    """While code of the user is imported or called."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
