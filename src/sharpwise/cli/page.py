"""`sharpwise page RUN`: write the page of a run again."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from sharpwise.cli.errors import user_errors


def page(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, as `sharpwise runs` lists them.")],
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Write the page of one run: losses, learning rates, gradient norm, throughput, memory.

    Training writes it when it ends; while it runs, or after it was killed, this shows how far it came.
    """
    with user_errors():
        from sharpwise.report.run_page import write_run_page

        path = write_run_page(run)
    typer.echo(path)
    if open_page:
        webbrowser.open(path.resolve().as_uri())
