"""What README and docs say to type: the README's Python runs, and command lines are understood."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sharpwise.cli.main import create_app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def _lines(document: Path) -> list[str]:
    """The command lines of its console blocks."""
    lines = []
    for block in _blocks(document, "console"):
        text = block.replace("\\\n", " ")
        lines += re.findall(r"^\$ (.*)$", text, flags=re.MULTILINE) or text.splitlines()
    return lines


def test_every_python_snippet_of_the_readme_runs() -> None:
    snippets = _blocks(README, "python")
    assert len(snippets) >= 5
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)  # our own file


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_every_command_line_is_understood(document: Path) -> None:
    """Commands, options and types are those that there are; `make` has the target."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in _lines(document):
        words = shlex.split(line.partition(" | ")[0], comments=True)
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), line
        if "sharpwise" in words and words[0] != "pip":
            command: Any = typer.main.get_command(create_app())
            words = words[words.index("sharpwise") + 1 :]
            while hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context(command.name, words)  # parses, and does not run it


def test_commands_print_what_the_readme_shows() -> None:
    text = "\n".join(block for block in _blocks(README, "console") if block.startswith("$ "))
    assert text
    shown = re.findall(r"^\$ sharpwise (.*)\n((?:[^$].*\n)*)", text, flags=re.MULTILINE)
    for line, output in shown:
        command, _, tail = line.partition(" | ")
        assert tail in ("", "tail -n 1")
        outcome = CliRunner().invoke(create_app(), shlex.split(command))
        assert outcome.exit_code == 0, outcome.output
        printed = outcome.stdout.splitlines()[-1:] if tail else outcome.stdout.splitlines()
        assert [row.rstrip() for row in printed] == output.splitlines()
