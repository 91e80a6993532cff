"""`sharpwise train`: train a model, or go on with a run that was stopped."""

import json
import logging
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sharpwise.cli.errors import user_errors
from sharpwise.cli.malloc import keep_large_blocks
from sharpwise.files import checked_name

if TYPE_CHECKING:
    from sharpwise.train.profile import Profile
    from sharpwise.train.run import Outcome, Start
    from sharpwise.train.steps import Step


def train(
    what: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG|RUN",
            help="A TOML file to train by, or the folder of a run to go on with.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run. [default: runs/ and the name of what is trained]"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A preset, a Hugging Face config, or module:function. Sets model.name."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="A folder that `sharpwise prepare` wrote. Sets data.path.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="As adamw, or module:class. Sets optimizer.name.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Peak learning rate. Sets optimizer.lr.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sets schedule.steps.")] = None,
    init_from: Annotated[
        str | None, typer.Option("--init-from", help="A folder with weights, or a run. Sets model.init_from.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="A.B=VALUE", help="Any other setting, as optimizer.block_lr=blockwise. Repeatable."
        ),
    ] = None,
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="Run the code that a stored run names for its model or optimizer."),
    ] = False,
    profile: Annotated[
        int, typer.Option("--profile", min=0, metavar="STEPS", help="Train a few steps, show where their time goes.")
    ] = 0,
) -> None:
    """Train a model; or go on with a run that was stopped, by the same command or `sharpwise train RUN`.

    Settings come from the TOML file, then the options, then --set; what nobody says has a default. The folder of the
    run holds them all, in config.toml.

    On several devices: torchrun --nproc-per-node N -m sharpwise train ..., with the same settings, and those of [mesh].
    """
    log = Console(stderr=True, highlight=False, markup=False, quiet=not _speaks())
    keep_large_blocks()  # before torch allocates
    shorthand = {
        "model.name": model,
        "data.path": data,
        "optimizer.name": optimizer,
        "optimizer.lr": lr,
        "schedule.steps": steps,
        "model.init_from": init_from,
    }
    assignments = [f"{key}={_toml(value)}" for key, value in shorthand.items() if value is not None]
    assignments += settings or []
    with user_errors(), _logging_to(log):
        with log.status("Starting"):
            from sharpwise.train import config_file
            from sharpwise.train.code import confirm_code

            source = what / "config.toml" if what is not None and what.is_dir() else what
            is_run = source != what
            if is_run and out not in (None, what):
                raise ValueError(f"the run in {what} goes on there; leave out --out {out}")
            said = config_file.set_keys({} if source is None else config_file.read_given(source), assignments)
            folder = what if what is not None and is_run else out or _default_folder(what, said)
            given: dict[str, Any] | None = said
            if not assignments and (is_run or (what is None and (folder / "config.toml").exists())):
                given = None  # and `run` reads what is stored
            elif source is not None and (is_run or source.with_name("metrics.jsonl").exists()):
                # What a run wrote, its file by itself too.
                typed = [key for key in ("model.name", "optimizer.name") if config_file.sets(assignments, key)]
                confirm_code([config_file.make_config(said)], source, trust_code, typed)
        if profile:
            _profile(log, given, folder, profile, trust_code)
            return
        outcome = _train(log, given, folder, trust_code)
    if _speaks():
        _say_end(Console(highlight=False, markup=False), outcome)
    if outcome.state == "interrupted":
        raise typer.Exit(130)


def _speaks() -> bool:
    """Whether this is the one process of several that says what happens."""
    return os.environ.get("RANK", "0") == "0"


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def _default_folder(config: Path | None, given: dict[str, Any]) -> Path:
    if config is not None:
        return Path("runs") / checked_name(config.stem, f"the name of {config}")
    from sharpwise.train.config_file import make_config

    meant = make_config(given)
    block_lr = meant.optimizer.block_lr
    names = [meant.model.init_from or meant.model.name, meant.optimizer.name, *([str(block_lr)] if block_lr else [])]
    return Path("runs") / "-".join(re.sub(r"[^\w.-]+", "_", name).strip("_") for name in names)


def _train(log: Console, given: dict[str, Any] | None, folder: Path, trust_code: bool) -> "Outcome":
    from sharpwise.train.run import Diverged, run

    view = View(log)
    try:
        with _interrupts() as stopped, view:
            outcome = run(
                given,
                folder,
                trust_code=trust_code,
                on_start=view.start,
                on_step=view.step,
                should_stop=stopped.is_set,
            )
        view.started = True  # or had finished, perhaps without a page
        return outcome
    except Diverged as error:
        _leave_it_to_main(error)
        raise ValueError(str(error)) from None
    except (ValueError, OSError, ImportError) as error:
        _leave_it_to_main(error)
        raise
    finally:
        if view.started:  # what was refused leaves everything as it was
            _write_page(log, folder)


def _leave_it_to_main(error: Exception) -> None:
    """End quietly where all processes raise the same error; a little later, for the launcher then ends the others."""
    from sharpwise.train.world import is_everywhere

    if is_everywhere(error) and not _speaks():
        time.sleep(1)
        raise typer.Exit(2)


def _write_page(log: Console, folder: Path) -> None:
    """The page of what there is; a run does not fail for want of it."""
    if not (folder / "metrics.jsonl").exists():
        return
    try:
        from sharpwise.report.run_page import write_run_page

        write_run_page(folder)
    except (OSError, ValueError) as error:
        log.print(f"no page was written: {error}", soft_wrap=True)


class View:
    """What a terminal shows while a run goes on."""

    def __init__(self, log: Console) -> None:
        self.log = log
        self.progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("to go"),
            TimeRemainingColumn(),
            console=log,
            speed_estimate_period=60,
        )
        self.task = self.progress.add_task("", total=None, numbers="", visible=False)
        self.validation = ""
        self.speed = 0.0
        self.started = False

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        if self.started:  # otherwise it would still print an empty line
            self.progress.stop()

    def start(self, start: "Start") -> None:
        """Say what is trained, on what, from where, and if it will be slow."""
        from sharpwise.train.environment import slow_bf16

        self.started = True
        facts, config = start.facts, start.config
        state = facts["state_bytes"]
        lines = [
            f"{config.model.init_from or config.model.name}: {facts['parameters']:,} parameters, "
            f"{facts['non_embedding_parameters']:,} without embeddings",
            f"{config.data.path}: {facts['data']['train_tokens']:,} tokens to train on, vocabulary "
            f"{facts['vocabulary']:,}",
            facts["optimizer"] + ("" if state is None else f", {state / 2**20:.1f} MiB of state"),
            f"{facts['steps']:,} steps of {facts['tokens_per_step']:,} tokens, {config.schedule.kind} schedule, "
            f"{config.compute.precision} on {config.compute.device}",
        ]
        if start.step:
            lines.append(f"going on after step {start.step:,}")
        for line in [*lines, f"into {start.folder}"]:
            self.log.print(line, soft_wrap=True)
        if slow := slow_bf16(config.compute.precision, config.compute.device):
            self.log.print(slow, style="yellow", soft_wrap=True)
        self.progress.update(self.task, total=facts["steps"], completed=start.step, visible=True)
        self.progress.start()

    def step(self, step: "Step") -> None:
        """Show the numbers of a step."""
        tokens = step.tokens / step.step / step.seconds
        self.speed = 0.95 * self.speed + 0.05 * tokens if self.speed else tokens
        if step.validation_loss is not None:
            self.validation = f"validation {step.validation_loss:.3f}  "
        numbers = f"loss {step.loss:.3f}  {self.validation}{self.speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=step.step, numbers=numbers)
        if step.validation_loss is not None and not self.log.is_terminal:  # a bar is drawn in terminals only
            self.log.print(f"step {step.step:,}: {numbers}", soft_wrap=True)


def _say_end(console: Console, outcome: "Outcome") -> None:
    from sharpwise.report.run import read_run
    from sharpwise.report.warmup import advice

    if outcome.state == "interrupted":
        again = f"sharpwise train {shlex.quote(str(outcome.folder))}{_to_confirm(outcome.folder)}"
        how = "the same command" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else again
        console.print(f"Saved after step {outcome.step:,} of {outcome.steps:,}. To go on: {how}", soft_wrap=True)
        return
    loss = "" if outcome.validation_loss is None else f" Validation loss {outcome.validation_loss:.4f} nats per token."
    console.print(f"{outcome.message.capitalize()}.{loss}", style="bold")
    if said := advice(read_run(outcome.folder)):
        console.print(said, soft_wrap=True)
    sample = outcome.folder / "sample.txt"
    if sample.exists():
        text = sample.read_text(encoding="utf-8").strip()  # of a model, which may say anything to a terminal
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        console.print("A text that the model wrote; it was given what stands before >>>:", soft_wrap=True)
        console.print(Text(text.encode(console.encoding, "replace").decode(console.encoding), style="dim"))
    for label, path in (("model", outcome.folder / "final"), ("page", outcome.folder / "index.html")):
        if path.exists():
            console.print(f"{label}: {path}", soft_wrap=True)


def _to_confirm(run: Path) -> str:
    """The option that a run needs to go on."""
    from sharpwise.train.code import runs_code
    from sharpwise.train.config_file import make_config, read_given

    return " --trust-code" if runs_code([make_config(read_given(run / "config.toml"))]) else ""


def _profile(log: Console, given: dict[str, Any] | None, folder: Path, steps: int, trust_code: bool) -> None:
    from sharpwise.train.build import build
    from sharpwise.train.code import confirm_code
    from sharpwise.train.config_file import make_config, read_given
    from sharpwise.train.launch import Launch
    from sharpwise.train.profile import profile_steps

    if Launch.of_environment().size > 1:
        raise ValueError("--profile is for one process; leave out torchrun, or --profile")
    with log.status(Text(f"Training a few steps under the profiler; nothing is written to {folder}")):
        config = make_config(read_given(folder / "config.toml") if given is None else given)
        if given is None:
            confirm_code([config], folder / "config.toml", trust_code)
        _print_profile(Console(highlight=False, markup=False), profile_steps(build(config), steps))


def _print_profile(console: Console, found: "Profile") -> None:
    console.print(
        f"{found.step_ms:.1f} ms a step, {found.tokens_per_second:,.0f} tokens/s (median of {found.steps} steps)"
    )
    phases = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    operators = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for table, first in ((phases, "part of a step"), (operators, "operation (own time)")):
        table.add_column(first, overflow="fold")
        table.add_column("ms", justify="right")
        table.add_column("share", justify="right")
    total = sum(ms for _, ms in found.phases)
    for name, ms in found.phases:
        phases.add_row(name, f"{ms:.2f}", f"{ms / total:.1%}")
    operators.add_column("calls", justify="right")
    for name, ms, calls in found.operators:
        operators.add_row(Text(name), f"{ms:.2f}", f"{ms / total:.1%}", f"{calls:g}")
    console.print(phases)
    console.print()
    console.print(operators)


TWICE = 10.0
"""Seconds in which a second SIGTERM is the first one, passed on."""


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM ask for an end after the step; a second one ends at once.

    Not so a SIGTERM within seconds: a scheduler sends it to all processes, and their launcher passes it on.
    """
    stop, asked = threading.Event(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if not stop.is_set():
            stop.set()
            asked = time.monotonic()
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        elif time.monotonic() - asked > TWICE:
            for other, handler in before.items():
                signal.signal(other, handler)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _logging_to(console: Console) -> Iterator[None]:
    """Warnings of the library, such as a damaged checkpoint, to the terminal."""
    logger = logging.getLogger("sharpwise")
    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
