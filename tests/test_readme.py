"""What README and docs say to type, and where the README points: Python runs, commands parse, links lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from sharpwise.cli.main import create_app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]


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
    assert snippets
    names: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)  # our own file


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.relative_to(ROOT).as_posix())
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


def test_the_readme_is_read_in_a_minute() -> None:
    assert len(README.read_text().split()) <= 600


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the pages below docs/ are checked by `make docs`."""
    links = re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    assert len(links) >= 10
    for link in links:
        path, _, anchor = link.partition("#")
        if not path.startswith("https:"):
            target = ROOT / path
            assert target.is_file(), link
            assert not anchor or anchor in _anchors(target), link


def _anchors(document: Path) -> set[str]:
    """Of the headings of a page, as GitHub and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_picture_is_that_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pictures

    assert pictures.OVERVIEW.read_text(encoding="utf-8") == pictures.overview(), "run python docs/pictures.py"
    assert pictures.OVERVIEW.relative_to(ROOT).as_posix() in README.read_text()
