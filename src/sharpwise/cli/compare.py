"""`sharpwise compare`: which optimizer helps this model, by how much, and how sure that is."""

import datetime
import math
import time
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sharpwise.cli.errors import user_errors
from sharpwise.cli.malloc import keep_large_blocks
from sharpwise.files import checked_name

if TYPE_CHECKING:
    from sharpwise.compare.budget import Budget
    from sharpwise.compare.runner import Progress as Progressed


def compare(
    arms: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ARM...|STUDY",
            help="Optimizers, as adamw, adam-mini, adamw+blockwise, 'adamw+reversed(blockwise)', or module:class of "
            "another library; or a study file (TOML); or nothing, to go on with the study in --out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the study. [default: runs/NAME]")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As in sharpwise train.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="A folder that `sharpwise prepare` wrote.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", "-b", help="Of each run: tokens, as 4000000 or 4M; or 1x for 20 tokens per parameter."
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Final runs of each arm. [default: 3]")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="[default: the first arm]")] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", help="Nats per token that would not matter. [default: 0.01]")
    ] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Add the ablations of every block_lr: mean, reversed, shuffled.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="A.B=VALUE", help="A setting that all runs share. Repeatable."),
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            metavar="A.B=[VALUE, ...]",
            help="Values of a setting to try for every arm, after its learning rate, as "
            "'optimizer.weight_decay=[0,0.3]' or 'schedule.warmup=[0.02]'. Repeatable.",
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="A study that comes with sharpwise.")] = None,
    trust_code: Annotated[
        bool,
        typer.Option(
            "--trust-code",
            help="Run code that a file names: of its model (that of --model runs anyway), of optimizers.",
        ),
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            "-j",
            min=0,
            help="Runs at a time, of one thread unless compute.threads is set; 0 takes one per CPU, or one on a GPU.",
        ),
    ] = 0,
    so_far: Annotated[
        bool, typer.Option("--so-far", help="Train nothing: write the page of what there is, of a study in --out.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Tune every arm fairly, train its best setting over fresh seeds, and say what is better, by how much, how sure.

    Stopped or killed, the same command goes on. Arms and seeds can be added later.
    """
    log = Console(stderr=True, highlight=False, markup=False)
    keep_large_blocks()  # before torch allocates
    started = time.perf_counter()
    try:
        with user_errors():
            said = {"seeds": seeds, "baseline": baseline, "margin": margin, "ablations": ablations or None}
            run = [f'{key}="{value}"' for key, value in (("model.name", model), ("data.path", data)) if value]
            assignments = [*run, *(settings or [])]
            given, folder = _study(arms or [], out, recipe, budget, said, assignments, search or [], trust_code)
            result, page = run_and_write(log, given, folder, jobs, so_far=so_far, trust_code=trust_code)
    except KeyboardInterrupt:
        log.print("Stopped; what was trained is kept, and the same command goes on.")
        raise typer.Exit(130) from None
    show(result, page, time.perf_counter() - started, open_page)


def show(result: Mapping[str, Any], page: Path, seconds: float, open_page: bool) -> None:
    """Print what came out, and where the page is."""
    console = Console(highlight=False, markup=False)
    _print(console, result)
    console.print(f"{_duration(seconds)}. The page: {page}", soft_wrap=True)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


def _study(
    arms: list[str],
    out: Path | None,
    recipe: str | None,
    budget: str | None,
    said: Mapping[str, Any],
    assignments: list[str],
    search: list[str],
    trust_code: bool = False,
) -> tuple[dict[str, Any] | None, Path]:
    """The study as TOML would give it, None to go on with the stored one; and its folder."""
    from sharpwise.compare.recipes import find_recipe
    from sharpwise.compare.study import make_study
    from sharpwise.train.code import confirm_code
    from sharpwise.train.config_file import read_given, set_keys, sets

    if recipe is not None and arms:
        raise ValueError("--recipe is a whole study; leave out the arms")
    given: dict[str, Any] = {}
    path: Path | None = None
    if recipe is not None:
        path = find_recipe(recipe)
    elif len(arms) == 1 and (arms[0].endswith(".toml") or Path(arms[0]).is_file()):
        path = Path(arms[0])
    elif len(arms) == 1 and (Path(arms[0]) / "study.toml").is_file():
        raise ValueError(f"{arms[0]} is the folder of a study; to go on with it: sharpwise compare --out {arms[0]}")
    if path is not None:
        given = {"name": recipe or path.stem, **read_given(path, "study")}
    elif arms:
        given = {"arms": list(arms)}
    said = {key: value for key, value in said.items() if value is not None}
    if not given and (said or assignments or search or budget):
        raise ValueError("say which optimizers to compare, as in: sharpwise compare adamw adam-mini --budget 4M")
    if not given:
        if out is None:
            raise ValueError("say which optimizers to compare, or which study to go on with: --out FOLDER")
        return None, out
    given |= said
    if assignments:
        given["run"] = set_keys(given.get("run", {}), assignments)
    if search:
        given["search"] = {**given.get("search", {}), **_searched(search)}
    if budget is not None:
        given = {key: value for key, value in given.items() if key not in ("tokens", "ratio")} | _budget(budget)
    if "tokens" not in given and "ratio" not in given:
        raise ValueError("say how long a run is: --budget 4M (tokens), or --budget 1x (20 tokens per parameter)")
    given.setdefault("name", "study")
    if path is not None:
        typed = [key for key in ("model.name",) if sets(assignments, key)]
        confirm_code(make_study(given).configs, path, trust_code, typed)
    if out is None:
        name = given["name"]
        out = Path("runs") / (name if name == recipe else checked_name(name, "name"))
    return given, out


def _searched(assignments: list[str]) -> dict[str, Any]:
    """Dotted keys with the values to try."""
    from sharpwise.train.config_file import set_keys

    found = {}
    for assignment in assignments:
        key, _, _ = assignment.partition("=")
        value = set_keys({}, [assignment])
        for part in key.split("."):
            value = value[part.strip()]
        found[key.strip()] = value
    return found


def _budget(text: str) -> dict[str, Any]:
    number, unit = (text[:-1], text[-1]) if text[-1:].lower() in ("x", "k", "m", "b") else (text, "")
    try:
        value = float(number.replace("_", ""))
        if not math.isfinite(value):
            raise ValueError
    except ValueError:
        raise ValueError(f"--budget {text!r}: expected tokens, as 4000000 or 4M, or a ratio as 1x") from None
    if unit.lower() == "x":
        return {"ratio": value}
    return {"tokens": round(value * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[unit.lower()])}


def run_and_write(
    log: Console,
    given: Mapping[str, Any] | None,
    folder: Path,
    jobs: int,
    *,
    so_far: bool = False,
    trust_code: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Run a study with its progress on the terminal, or look at what there is `so_far`, and write its page."""
    with log.status("Building every arm once"):
        from sharpwise.compare.report.page import write_study_page
        from sharpwise.compare.results import results
        from sharpwise.compare.runner import look, place_of, run_study
        from sharpwise.compare.stored import open_study
        from sharpwise.train.environment import available_cpus

        study = open_study(given, folder, trust_code=trust_code)
        if so_far:
            result = results(look(study, folder))
            return result, write_study_page(result, folder)
    jobs = jobs or (1 if study.on_gpu else max(1, available_cpus() // study.threads))
    with _progress(log) as progress:
        task = progress.add_task("", total=1.0, runs="", eta="")
        started, first = time.perf_counter(), [0.0]

        def on_budget(budget: "Budget") -> None:
            _announce(log, budget, len(study.arms), study.seeds, jobs)

        def on_progress(news: "Progressed") -> None:
            first[0] = first[0] or news.share
            gained = news.share - first[0]
            eta = (
                ""
                if gained < 0.01 or news.share == 1
                else _duration((time.perf_counter() - started) / gained * (1 - news.share))
            )
            runs = f"{news.done} of about {news.expected} runs"
            eta = eta and f"about {eta} to go"
            progress.update(task, completed=news.share, runs=runs, eta=eta)
            if news.ended is not None and not log.is_terminal:  # a bar is drawn in terminals only
                trial, loss = news.ended
                end = "diverged" if loss is None else f"loss {loss:.4f}"
                log.print(f"{runs}: {place_of(trial)}, {end}{eta and f'; {eta}'}", soft_wrap=True)

        state = run_study(
            study,
            folder,
            jobs=jobs,
            setup=keep_large_blocks,
            on_budget=on_budget,
            on_progress=on_progress,
        )
    result = results(state)
    return result, write_study_page(result, folder)


def _announce(log: Console, budget: "Budget", arms: int, seeds: int, jobs: int) -> None:
    least, most = budget.runs
    log.print(
        f"{arms} arms, {least} to {most} runs of {budget.tokens:,} tokens ({budget.steps:,} steps), {jobs} at a time"
        + (f"; {budget.done} are done" if budget.done else "")
    )
    log.print(
        f"{budget.tokens_per_parameter:.2g} tokens per parameter outside the embeddings, where 20 are usual",
        soft_wrap=True,
    )
    if budget.seconds is not None:
        rest = " of the others" if budget.done else ""
        least_time, most_time = (_duration(seconds) for seconds in budget.seconds)
        span = least_time if least_time == most_time else f"{least_time} to {most_time}"
        log.print(f"estimated time{rest}: {span}")
    log.print(
        f"{seeds} seeds see a difference of about {budget.detectable:.3f} nats (80% of the time, if seeds differ as "
        "those of AdamW at 0.4M parameters)",
        soft_wrap=True,
    )


def _progress(log: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:.0f}%"),
        TextColumn("{task.fields[runs]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
        console=log,
        disable=not log.is_terminal,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return str(datetime.timedelta(seconds=round(seconds))) if seconds >= 5400 else f"{seconds / 60:.0f} min"


def _print(console: Console, result: Mapping[str, Any]) -> None:
    """The verdict, what to know before believing it, and what to do next: as on the page."""
    from sharpwise.compare.report.text import headline

    console.print(headline(result), style="bold")
    console.print()
    console.print(_table(result))
    console.print()
    for arm in result["arms"]:
        if arm["name"] != result["baseline"] and arm["sentence"]:
            console.print(f"{arm['name']}: {arm['sentence']}")
    for pair in result["ablations"]:
        if pair["sentence"]:
            console.print(f"{pair['arm']}, against {pair['ablation']}: {pair['sentence']}")
    if result["caveats"]:
        console.print("\nBefore you believe it", style="bold")
    for note in result["caveats"]:
        console.print(f"- {note}")
    console.print("\nWhat to do next", style="bold")
    console.print(result["next"]["reason"])
    console.print(f"  {result['next']['command']}\n", soft_wrap=True)


def _table(result: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("arm", "lr", "final loss", "against " + result["baseline"], "state"):
        table.add_column(column, justify="left" if column == "arm" else "right", overflow="fold")
    for arm in result["arms"]:
        lr = "-" if arm["setting"] is None else f"{arm['setting']['optimizer.lr']:g}{' (edge)' if arm['edge'] else ''}"
        mean = ("diverged" if arm["final"] else "-") if arm["mean"] is None else f"{arm['mean']:.4f}"
        difference = arm["difference"]
        against = "" if difference is None or difference["mean"] is None else f"{difference['mean']:+.4f}"
        if difference and difference["low"] is not None:
            against += f" ({difference['low']:+.4f} to {difference['high']:+.4f})"
        state = "-" if arm["state_bytes"] is None else f"{arm['state_bytes'] / 2**20:.2f} MiB"
        table.add_row(arm["name"], lr, mean, against, state)
    return table
