"""The modules of `sharpwise.integrations`, read without importing them, as each needs its host: `.. hosts::`."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from public import escaped
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxDirective

import sharpwise

FOLDER = Path(sharpwise.__file__).parent / "integrations"


class Hosts(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for path in sorted(FOLDER.glob("[!_]*.py")):
            self.env.note_dependency(str(path))
            lines += described(path, self.config)
        return self.parse_text_to_nodes("\n".join(lines))


def described(path: Path, config: Any) -> list[str]:
    """The reStructuredText of one module: what it says of itself, then its classes and functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lines = ["", f".. rubric:: ``sharpwise.integrations.{path.stem}``", "", *_text(tree, config, "module"), ""]
    for one in tree.body:
        if isinstance(one, (ast.ClassDef, ast.FunctionDef)) and not one.name.startswith("_"):
            kind = "class" if isinstance(one, ast.ClassDef) else "function"
            lines += ["", f".. py:{kind}:: sharpwise.integrations.{path.stem}.{one.name}{_signature(one)}", ""]
            lines += ["   " + line for line in _text(one, config, kind)]
    return lines


def _text(one: Any, config: Any, what: str) -> Iterator[str]:
    return escaped(GoogleDocstring(ast.get_docstring(one) or "", config, what=what).lines())


def _signature(one: ast.ClassDef | ast.FunctionDef) -> str:
    if isinstance(one, ast.FunctionDef):
        return f"({ast.unparse(one.args)})"
    return ""


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("hosts", Hosts)
    return {"version": "1", "parallel_read_safe": True}
