"""How commands fail: one message to stderr, exit code 2, no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from sharpwise.files import printable
from sharpwise.installing import lacks


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can get wrong (values, files, missing extras) into a message and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        said = lacks("this command", error) if isinstance(error, ModuleNotFoundError) else str(error)
        # Text, not markup: globs have brackets. soft_wrap: a terminal wraps, a log keeps one line.
        message = Text.assemble(("error", "bold red"), ": ", printable(said))
        Console(stderr=True).print(message, soft_wrap=True)
        raise typer.Exit(2) from None
