"""`sharpwise demo`: train a tiny transformer under three optimizers and write a page that says what came out."""

import tempfile
import time
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sharpwise.cli.errors import user_errors
from sharpwise.cli.malloc import keep_large_blocks


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the page and its numbers.")] = Path("runs/demo"),
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "-d",
            help="A text file, an .xz of one, or a folder of them; without it, the source text of this Python's "
            "standard library.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Optimizer steps of each of the nine runs.")] = 260,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the weights and of the order of the data.")] = 0,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Runs at a time, one thread each; 0 takes what the CPUs allow.")
    ] = 0,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Train a tiny GPT-2 under AdamW, AdamW with blockwise learning rates and Adam-mini, and say what came out.

    Three learning rates each, one seed, two to four minutes on two cores, no network. Writes index.html and
    result.json.
    """
    log = Console(stderr=True, highlight=False, markup=False)
    started = time.perf_counter()
    try:
        with user_errors():
            result, page = _demo(log, out, data, steps, seed, jobs)
    except KeyboardInterrupt:
        log.print("Stopped; nothing was written.")
        raise typer.Exit(130) from None
    console = Console(highlight=False, markup=False)
    _print(console, result)
    console.print(f"{time.perf_counter() - started:.0f} s. The page: {page}", soft_wrap=True)
    if open_page:
        webbrowser.open(page.resolve().as_uri())


def _demo(log: Console, out: Path, data: Path | None, steps: int, seed: int, jobs: int) -> tuple[dict[str, Any], Path]:
    """Everything from the text to the page; progress goes to `log`."""
    keep_large_blocks()  # before torch allocates
    _check_writable(out)
    with tempfile.TemporaryDirectory(prefix=".runs-", dir=out) as aside:
        result = _train(log, Path(aside), data, steps, seed, jobs)
    from sharpwise.compare.page import write

    return result, write(result, out)


def _train(log: Console, folder: Path, data: Path | None, steps: int, seed: int, jobs: int) -> dict[str, Any]:
    """The nine runs, their folders below `folder`."""
    with log.status("Reading the text and learning its tokens"):
        from sharpwise.compare.demo import ARMS, LEARNING_RATES, Settings, load_corpus, run_demo
        from sharpwise.train.environment import available_cpus

        settings = Settings(steps=steps, warmup=max(1, steps // 10), seed=seed)
        corpus = load_corpus(data, folder / "data", settings)
    count = len(ARMS) * len(LEARNING_RATES)
    jobs = min(jobs or min(available_cpus(), 3), count)
    about: dict[str, Any] = corpus.about
    log.print(f"{about['source']}: {about['documents']:,} documents, {about['train_tokens']:,} tokens to train on")
    log.print(f"{count} runs of {settings.tokens:,} tokens, {jobs} at a time")
    steps_of = [0] * count
    with _progress(log) as progress:
        task = progress.add_task("", total=count * settings.steps, ended=0, runs=count)

        def on_progress(news: Any) -> None:
            steps_of[news.run] = news.step
            ended = sum(step == settings.steps for step in steps_of)
            progress.update(task, completed=sum(steps_of), ended=ended)

        return run_demo(
            corpus, settings, folder=folder, jobs=jobs, worker_setup=keep_large_blocks, on_progress=on_progress
        )


def _check_writable(out: Path) -> None:
    """Find out before three minutes of training whether the results can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write into {out}: {error.strerror or error}; name another folder with --out"
        ) from None


def _progress(log: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("steps,"),
        TextColumn("{task.fields[ended]}/{task.fields[runs]} runs,"),
        TimeElapsedColumn(),
        TextColumn("to go"),
        TimeRemainingColumn(),
        console=log,
        speed_estimate_period=60,
    )


def _print(console: Console, result: dict[str, Any]) -> None:
    from sharpwise.compare.summary import arm_names, caveats, headline, rows

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for arm in arm_names(result):
        table.add_column(arm, justify="right")
    for label, texts in rows(result):
        table.add_row(label, *texts, style="bold" if label == "best" else "")
    console.print(table)
    console.print()
    console.print(headline(result) + ".", style="bold")
    for note in caveats(result):
        console.print(f"- {note}")
