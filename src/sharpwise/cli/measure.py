"""`sharpwise measure`: sharpness, curvature, spectra and update sizes per block, of a run's checkpoints or a model."""

import webbrowser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sharpwise.blocks.unclear import without_options
from sharpwise.cli.errors import user_errors

if TYPE_CHECKING:
    from sharpwise.measure.subject import Subject
    from sharpwise.probes import Measurement

ROWS = 60
"""Of a table in the terminal."""

measure = typer.Typer(
    name="measure",
    help="Measure each block: of a run's checkpoints, or of a model from a folder.",
    no_args_is_help=True,
)

Where = Annotated[
    Path, typer.Argument(metavar="RUN|MODEL", help="The folder of a run, or of a model with config.json and weights.")
]
At = Annotated[str, typer.Option("--at", help="Steps of a run: all, last, or such as 0,100,1000.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", "-d", help="Text, from `sharpwise prepare`; its validation part is used. Default: the run's."
    ),
]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of a window. Default: the run's, or the model's.")]
Batches = Annotated[int, typer.Option(min=1, help="Batches; intervals are over these.")]
Sequences = Annotated[int, typer.Option(min=1, help="Windows of a batch.")]
Micro = Annotated[int | None, typer.Option(min=1, help="Windows at a time, for memory.")]
Seed = Annotated[int, typer.Option(min=0, help="Of windows, labels and random vectors.")]
Rtol = Annotated[float | None, typer.Option(help="Stop where every error is this part of its value.")]
Select = Annotated[
    list[str] | None,
    typer.Option("--select", "-s", help="Block types (VO), roles (q) or globs on parameters. Repeatable."),
]
Trust = Annotated[
    bool, typer.Option("--trust-code", help="Run the code that the run names for its model or optimizer.")
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write. Default: RUN|MODEL/measure.")]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")]


@measure.command()
def sharpness(
    where: Where,
    at: At = "last",
    data: Data = None,
    context: Context = None,
    batches: Batches = 8,
    sequences: Sequences = 8,
    micro: Micro = None,
    labels: Annotated[str, typer.Option(help="sampled from the model, or true: those of the text.")] = "sampled",
    unit: Annotated[str, typer.Option(help="token or sequence: what a draw is.")] = "token",
    rtol: Rtol = None,
    seed: Seed = 0,
    ratios: Annotated[
        bool, typer.Option("--ratios", help="Print the BlockwiseLR that the last step suggests.")
    ] = False,
    power: Annotated[float, typer.Option(min=0.0, help="Of (S_Norm/S_b), for --ratios.")] = 0.6,
    cap: Annotated[float, typer.Option(min=1.0, help="Largest ratio, for --ratios.")] = 10.0,
    trust_code: Trust = False,
    out: Out = None,
    open_page: Open = False,
) -> None:
    """Fisher sharpness: trace of the Fisher matrix of a block over its parameters, and the order of the paper."""
    with user_errors():
        from sharpwise.measure import probing
        from sharpwise.probes.order import as_block_lr, suggested_ratios

        text = probing.Text(batches, sequences, micro, seed)
        probe = partial(probing.sharpness, text=text, labels=labels, unit=unit, rtol=rtol)  # type: ignore[arg-type]
        found = _measure(where, at, data, context, trust_code, out, probe, open_page)
        _print_order(found)
        if ratios:
            typer.echo(as_block_lr(suggested_ratios(found[-1], power=power, cap=cap)))


@measure.command()
def hessian(
    where: Where,
    at: At = "last",
    data: Data = None,
    context: Context = None,
    batches: Batches = 1,
    sequences: Sequences = 8,
    micro: Micro = None,
    what: Annotated[
        list[str] | None,
        typer.Option(help="trace, eigenvalues, density, frobenius, norm_11, diagonal. Repeatable."),
    ] = None,
    kind: Annotated[str, typer.Option(help="hessian or gauss-newton.")] = "hessian",
    select: Select = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Random vectors, at most. Default: 20 to 100, by what is measured.")
    ] = None,
    rtol: Rtol = None,
    seed: Seed = 0,
    trust_code: Trust = False,
    out: Out = None,
    open_page: Open = False,
) -> None:
    """Trace, eigenvalues, density and norms of the Hessian or the Gauss-Newton matrix, of all or some blocks."""
    with user_errors():
        from sharpwise.measure import probing

        text = probing.Text(batches, sequences, micro, seed)
        asked = tuple(what or ("trace", "eigenvalues"))
        probe = partial(
            probing.hessian, text=text, what=asked, kind=kind, select=tuple(select or ()), samples=samples, rtol=rtol  # type: ignore[arg-type]
        )  # fmt: skip
        _measure(where, at, data, context, trust_code, out, probe, open_page)


@measure.command()
def spectrum(
    where: Where,
    at: At = "last",
    select: Select = None,
    trust_code: Trust = False,
    out: Out = None,
    open_page: Open = False,
) -> None:
    """Tail exponent, stable rank and norms of each weight matrix, beside those of random matrices."""
    with user_errors():
        from sharpwise.measure import probing

        probe = partial(probing.spectra, select=tuple(select or ()))
        _measure(where, at, None, None, trust_code, out, probe, open_page)


@measure.command()
def updates(
    where: Where,
    at: At = "all",
    data: Data = None,
    batches: Batches = 8,
    sequences: Sequences = 8,
    seed: Seed = 0,
    trust_code: Trust = False,
    out: Out = None,
    open_page: Open = False,
) -> None:
    """Of the step that a run takes after a checkpoint: size, angle, RRC; and the noise of the gradients there."""
    with user_errors():
        from sharpwise.measure import probing

        probe = partial(probing.updates, text=probing.Text(batches, sequences, None, seed))
        _measure(where, at, data, None, trust_code, out, probe, open_page, followed=True)


def _measure(
    where: Path,
    at: str,
    data: Path | None,
    context: int | None,
    trust_code: bool,
    out: Path | None,
    probe: "Callable[[Subject, int | None], list[Measurement]]",
    open_page: bool,
    *,
    followed: bool = False,
) -> "list[Measurement]":
    """Measure at every step asked for, write after each, and print what the last one says."""
    from sharpwise.measure.results import add, place_of, write_page
    from sharpwise.measure.subject import chosen_steps, open_subject, study_of

    subject = open_subject(where, data=data, context=context, trust_code=trust_code)
    steps = chosen_steps(subject, at, followed=followed)
    folder = out or place_of(where)
    console = Console(stderr=True)
    columns: list[Any] = [BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()]
    found: list[Measurement] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(steps))
        for step in steps:
            progress.update(task, description="" if step is None else f"step {step}")
            with without_options(str(where)):
                new = probe(subject, step)
            for one in new:
                one.environment = subject.environment
            add(folder, new)
            found += new
            progress.advance(task)
    page = write_page(folder, where.resolve().name, study_of(subject, data))
    last = [one for one in found if one.step == steps[-1]]
    for one in last:
        _print(one)
    typer.echo(f"The page: {page}")
    if open_page:
        webbrowser.open(page.resolve().as_uri())
    return found


def _print(one: "Measurement") -> None:
    """The values of types and of the model; those of segments are in the files."""
    shown = [e for e in one if e.by in ("type", "model")] or list(one)
    at = "" if one.step is None else f" after step {one.step}"
    typer.echo(f"{one.probe}{at}")
    typer.echo(str(type(one)(one.probe, shown[:ROWS]).table()))
    if len(shown) > ROWS:
        typer.echo(f"and {len(shown) - ROWS} more; all are on the page and in its JSON")
    for warning in one.warnings[:5]:
        typer.echo(f"- {warning}", err=True)


def _print_order(found: "list[Measurement]") -> None:
    """Which relations of the paper hold, at each step."""
    from sharpwise.probes.order import relations

    for one in found:
        held = relations(one)
        if held:
            at = "" if one.step is None else f"step {one.step}: "
            said = [f"{r.flatter} < {r.sharper} {r.holds} ({r.ratio:.2g}x, {r.low:.2g} to {r.high:.2g})" for r in held]
            typer.echo(at + ", ".join(said))
