"""`sharpwise demo`: a small study of three optimizers, from text to page, with nothing to download."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sharpwise.cli.compare import run_and_write, show
from sharpwise.cli.errors import user_errors
from sharpwise.cli.malloc import keep_large_blocks


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the study and its page.")] = Path("runs/demo"),
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "-d",
            help="A text file, or a folder of them; without it, the source text of this Python's standard library.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=50, help="Optimizer steps of each run.")] = 60,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0 takes one per CPU.")] = 0,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Compare AdamW, AdamW with blockwise learning rates and Adam-mini on a tiny GPT-2, and say what came out.

    A small `sharpwise compare`: every arm is tuned alike, five seeds, a few minutes on two cores, no network. Stopped,
    the same command goes on; where it has ended, it shows the result, with what `sharpwise compare` added since.
    """
    log = Console(stderr=True, highlight=False, markup=False)
    keep_large_blocks()  # before torch allocates
    started = time.perf_counter()
    try:
        with user_errors():
            with log.status("Reading the text and learning its tokens"):
                from sharpwise.compare.demo import demo_data, demo_study
                from sharpwise.compare.stored import extends

                corpus = demo_data(data, out / "data")
            about = corpus.about
            log.print(
                f"{about['source']}: {about['documents']:,} documents, {about['train_tokens']:,} tokens to train on"
            )
            study = demo_study(corpus.folder, steps)
            result, page = run_and_write(log, None if extends(out, study) else study, out, jobs)
    except KeyboardInterrupt:
        log.print("Stopped; what was trained is kept, and the same command goes on.")
        raise typer.Exit(130) from None
    show(result, page, time.perf_counter() - started, open_page)
