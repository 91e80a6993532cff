"""`sharpwise compare`: which optimizer helps this model, by how much, and how sure that is."""

import time
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sharpwise.cli.compare_text import announce, duration, print_result
from sharpwise.cli.errors import user_errors
from sharpwise.cli.malloc import keep_large_blocks
from sharpwise.files import checked_name

if TYPE_CHECKING:
    from sharpwise.compare.budget import Budget
    from sharpwise.compare.runner import Progress as Progressed
    from sharpwise.compare.study import Study


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
            "'optimizer.weight_decay=[0,0.3]' or 'schedule.warmup=[0.02]'; of optimizer.lr, the ones to begin with. "
            "Repeatable.",
        ),
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            "--tune",
            metavar="roles",
            help="Search the factor on the learning rate (see --of) that every block type wants, for one optimizer.",
        ),
    ] = None,
    runs: Annotated[
        int | None, typer.Option("--runs", help="Of that search at most. [default: 2 + 8 for each factor]")
    ] = None,
    types: Annotated[
        str | None,
        typer.Option(
            "--types", metavar="TYPE,...", help="Of that search: block types or roles. [default: all of the model]"
        ),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(
            "--of",
            metavar="lr,weight_decay,beta2",
            help="What these factors are on, one after the other; of beta2 on 1 - beta2. [default: lr]",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build every arm once, say what the study takes, and train nothing.")
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
            base = _search(arms or [], tune, runs, types, of, recipe)
            given, folder = _study(arms or [], out, recipe, budget, said, assignments, search or [], trust_code, base)
            if dry_run:
                _plan(log, given, folder, jobs, trust_code)
                return
            result, page = run_and_write(log, given, folder, jobs, so_far=so_far, trust_code=trust_code)
    except KeyboardInterrupt:
        log.print("Stopped; what was trained is kept, and the same command goes on.")
        raise typer.Exit(130) from None
    show(result, page, time.perf_counter() - started, open_page)


def show(result: Mapping[str, Any], page: Path, seconds: float, open_page: bool) -> None:
    """Print what came out, and where the page is."""
    console = Console(highlight=False, markup=False)
    print_result(console, result)
    console.print(f"{duration(seconds)}. The page: {page}", soft_wrap=True)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


def _search(
    arms: list[str], tune: str | None, runs: int | None, types: str | None, of: str | None, recipe: str | None
) -> dict[str, Any] | None:
    """The study of a search, None where none is asked for."""
    if tune is None:
        if (runs, types, of) != (None, None, None):
            raise ValueError("--runs, --types and --of are those of a search; say --tune roles too")
        return None
    if tune != "roles":
        raise ValueError(f"--tune {tune}: expected roles, for the factor of every block type")
    if recipe is not None or len(arms) > 1 or any(arm.endswith(".toml") or Path(arm).is_file() for arm in arms):
        raise ValueError(
            "--tune roles takes one optimizer, as in: sharpwise compare adamw --tune roles --budget 0.5M; in a study "
            'file any arm may say tune = "roles"'
        )
    from sharpwise.tune import role_study

    names = [name.strip() for name in types.split(",")] if types is not None else []
    quantities = ["lr"] if of is None else [name.strip() for name in of.split(",")]
    return role_study(arms[0] if arms else "adamw", types=names, of=quantities, runs=runs)


def _study(
    arms: list[str],
    out: Path | None,
    recipe: str | None,
    budget: str | None,
    said: Mapping[str, Any],
    assignments: list[str],
    search: list[str],
    trust_code: bool = False,
    base: dict[str, Any] | None = None,
) -> tuple[dict[str, Any] | None, Path]:
    """The study as TOML would give it, None to go on with the stored one; and its folder."""
    from sharpwise.compare.recipes import find_recipe
    from sharpwise.compare.study import make_study
    from sharpwise.train.code import confirm_code
    from sharpwise.train.config_file import read_given, set_keys, sets

    if recipe is not None and arms:
        raise ValueError("--recipe is a whole study; leave out the arms")
    given: dict[str, Any] = dict(base or {})
    path: Path | None = None
    if recipe is not None:
        path = find_recipe(recipe)
    elif len(arms) == 1 and (arms[0].endswith(".toml") or Path(arms[0]).is_file()):
        path = Path(arms[0])
    elif len(arms) == 1 and (Path(arms[0]) / "study.toml").is_file():
        raise ValueError(f"{arms[0]} is the folder of a study; to go on with it: sharpwise compare --out {arms[0]}")
    if path is not None:
        given = {"name": recipe or path.stem, **read_given(path, "study")}
    elif arms and base is None:
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
        searched = _searched(search)
        if (lrs := searched.pop("optimizer.lr", None)) is not None:
            given = _with_rates(given, lrs)
        given["search"] = {**given.get("search", {}), **searched}
    if budget is not None:
        given = {key: value for key, value in given.items() if key not in ("tokens", "ratio")} | _budget(budget)
    if "tokens" not in given and "ratio" not in given:
        raise ValueError("say how long a run is: --budget 4M (tokens), or --budget 1x (20 tokens per parameter)")
    given.setdefault("name", "study" if base is None else "roles")
    if path is not None:
        typed = [key for key in ("model.name",) if sets(assignments, key)]
        confirm_code(make_study(given).configs, path, trust_code, typed)
    if out is None:
        name = given["name"]
        out = Path("runs") / (name if name == recipe else checked_name(name, "name"))
    return given, out


def _with_rates(given: Mapping[str, Any], lrs: Any) -> dict[str, Any]:
    """A study with these learning rates to begin with, for every arm, and room to go on from them."""
    given = {**given, "lrs": lrs}
    if isinstance(given.get("arms"), Mapping):
        arms = {name: {k: v for k, v in arm.items() if k != "lrs"} for name, arm in given["arms"].items()}
        given["arms"] = arms
    if isinstance(lrs, list):
        given["most"] = max(given.get("most", 7), len(lrs) + 2)
    return given


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
    from sharpwise.train.config_file import amount

    try:
        return {"ratio": amount(text[:-1])} if text[-1:].lower() == "x" else {"tokens": round(amount(text))}
    except ValueError:
        raise ValueError(f"--budget {text!r}: expected tokens, as 4000000 or 4M, or a ratio as 1x") from None


def _plan(log: Console, given: Mapping[str, Any] | None, folder: Path, jobs: int, trust_code: bool) -> None:
    """Say what a study takes, and what is done of it."""
    with log.status("Building every arm once"):
        from sharpwise.compare.runner import plan
        from sharpwise.compare.stored import open_study

        study = open_study(given, folder, trust_code=trust_code)
        jobs = _jobs(study, jobs)
        budget, _ = plan(study, folder, jobs)
    announce(log, study, budget, jobs)


def _jobs(study: "Study", jobs: int) -> int:
    from sharpwise.train.environment import available_cpus

    return jobs or (1 if study.on_gpu else max(1, available_cpus() // study.threads))


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

        study = open_study(given, folder, trust_code=trust_code)
        if so_far:
            result = results(look(study, folder))
            return result, write_study_page(result, folder)
    jobs = _jobs(study, jobs)
    with _progress(log) as progress:
        task = progress.add_task("", total=1.0, runs="", eta="")
        started, first = time.perf_counter(), [0.0]

        def on_budget(budget: "Budget") -> None:
            announce(log, study, budget, jobs)

        def on_progress(news: "Progressed") -> None:
            first[0] = first[0] or news.share
            gained = news.share - first[0]
            eta = (
                ""
                if gained < 0.01 or news.share == 1
                else duration((time.perf_counter() - started) / gained * (1 - news.share))
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
