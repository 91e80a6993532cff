"""The reference of public names: a directive that documents what a module exports, and a check that nothing lacks.

    .. public:: sharpwise.probes
       :only: trace density

documents the names in `__all__` of the module, or some of them, or with `:rest:` those that no page before it has:
classes and functions by their docstrings, data by the text below it. What another page documents already under another
path is named and linked there. When all is read,
a public name that no page has is a warning, as is `sharpwise.name` of a page that is none; warnings end the build.
"""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Iterable, Iterator
from enum import Enum
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

import sharpwise

logger = logging.getLogger(__name__)
OTHERS = ("sharpwise.testing", "sharpwise.tune")  # public modules that are no packages
EXEMPT = ("__version__",)
INHERITED = "step zero_grad explain lr_multipliers state_dict load_state_dict add_param_group init_state"


class Public(SphinxDirective):
    required_arguments = 1
    option_spec: typing.ClassVar = {"only": str.split, "rest": directives.flag}

    def run(self) -> list[nodes.Node]:
        module = importlib.import_module(self.arguments[0])
        names = self.options.get("only") or [name for name in exported(module) if name not in EXEMPT]
        known = seen(self.env)
        if "rest" in self.options:
            names = [name for name in names if key(module, name) not in known]
        text: list[str] = []
        for name in names:
            if name not in exported(module):
                raise self.error(f"{module.__name__} exports no {name!r}")
            thing = getattr(module, name)
            first = known.setdefault(key(module, name), (f"{module.__name__}.{name}", self.env.docname))
            if first[0] == f"{module.__name__}.{name}":
                text += described(module, name, thing)
            else:
                text += ["", f"``{module.__name__}.{name}`` is :py:obj:`{first[0]}`.", ""]
        return self.parse_text_to_nodes("\n".join(text))


def exported(module: ModuleType) -> list[str]:
    """`__all__`, or where there is none what the module defines itself, without a leading underscore."""
    listed = getattr(module, "__all__", None)
    own = [n for n, o in vars(module).items() if getattr(o, "__module__", None) == module.__name__ and callable(o)]
    return list(listed) if listed is not None else [name for name in own if not name.startswith("_")]


def is_code(thing: Any) -> bool:
    """Whether it is a class or a function, the kept results of one included."""
    return inspect.isclass(thing) or inspect.isfunction(inspect.unwrap(thing) if callable(thing) else thing)


def key(module: ModuleType, name: str) -> str:
    """The same for every path to one thing."""
    thing = getattr(module, name)
    if is_code(thing):
        return f"{thing.__module__}.{thing.__qualname__}"
    return f"{home(module, name)}.{name}"


@cache
def assigned(path: str) -> dict[str, str]:
    """Data of a module with the text that stands below each."""
    found, body = {}, ast.parse(Path(path).read_text(encoding="utf-8")).body
    for at, line in enumerate(body):
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                below = body[at + 1] if at + 1 < len(body) else None
                text = (
                    below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
                )
                found[target.id] = text if isinstance(text, str) else ""
    return found


def home(module: ModuleType, name: str) -> str:
    """The module that assigns a piece of data."""
    thing = getattr(module, name)
    for other, loaded in sorted(sys.modules.items()):
        if (
            other.startswith("sharpwise")
            and vars(loaded).get(name) is thing
            and name in assigned(loaded.__file__ or "")
        ):
            return other
    return module.__name__


def described(module: ModuleType, name: str, thing: Any) -> list[str]:
    """The reStructuredText of one name."""
    path = f"{module.__name__}.{name}"
    if inspect.isclass(thing):
        if issubclass(thing, sharpwise.BlockOptimizer) and thing is not sharpwise.BlockOptimizer:
            return ["", f".. autoclass:: {path}", ""]
        members = [f"   :members: {INHERITED.replace(' ', ', ')}"] if thing is sharpwise.BlockOptimizer else []
        members = members or ["   :members:", *(["   :undoc-members:"] if issubclass(thing, Enum) else [])]
        members = [] if hasattr(thing, "_fields") else members  # of named tuples the section Attributes has all
        return ["", f".. autoclass:: {path}", *members, ""]
    if is_code(thing):
        return ["", f".. autofunction:: {path}", ""]
    where = importlib.import_module(home(module, name))
    text = assigned(where.__file__ or "").get(name, "")
    values = [str(value) for value in typing.get_args(thing) if isinstance(value, str)]
    if not values and isinstance(thing, dict) and all(isinstance(value, Enum) for value in thing.values()):
        values = [f"{one}: {value}" for one, value in thing.items()]
    elif not values and isinstance(thing, (dict, tuple)):
        values = [str(value) for value in thing if isinstance(value, (str, Enum))]
    if not text and not values:
        logger.warning("%s has no text below it, and no values to list", path)
    listed = [f"   One of {', '.join(f'``{value}``' for value in values)}."] if values else []
    return ["", f".. py:data:: {path}", "", *(f"   {line}" for line in text.splitlines()), "", *listed, ""]


def public_modules() -> list[str]:
    """Packages that export something, and the modules that are public by themselves."""
    packages = [one.name for one in pkgutil.walk_packages(sharpwise.__path__, "sharpwise.") if one.ispkg]
    packages = [name for name in packages if hasattr(importlib.import_module(name), "__all__")]
    return ["sharpwise", *packages, *OTHERS]


def undocumented(known: set[str]) -> Iterator[str]:
    """Public names, by path, of which `known` has no key."""
    for name in public_modules():
        module = importlib.import_module(name)
        for one in exported(module):
            if one not in EXEMPT and key(module, one) not in known:
                yield f"{name}.{one}"


def untold(thing: Any) -> list[str]:
    """Options of a class or function, parameters with a default, that the Args of its docstring lack."""
    if not is_code(thing) or (inspect.isclass(thing) and issubclass(thing, Enum)):
        return []
    if inspect.isclass(thing) and "__init__" not in vars(thing):
        return []  # those of its base
    docstring = inspect.getdoc(thing) or ""
    sections = re.findall(r"^(?:Args|Attributes):\n((?:    .*(?:\n|$)|\n)*)", docstring, re.MULTILINE)
    entries = [entry for text in sections for entry in re.findall(r"(?<![\w`])([*\w][\w, *]*):", text)]
    told = {word.strip(" *") for entry in entries for word in entry.split(",")}
    parameters = signature(thing).parameters.values()
    return [p.name for p in parameters if p.default is not p.empty and p.name not in told and p.name[0] != "_"]


def signature(thing: Any) -> inspect.Signature:
    """Of a class that of its `__init__`: torch's and our own optimizers have a `__new__` that takes anything."""
    if not inspect.isclass(thing) or "__init__" not in vars(thing):
        return inspect.signature(thing)
    found = inspect.signature(thing.__init__)
    return found.replace(parameters=[*found.parameters.values()][1:], return_annotation=found.empty)


def own_signature(app: Sphinx, what: str, name: str, thing: Any, *_: Any) -> tuple[str, str] | None:
    if what != "class" or "__new__" not in {key for one in thing.__mro__[:-1] for key in vars(one)}:
        return None
    return stringify_signature(signature(thing), unqualified_typehints=True), ""


def seen(env: Any) -> dict[str, tuple[str, str]]:
    if not hasattr(env, "sharpwise_public"):
        env.sharpwise_public = {}
    return env.sharpwise_public  # type: ignore[no-any-return]


def found(path: str) -> bool:
    """Whether there is something at a dotted path; of a host that is not installed, whether there is such a file."""
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        *package, _ = file = path.split(".")[:3]
        return package == ["sharpwise", "integrations"] and importlib.util.find_spec(".".join(file)) is not None
    return True


def check(app: Sphinx, env: Any) -> None:
    known = seen(env)
    for page in sorted(env.found_docs):
        for path in re.findall(r"`(sharpwise(?:\.\w+)+)", Path(env.doc2path(page)).read_text(encoding="utf-8")):
            if not found(path):
                logger.warning("there is no %s", path, location=page)
    for path in undocumented(set(known)):
        logger.warning("%s is public, and no page documents it: a page needs `.. public::`", path)
    for path, docname in known.values():
        module, _, name = path.rpartition(".")
        if missing := untold(getattr(importlib.import_module(module), name)):
            logger.warning("%s: its docstring lacks %s", path, ", ".join(missing), location=docname)


def keep(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in the text of a property for its type: keep the text from it."""
    if what in ("attribute", "data", "property"):
        _kept[name] = [*lines]


def plain_marks(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [*escaped(_kept.pop(name, lines))]


_kept: dict[str, list[str]] = {}


def escaped(lines: Iterable[str]) -> Iterator[str]:
    """Docstrings are plain text with names in backticks: outside of code `*`, `|` and a trailing `_` mark nothing."""
    code: int | None = None  # the indentation of the line that ended in `::`
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if code is not None and line.strip() and indent <= code:
            code = None
        if code is None and not line.lstrip().startswith((">>>", "...")):
            code = indent if line.rstrip().endswith("::") else None
            parts = re.split(r"(``.*?``|`[^`]*`)", line)
            marks = r"[*|]|_(?=\W|$)"
            line = "".join(part if odd % 2 else re.sub(marks, r"\\\g<0>", part) for odd, part in enumerate(parts))
        yield line


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("public", Public)
    app.connect("env-check-consistency", check)
    app.connect("autodoc-process-signature", own_signature)
    app.connect("autodoc-process-docstring", keep, priority=100)
    app.connect("autodoc-process-docstring", plain_marks, priority=900)
    return {"version": "1", "parallel_read_safe": False, "env_version": 1}
