"""Help says all that stands in the source, on a terminal of 80 columns."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sharpwise.cli.main import create_app


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, other in getattr(command, "commands", {}).items():
        yield from commands(other, (*path, name))


COMMANDS = dict(commands(get_command(create_app())))


def dense(text: str | None) -> str:
    """Without what wrapping changes."""
    return "".join((text or "").split())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_nothing_of_a_help_is_lost(path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(create_app(), [*path, "--help"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    said, command = dense(result.stdout), COMMANDS[path]
    assert dense(command.help) in said
    for parameter in command.params:
        assert dense(parameter.help) in said
    for other in getattr(command, "commands", {}).values():
        assert dense(inspect.cleandoc(other.help).partition("\n\n")[0]) in said


def test_examples_in_a_help_stay_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = CliRunner().invoke(create_app(), ["compare", "--help"]).stdout
    assert "'optimizer.weight_decay=[0,0.3]'" in said
    assert "[default: the first arm]" in said
    said = CliRunner().invoke(create_app(), ["train", "--help"]).stdout
    assert "those of [mesh]." in said
    said = CliRunner().invoke(create_app(), ["blocks", "--help"]).stdout
    assert """'*.q.weight={"role":"q","heads":4}'""" in said
