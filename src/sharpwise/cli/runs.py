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
from sharpwise.report.text import broken, short

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
    _print(Console(highlight=False), found)
    for line in found:
        if line.problem:
            Console(stderr=True).print(Text(line.problem, style="yellow"), soft_wrap=True)


def _print(console: Console, lines: Sequence[RunLine]) -> None:
    """A row for each run, as wide as the terminal; what all runs have in common stands above, once."""
    named = {"run": [line.name for line in lines]}
    for title, values in (("model", [line.model for line in lines]), ("optimizer", [line.optimizer for line in lines])):
        if len(lines) > 1 and len(set(values)) == 1 and values[0]:
            console.print(Text(f"{title} of all runs: {values[0]}"), soft_wrap=True)
        else:
            named[title] = values
    numbers: dict[str, list[str]] = {
        "lr": ["-" if line.lr is None else f"{line.lr:.3g}" for line in lines],
        "step": [_steps(line) for line in lines],
        "loss": [_loss(line.loss) for line in lines],
        "valid.": [_loss(line.validation_loss) for line in lines],
        "tok/s": [short(line.tokens_per_second) for line in lines],
        "state": [line.state for line in lines],
    }
    taken = sum(_longest(title, values) + 1 for title, values in numbers.items())
    widths = _widths([_longest(title, values) for title, values in named.items()], console.width - taken - len(named))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    for title, width in zip(named, widths, strict=True):
        table.add_column(title, overflow="fold", min_width=width)
    for title in numbers:
        table.add_column(title, justify="left" if title == "state" else "right", no_wrap=True)
    for i, line in enumerate(lines):
        cells = ["\n".join(broken(values[i], width)) for values, width in zip(named.values(), widths, strict=True)]
        cells += [values[i] for values in numbers.values()]
        table.add_row(*map(Text, cells[:-1]), Text(cells[-1], style=STYLES.get(line.state, "yellow")))
    console.print(table)


def _longest(title: str, values: Sequence[str]) -> int:
    return max(map(len, (title, *values)))


def _widths(wanted: Sequence[int], room: int) -> list[int]:
    """Widths within the room: the widest give way, as far as 8.

    >>> _widths([30, 5], 25), _widths([30, 20], 12)
    ([20, 5], [8, 8])
    """
    found = list(wanted)
    while sum(found) > room and max(found) > 8:
        found[found.index(max(found))] -= 1
    return found


def _steps(line: RunLine) -> str:
    if line.steps is None or line.step >= line.steps:
        return short(line.step)
    return f"{short(line.step)}/{short(line.steps)}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 1000 else f"{value:.1e}"
