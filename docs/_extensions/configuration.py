"""The keys of configurations, read from the code that checks them: `.. configuration:: model` or `study` or `arm`.

A key whose docstring says nothing about it, or that no page has, is a warning, and warnings end the build.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from docstrings import arguments
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from sharpwise.compare.keys import ARM_KEYS, STUDY_KEYS
from sharpwise.train.config import Config

logger = logging.getLogger(__name__)
FURTHER = "options"  # a field of [optimizer] that stands for the further keys


class Key(NamedTuple):
    name: str
    text: str
    kind: str = ""
    default: str = ""


class Keys(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        table = self.arguments[0]
        if table not in tables():
            raise self.error(f"no configuration has a table {table!r}: there are {', '.join(tables())}")
        said(self.env).add(table)
        lines: list[str] = []
        for key in tables()[table]:
            if not key.text:
                logger.warning("configuration key %s: its docstring says nothing about it", key.name)
            kind = f"*{key.kind}*. " if key.kind else ""
            default = f" Default: ``{key.default}``." if key.default else ""
            lines += ["", f".. confval:: {key.name}", "", f"   {kind}{key.text[:1].upper()}{key.text[1:]}{default}"]
        return self.parse_text_to_nodes("\n".join([*lines, ""]))


def tables() -> dict[str, list[Key]]:
    """The keys of every table: those of a run, "run" for the ones outside its tables, a study's, and an arm's."""
    found = {"run": [Key("seed", "of the weights, of the order of the data and of dropout.", "int", repr(Config.seed))]}
    for table in dataclasses.fields(Config):
        if table.name != "seed":
            found[table.name] = list(_fields(table.name, getattr(Config, table.name)))
    found["study"] = [Key(name, text) for name, text in STUDY_KEYS.items()]
    found["arm"] = [Key(f"arms.NAME.{name}", text) for name, text in ARM_KEYS.items()]
    return found


def _fields(table: str, config: Any) -> Iterator[Key]:
    texts = arguments(type(config))
    for one in dataclasses.fields(config):
        if one.name != FURTHER:
            kind = str(one.type if isinstance(one.type, str) else getattr(one.type, "__name__", one.type))
            default = {"None": "", "''": '""'}.get(repr(getattr(config, one.name)), repr(getattr(config, one.name)))
            yield Key(f"{table}.{one.name}", texts.get(one.name, ""), kind.replace("typing.", ""), default)


def said(env: Any) -> set[str]:
    if not hasattr(env, "sharpwise_tables"):
        env.sharpwise_tables = set()
    return env.sharpwise_tables  # type: ignore[no-any-return]


def check(app: Sphinx, env: Any) -> None:
    for table in tables().keys() - said(env):
        logger.warning("no page has the configuration keys of %s: a page needs `.. configuration:: %s`", table, table)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("configuration", Keys)
    app.connect("env-check-consistency", check)
    return {"version": "1", "parallel_read_safe": False}
