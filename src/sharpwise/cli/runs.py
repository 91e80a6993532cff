"""`sharpwise runs`: the runs there are, and how far each is."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharpwise.cli.errors import user_errors
from sharpwise.report.listing import RunLine, list_runs
from sharpwise.report.text import short

DEFAULT = Path("runs")
STYLES = {"finished": "green", "running": "cyan", "diverged": "red", "failed": "red"}


def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look, some levels deep.")] = DEFAULT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the runs in FOLDER: model, optimizer, learning rate, how far each is, its losses and its state.

    Losses are in nats per token, the training loss that of the last step alone. A run that is "killed" ended without
    saying why; one that is "running" is being trained right now.
    """
    with user_errors():
        # The folder that training makes by itself may not be there yet.
        found = [] if folder == DEFAULT and not folder.exists() else list_runs(folder)
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in found], indent=1))
        return
    if not found:
        message = f"No runs in {folder}. Train one with `sharpwise train`, or name another folder."
        Console(stderr=True).print(Text(message), soft_wrap=True)
        return
    Console(highlight=False).print(_table(found))
    for line in found:
        if line.problem:
            Console(stderr=True).print(Text(line.problem, style="yellow"), soft_wrap=True)


def _table(lines: Sequence[RunLine]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    for column in ("run", "model", "optimizer"):
        table.add_column(column, overflow="fold", min_width=8)
    for column in ("lr", "step", "loss", "valid.", "tok/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for line in lines:
        cells = (
            line.name,
            line.model,
            line.optimizer,
            "-" if line.lr is None else f"{line.lr:.3g}",
            _steps(line),
            _loss(line.loss),
            _loss(line.validation_loss),
            short(line.tokens_per_second),
        )
        table.add_row(*map(Text, cells), Text(line.state, style=STYLES.get(line.state, "yellow")))
    return table


def _steps(line: RunLine) -> str:
    if line.steps is None or line.step >= line.steps:
        return short(line.step)
    return f"{short(line.step)}/{short(line.steps)}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.1e}"
