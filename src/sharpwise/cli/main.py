"""The `sharpwise` command."""

import importlib
import importlib.util
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from sharpwise.installing import lacks

if TYPE_CHECKING:
    import typer


@cache
def create_app() -> "typer.Typer":
    """The Typer application with all commands. Raises ImportError without the extra `cli`."""
    import typer

    from sharpwise.cli.blocks import blocks

    app = typer.Typer(
        name="sharpwise",
        help="Every block of a transformer gets the step size and the state it needs.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,  # rich's help takes [mesh] and [default: 3] for markup, and cuts long words
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    # With a callback `blocks` stays a subcommand even where it is the only one.
    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            from sharpwise._version import __version__

            typer.echo(f"sharpwise {__version__}")
            raise typer.Exit

    app.command()(blocks)
    for name in ("memory", "prepare", "train", "runs", "page", "compare", "demo"):
        if importlib.util.find_spec(f"sharpwise.cli.{name}") is not None:
            app.command()(getattr(importlib.import_module(f"sharpwise.cli.{name}"), name))
    measure = importlib.import_module("sharpwise.cli.measure").measure
    app.add_typer(measure, short_help=measure.info.help)
    for command in (*app.registered_commands, *measure.registered_commands):
        command.short_help = (command.callback.__doc__ or "").partition("\n\n")[0]  # otherwise cut in the overview
    return app


def main() -> None:
    """Run the command line; the entry point of the package."""
    try:
        app = create_app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.stderr.write(f"error: {lacks('the command line', error, 'cli')}\n")
        sys.exit(2)
    app()


def __getattr__(name: str) -> Any:
    # `app` only when asked for, so that importing this module works, and `main` can say what is missing.
    if name == "app":
        return create_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
