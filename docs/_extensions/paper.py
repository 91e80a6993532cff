"""The head of a module as a part of a page: `{paper} sharpwise.rules.adam_mini`.

Modules that follow a paper open with its equations, symbols and, under "Departs:", what is done otherwise here and why.
That stands in one place, beside the code, and is Markdown.
"""

import importlib
import inspect
import re
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Paper(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        found = nodes.container()
        path = inspect.getsourcefile(importlib.import_module(name)) or ""
        self.env.note_dependency(path)
        self.state.nested_parse(StringList(markdown(name), path), 0, found)
        return [*found.children]


def markdown(name: str) -> list[str]:
    """The docstring of a module, its departures marked."""
    text = inspect.getdoc(importlib.import_module(name))
    if not text:
        raise ValueError(f"{name} has no docstring")
    for rows in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
        if len({row.count("|") for row in rows.splitlines()}) > 1:
            raise ValueError(f"{name}: a row of a table in its docstring has other cells than the head:\n{rows}")
    return re.sub(r"^(Departs|References):", r"**\1:**", text, flags=re.MULTILINE).splitlines()


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("paper", Paper)
    return {"version": "1", "parallel_read_safe": True}
