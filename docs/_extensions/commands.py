"""Commands with their options, read from the Typer application: `.. command:: measure sharpness`.

An option without help, or a command that no page has, is a warning, and warnings end the build.
"""

import inspect
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from sharpwise.cli.main import create_app

logger = logging.getLogger(__name__)


class Command(SphinxDirective):
    final_argument_whitespace = True
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = " ".join(self.arguments[0].split())
        if name not in commands():
            raise self.error(f"there is no command {name!r}: there are {', '.join(commands())}")
        said(self.env).add(name)
        return self.parse_text_to_nodes("\n".join(described(name, commands()[name])))


def commands() -> dict[str, Any]:
    """All commands by name, those of a group by `group command`."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for name, own in getattr(command, "commands", {}).items():
            walk(own, (*words, name))
        if words and not getattr(command, "commands", {}):
            found[" ".join(words)] = command

    walk(typer.main.get_command(create_app()), ())
    return found


def described(name: str, command: Any) -> list[str]:
    """The reStructuredText of one command."""
    context = typer.Context(command, info_name=f"sharpwise {name}")
    usage = command.get_usage(context).removeprefix("Usage: ")
    lines = [".. code-block:: text", "", f"   {' '.join(usage.split())}", ""]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines += ["| " + line for line in _plain(paragraph).splitlines()] if "  " in paragraph else [_plain(paragraph)]
        lines += [""]
    lines += [f".. program:: sharpwise {name}", ""]
    for one in command.params:
        if one.name != "help":
            text = one.help or ""
            if not text:
                logger.warning("sharpwise %s: %s has no help", name, one.name)
            spelled, text = one.get_help_record(context) or (one.metavar or one.human_readable_name, text)
            lines += [f".. option:: {' '.join(spelled.split())}", "", f"   {_plain(' '.join(text.split()))}", ""]
    return lines


def _plain(text: str) -> str:
    """Help is plain text, with commands in backticks."""
    parts = text.split("`")
    return "".join(f"``{part}``" if odd % 2 else _escaped(part) for odd, part in enumerate(parts))


def _escaped(text: str) -> str:
    return "".join("\\" + letter if letter in "*|_" else letter for letter in text)


def said(env: Any) -> set[str]:
    if not hasattr(env, "sharpwise_commands"):
        env.sharpwise_commands = set()
    return env.sharpwise_commands  # type: ignore[no-any-return]


def check(app: Sphinx, env: Any) -> None:
    for name in commands().keys() - said(env):
        logger.warning("no page has the command sharpwise %s: a page needs `.. command:: %s`", name, name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command", Command)
    app.connect("env-check-consistency", check)
    return {"version": "1", "parallel_read_safe": False}
