"""`sharpwise memory MODEL`: what each optimizer's state will weigh, before a GPU is rented."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharpwise.blocks import BLOCK_TYPE
from sharpwise.cli.errors import user_errors
from sharpwise.hints import nearest
from sharpwise.memory import PRECISIONS, SHARDS, MemoryPlan, parse_size, size_text
from sharpwise.memory import plan as planned_for
from sharpwise.memory.text import estimates, refusals, title, what_fits
from sharpwise.train.models import load_model


def memory(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A preset (gpt2, llama-2-7b, ...), a folder or .json file with a Hugging Face config, a model_type of "
            "transformers (its default sizes), or module:function.",
        ),
    ],
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="GPUs that train it together.")] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard", metavar="HOW", help=f"How they share it: {', '.join(SHARDS)}.", show_default="fsdp, if several"
        ),
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option(
            "--fits",
            metavar="SIZE",
            help="Say what fits into a GPU with this much memory, as 80GB (80e9 bytes) or 80GiB, and the largest "
            "micro-batch of each.",
        ),
    ] = None,
    micro_batch: Annotated[int, typer.Option("--micro-batch", metavar="N", help="Sequences of one pass.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="TOKENS", help="Tokens of a sequence.", show_default="the model's most, up to 4096"
        ),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="KIND", help=f"Of training: {', '.join(PRECISIONS)}.")
    ] = "bf16-autocast",
    attention: Annotated[
        str, typer.Option("--attention", metavar="KIND", help="sdpa, or eager, which keeps the weights of attention.")
    ] = "sdpa",
    optimizer: Annotated[
        list[str] | None,
        typer.Option("--optimizer", metavar="GLOB", help="Show these alone, as 'adam*'. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON, in bytes.")] = False,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write a page with pictures, an HTML file.")
    ] = None,
) -> None:
    """Plan the memory of a training: the state of every optimizer and storage, weights, gradients, activations.

    The model is built without memory, whatever its size. State is exact to the byte, also for one of several GPUs;
    activations are an estimate.
    """
    with user_errors():
        size = None if fits is None else parse_size(fits)
        found = planned_for(
            load_model(model, device="meta"),
            name=model,
            processes=gpus,
            shard=shard or ("fsdp" if gpus > 1 else "replicate"),
            precision=precision,
            context=context,
            micro_batch=micro_batch,
            attention=attention,
        )
        planned = sorted({own.optimizer for own in found.combinations})
        found = found.only(lambda own: not optimizer or any(fnmatchcase(own.optimizer, glob) for glob in optimizer))
        if not found.combinations:
            raise ValueError(_none_called(optimizer or (), planned))
        if page is not None:
            from sharpwise.report.memory_page import write_memory_page

            write_memory_page(page, found, size)
    if as_json:
        typer.echo(found.to_json(size), nl=False)
        return
    console = Console(highlight=False)
    console.print(Text(title(found)))
    console.print(_roles(found))
    console.print()
    for line in estimates(found):
        console.print(Text(line))
    console.print(_combinations(found, size, fits or ""))
    if size is not None:
        console.print(Text(what_fits(found, size)))
    for line in refusals(found):
        console.print(Text(line, style="yellow"))
    if page is not None:
        typer.echo(page)


def _none_called(globs: Sequence[str], names: Sequence[str]) -> str:
    said = " ".join(globs)
    return f"--optimizer {said}: no optimizer is called so{nearest(said, names)}; there are {', '.join(names)}"


def _table(*columns: str, left: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", overflow="fold")
    return table


def _roles(found: MemoryPlan) -> Table:
    table = _table("role", "type", "parameters", "share", left=2)
    total = sum(found.parameters.values())
    for role, count in found.parameters.items():
        table.add_row(role, str(BLOCK_TYPE[role]), f"{count:,}", f"{count / total:.1%}")  # type: ignore[index]
    return table


def _combinations(found: MemoryPlan, size: int | None, word: str) -> Table:
    table = _table("optimizer", "storage", "state", "in all", "moved", "sent", *([word] if word else []), left=2)
    fits = {} if size is None else {id(fit.planned): fit for fit in found.fits(size)}
    for own in found.distinct:
        cells = [size_text(n) for n in (own.state, found.total(own), own.moved, found.sent + own.sent)]
        fit = fits.get(id(own))
        if fit is not None:
            cells.append(("no" if not fit.fits else "yes") if fit.micro_batch is None else f"{fit.micro_batch} x")
        style = "dim" if fit is not None and not fit.fits else ""
        table.add_row(*(Text(cell, style=style) for cell in (own.optimizer, own.storage, *cells)))
    return table
